"""The job that a config file describes: its data, its model, its run."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from . import storage, tasks
from .config import ModelConfig, RunConfig, TaskConfig
from .config_reading import ConfigError, in_keys, to_dict
from .job import claimed
from .job_run import Run
from .methods.process import sample_cross_entropy
from .progress import say
from .report import CHECKPOINT, CONFIG, REPORT
from .result import Result
from .tasks.sets import NoneAdjacent


def unlearn_from_config(config: RunConfig, *, beside: Path = Path(), resume: bool = False, overwrite: bool = False) -> Result:
    """The job of ``entangle-fast unlearn CONFIG.toml``: task and model from the config, artefacts into config.run.out.

    beside: the folder of the config file, where model.factory is looked for after what is installed and before the current folder.
    resume, overwrite and what is raised: as in `unlearn`.
    """
    with claimed(config.run.out, resume, overwrite):
        return _run(config, beside, resume)


def _run(config: RunConfig, beside: Path, resume: bool) -> Result:
    options = config.run
    if options.threads:
        torch.set_num_threads(options.threads)
    task = load_task(config.task)
    model = _load_model(config.model, beside)
    try:
        model.to(options.device)
    except (RuntimeError, AssertionError) as error:  # the second where torch was built without CUDA
        raise ConfigError(f"cannot use {options.device!r}: {str(error).splitlines()[0]}", key=("run", "device")) from error
    if not config.model.weights:
        say(options.progress, "model.weights: none given; what is unlearned is the model as its factory makes it")
    try:
        sets = task.split(config.task.adjacency, model=model)
    except NoneAdjacent as error:
        raise in_keys(ValueError(f'{error.problem}; write adjacency = "knn" in [task]'), _TASK_KEYS, ("task",)) from error
    except ValueError as error:
        if str(error).partition(":")[0] not in _TASK_KEYS:
            raise  # the model's own
        raise in_keys(error, _TASK_KEYS, ("task",)) from error
    run = Run(model, sets.train, config.method, sets, sample_cross_entropy, options.seed, options.out, options.checkpoint_every,
              options.eval_every)  # fmt: skip
    run.settings = to_dict(config)
    run.task |= {"dataset": config.task.dataset, "labels": config.task.labels}
    if not resume or not any((run.out / name).exists() for name in (CHECKPOINT, REPORT)):
        storage.save_toml(run.out / CONFIG, run.settings)  # what --resume is given after a run that died
    return run.go(resume, options.progress)


_TASK_KEYS = {"folder": ("task", "path"), "root": ("task", "path"), **{key: ("task", key) for key in ("forget", "labels", "adjacency")}}


def load_task(c: TaskConfig):
    """The data that a [task] section names."""
    load = getattr(tasks, c.dataset)  # TaskConfig lets no other names in
    try:
        return load(c.path, forget=c.forget, labels=c.labels)
    except (OSError, ValueError) as error:
        raise in_keys(error, _TASK_KEYS, ("task", "path") if isinstance(error, OSError) else ("task",)) from error


@contextlib.contextmanager
def _importing_from(folders: list[str]) -> Iterator[None]:
    """Modules are found there too, for a while, and last: a file of theirs hides nothing that is installed."""
    added = [folder for folder in folders if folder not in sys.path]
    sys.path += added
    try:
        yield
    finally:
        for folder in added:
            if folder in sys.path:  # what was imported may have changed it
                sys.path.remove(folder)


def _load_model(c: ModelConfig, beside: Path) -> nn.Module:
    folders = list(dict.fromkeys(str(folder.resolve()) for folder in (beside, Path())))
    try:
        with _importing_from(folders):
            model = tasks.load_model(c.factory, **c.kwargs)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        said = str(error).removeprefix("name: ")
        if isinstance(error, ModuleNotFoundError) and error.name == c.factory.partition(":")[0].partition(".")[0]:
            said += f"; it is not installed, and there is none in {' or in '.join(folders)}: put it beside the config file"
        raise ConfigError(f"cannot make {c.factory!r}: {said}", key=("model", "factory")) from error
    if not c.weights:
        return model
    try:
        return tasks.load_weights(model, c.weights)
    except (OSError, ValueError, storage.CheckpointError) as error:
        raise in_keys(error, {"path": ("model", "weights")}, ("model", "weights")) from error
