"""The whole job: a model, three sets and a method in; an unlearned model, its history and its report out."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import config as configs
from . import report, storage
from .methods import Entangled
from .methods.data import NAMES, Data
from .methods.process import NonFinite, Process, sample_cross_entropy
from .metrics import accuracy, evaluate, sample_losses
from .metrics.memory import PeakMemory

CHECKPOINT = "checkpoint.safetensors"
PHASES = ("stage1", "stage2")  # stages whose end the figures show; other methods have one: "after"


@dataclass
class Result:
    """What a run leaves. Accuracies in %, seconds of unlearning steps alone, memory in MB above the start.

    Attributes:
        model: the unlearned model (the one that was given, changed in place).
        method, config, seed: what was run.
        before, after: {"forget", "adjacent", "remote", "per_class"} on the test samples.
        history: one row a step (report.HISTORY_COLUMNS).
        losses: "method/seed/phase/set" → per-sample losses (n,) float32.
        facts: what the method reports of the run as a whole: for Entangled the two propositions.
    """

    model: nn.Module
    method: str
    config: Any
    seed: int
    before: dict
    after: dict
    seconds: float
    peak_mb: float
    history: list[dict] = field(repr=False)
    losses: dict[str, Tensor] = field(repr=False)
    facts: dict = field(default_factory=dict)
    task: dict = field(default_factory=dict)

    def row(self) -> dict:
        """This run as one seed of its method in report.json."""
        return {"seed": self.seed, **self.after, "seconds": self.seconds, "peak_mb": self.peak_mb}

    def report(self) -> dict:
        original = {"seed": self.seed, **self.before, "seconds": None, "peak_mb": None}
        return {
            "methods": {"original": report.aggregate([original]), self.method: report.aggregate([self.row()])},
            "task": self.task, "facts": self.facts, **report.machine_info(), "figures": [],
        }

    def save(self, folder) -> Path:
        """Write report.json, history.csv, losses.safetensors, config.toml, model.safetensors and the figures."""
        folder = Path(folder)
        storage.save_tensors(folder / "model.safetensors", self.model.state_dict())
        storage.save_tensors(folder / report.LOSSES, self.losses)
        report.write_history(folder, self.history)
        if not (folder / "config.toml").exists():
            options = {"method": {"name": self.method, **configs.to_dict(self.config)}, "run": {"seed": self.seed}}
            storage.save_toml(folder / "config.toml", options)
        storage.save_json(folder / report.REPORT, self.report())
        self.plot(folder)
        return folder

    def plot(self, folder) -> list[Path]:
        """Draw the figures of a saved run; their paths."""
        from .figures import write_figures

        drawn = write_figures(Path(folder))
        found = report.read_report(folder)
        found["figures"] = [p.name for p in drawn]
        storage.save_json(Path(folder) / report.REPORT, found)
        return drawn

    def summary(self, console=None) -> None:
        """Print the table."""
        from rich.console import Console

        report.table(self.report(), console or Console())


def unlearn(
    model: nn.Module, *, forget, adjacent, remote, method=None, test=None, loss=sample_cross_entropy, seed: int = 0,
    out=None, resume: bool = False, progress: bool = True, checkpoint_every: int = 50, eval_every: int = 0,
    augment=None, allow_overlap: bool = False,
) -> Result:  # fmt: skip
    """Make a trained model forget some samples while keeping those that are entangled with them.

    Args:
        model: a trained classifier, changed in place; it runs in eval mode (frozen BatchNorm statistics).
        forget, adjacent, remote: disjoint sets, each (x, y) tensors or a map-style Dataset. ``adjacent`` are the
            retain samples close to the forget set, ``remote`` the others (tasks.by_knn finds them).
        method: a dataclass of entangle_fast.methods; default Entangled().
        test: a tasks.Sets, or a mapping of the three names to (x, y); default: the training samples themselves.
        loss: (output, y) → per-sample losses (n,); default cross-entropy.
        seed: fixes everything random: the same seed gives the same bits on the same machine.
        out: folder to write to; checkpoints every ``checkpoint_every`` steps, the full record at the end.
        resume: continue the run whose checkpoint lies in ``out``, to the bit; without one start anew.
        progress: show a progress bar.  eval_every: steps between accuracies in the history; 0: only at stage ends.
        augment: (x, generator) → x, applied to training batches (tasks.RandomShift).
        allow_overlap: do not refuse samples that are in two sets.

    Returns: a Result.

    Raises:
        ValueError: empty or overlapping sets, labels out of range, no trainable parameter, non-finite parameters, …
        NonFinite: a loss became NaN or infinite; the step was not taken, the model is as it was before it.
        CheckpointError: a checkpoint of another run, or one that cannot be read or written.
        KeyboardInterrupt: after the step in progress, and after the checkpoint was written if ``out`` is given.
    """
    method = Entangled() if method is None else method
    if isinstance(method, type) or not hasattr(method, "start"):
        got = repr(method) if isinstance(method, (str, type)) else type(method).__name__
        raise ValueError(f"method: got {got}; needs a dataclass of entangle_fast.methods, as in ef.Entangled(alpha=0.5)")
    if resume and out is None:
        raise ValueError("resume: needs the folder out= in which the checkpoint lies")
    _refuse_bad_parameters(model)
    device = next(model.parameters()).device
    data = Data.of(forget, adjacent, remote, device, seed, augment=augment, allow_overlap=allow_overlap)
    _refuse_bad_labels(model, data, loss)
    run = _Run(model, method, data, test, loss, seed, out, checkpoint_every, eval_every)
    return run.go(resume, progress)


class _Run:
    """One process being driven: timing, history, checkpoints, evaluation."""

    def __init__(self, model, method, data, test, loss, seed, out, checkpoint_every, eval_every):
        self.model, self.method, self.data, self.test, self.seed = model, method, data, test, seed
        self.name = type(method).name
        self.out = None if out is None else Path(out)
        self.checkpoint_every, self.eval_every = checkpoint_every, eval_every
        self.process: Process = method.start(model, data, loss, seed)
        self.history: list[dict] = []
        self.losses: dict[str, Tensor] = {}
        self.before: dict = {}
        self.seconds = 0.0

    def go(self, resume: bool, progress: bool) -> Result:
        process = self.process
        if resume and (self.out / CHECKPOINT).exists():
            self._load()
        else:
            self.before = self.measure()
            self._note_losses("before")
        with PeakMemory(process.params[0].device) as peak, _deferred_interrupt() as interrupted:
            with _bar(progress, self.name, process) as advance:
                while process.done < process.total and not process.stopped:
                    self._step()
                    advance(process)
                    if interrupted():
                        self._keep()
                        raise KeyboardInterrupt
                    due = self.checkpoint_every and process.done % self.checkpoint_every == 0
                    if due and process.done < process.total:
                        self._keep()
        facts = process.facts()
        after = self.measure()
        if not any(name in PHASES for name, _ in process.stages):
            self._note_losses("after")
        if self.history:
            self.history[-1] |= {f"acc_{s}": after[s] for s in NAMES}
        result = Result(
            self.model, self.name, self.method, self.seed, self.before, after, self.seconds, peak.mb,
            [_floats(row) for row in self.history], self.losses, facts, task_facts(self.test),
        )  # fmt: skip
        if self.out is not None:
            result.save(self.out)
            (self.out / CHECKPOINT).unlink(missing_ok=True)
        return result

    def _step(self) -> None:
        process = self.process
        try:
            start = time.perf_counter()
            row = process.step()
            if process.params[0].is_cuda and self.eval_every:
                torch.cuda.synchronize()
            self.seconds += time.perf_counter() - start
        except FloatingPointError:
            self._keep()
            raise
        row = {"method": self.name, "seed": self.seed, **row, "seconds": self.seconds}
        ended = process.where()[1] == 0 or process.stopped
        if self.eval_every and process.done % self.eval_every == 0 or ended:
            row |= {f"acc_{s}": v for s, v in self.measure().items() if s in NAMES}
        self.history.append(row)
        if ended and row["stage"] in PHASES:
            self._note_losses(row["stage"])

    def measure(self) -> dict:
        """Accuracies in % on the test samples, or on the training samples without any."""
        if hasattr(self.test, "test_fine"):
            return evaluate(self.model, self.test)
        found = {}
        for name in NAMES:
            try:
                found[name] = accuracy(self.model, *self._samples(name))
            except FloatingPointError as error:
                raise NonFinite(f"{name} set: {error}") from error
        return {**found, "per_class": {}}

    def _samples(self, name: str) -> tuple[Tensor, Tensor]:
        if isinstance(self.test, Mapping):
            return self.test[name]
        if self.test is not None:
            return getattr(self.test.test, name)
        samples = getattr(self.data, name)
        return samples.tensors or samples.take(torch.arange(len(samples)))

    def _note_losses(self, phase: str) -> None:
        for name in NAMES:
            x, y = self._samples(name)
            self.losses[f"{self.name}/{self.seed}/{phase}/{name}"] = sample_losses(self.model, x, y).float().cpu()

    # ---- checkpoints ----

    def _keep(self) -> None:
        if self.out is None or not all(torch.isfinite(p).all() for p in self.process.params):
            return  # an older checkpoint is worth more than weights that are lost
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"process.{k}": v for k, v in self.process.state().items()}
        tensors |= {f"losses.{k}": v for k, v in self.losses.items()}
        history = [_floats(row) for row in self.history]
        notes = {
            "done": self.process.done, "stopped": self.process.stopped, "seconds": self.seconds, "history": history,
            "before": self.before, **self._identity(),
        }  # fmt: skip
        storage.save_tensors(self.out / CHECKPOINT, tensors, {"run": json.dumps(storage.plain(notes))})

    def _identity(self) -> dict:
        """What must agree for a run to be continued."""
        return {
            "method": self.name, "config": storage.plain(configs.to_dict(self.method)), "seed": self.seed,
            "samples": [len(getattr(self.data, name)) for name in NAMES],
        }  # fmt: skip

    def _load(self) -> None:
        path = self.out / CHECKPOINT
        notes = storage.json_object(storage.load_metadata(path).get("run", "{}"), path)
        for key, value in self._identity().items():
            if notes.get(key) != json.loads(json.dumps(value)):
                raise storage.CheckpointError(
                    f"{path}: was written by a run with {key} {notes.get(key)}, this one has {value}; "
                    "give the same, or start anew without resume"
                )
        tensors = storage.load_tensors(path)
        state = {k[len("model.") :]: v for k, v in tensors.items() if k.startswith("model.")}
        mine, theirs = ({k: (v.shape, v.dtype) for k, v in s.items()} for s in (self.model.state_dict(), state))
        if mine != theirs:
            odd = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
            raise storage.CheckpointError(f"{path}: does not fit this model, first at {odd[0]!r}; give the model it is of")
        self.model.load_state_dict(state)
        self.losses = {k[len("losses.") :]: v for k, v in tensors.items() if k.startswith("losses.")}
        self.history, self.before, self.seconds = notes["history"], notes["before"], notes["seconds"]
        self.process.done, self.process.stopped = notes["done"], notes["stopped"]
        self.process.load({k[len("process.") :]: v for k, v in tensors.items() if k.startswith("process.")})


def _floats(row: dict) -> dict:
    """Numbers out of 0-d tensors; the angle beside the cosine."""
    out = {k: float(v) if isinstance(v, Tensor) else v for k, v in row.items()}
    if out.get("cosine") is not None:
        out["angle_deg"] = math.degrees(math.acos(max(-1.0, min(1.0, out["cosine"]))))
    return out


def task_facts(test) -> dict:
    """What report.json says of the task, as far as the sets know it."""
    if not hasattr(test, "class_names"):
        return {}
    classes = {name: [test.class_names[i] for i in fine.unique().tolist()]
               for name, fine in zip(NAMES, test.test_fine)}  # fmt: skip
    return {"forget": classes["forget"], "classes": classes, "num_classes": len(test.label_names)}


def _refuse_bad_parameters(model: nn.Module) -> None:
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model: no trainable parameter; set requires_grad_(True) on those that shall be changed")
    for name, p in model.named_parameters():
        if p.is_meta:
            raise ValueError(f"model: parameter {name!r} is on the meta device and has no values; load the weights first")
        if not torch.isfinite(p.detach()).all():
            raise ValueError(f"model: parameter {name!r} holds NaN or infinite values; load weights that are finite")


@torch.no_grad()
def _refuse_bad_labels(model: nn.Module, data: Data, loss) -> None:
    """One sample of each set through the model: shapes go together and labels are in range."""
    from .methods.training import in_mode

    for name in NAMES:
        samples = getattr(data, name)
        x, y = samples.take(torch.arange(min(2, len(samples))))
        with in_mode(model, False):
            try:
                output = model(x)
            except (RuntimeError, TypeError, ValueError) as error:
                raise ValueError(f"{name}: the model cannot take {x.dtype} samples of shape {tuple(x.shape[1:])}: {error}; "
                                 "give them as it was trained on") from error  # fmt: skip
            values = loss(output, y) if loss is not sample_cross_entropy else None
        if values is not None:
            if values.shape != (len(x),):
                raise ValueError(f"loss: gave shape {tuple(values.shape)} for {len(x)} samples; needs one per sample, (n,), "
                                 "not reduced")  # fmt: skip
            continue
        classes = output.shape[-1]
        labels = samples.tensors[1] if samples.tensors else y
        if labels.is_floating_point():
            raise ValueError(f"{name}: labels are {labels.dtype}; needs int64 class indices: use .long()")
        if labels.min() < 0 or labels.max() >= classes:
            bad = int(labels.max()) if labels.max() >= classes else int(labels.min())
            raise ValueError(f"{name}: label {bad} is outside [0, {classes}), the classes the model predicts; "
                             "check the labels or the model")  # fmt: skip


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator:
    """ctrl-C is noted and answered between steps, so that no step is left half done; a second one is immediate."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def note(number, frame):
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _bar(progress: bool, name: str, process: Process) -> Iterator:
    if not progress:
        yield lambda process: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task(name, total=process.total, completed=process.done)

        def advance(process):
            bar.update(task, completed=process.done, description=f"{name} {process.where()[0]}")

        yield advance


def unlearn_from_config(config: configs.RunConfig, *, resume: bool = False) -> Result:
    """The job of ``entangle-fast unlearn CONFIG.toml``: task and model from the config, artefacts into config.run.out."""
    from . import tasks

    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    task = load_task(config.task)
    model = _load_model(tasks, config.model).to(config.run.device)
    sets = task.split(config.task.adjacency, model=model)
    out = Path(config.run.out)
    if not (resume and (out / "config.toml").exists()):
        storage.save_toml(out / "config.toml", configs.to_dict(config))
    result = unlearn(
        model, **sets.train._asdict(), method=config.method, test=sets, seed=config.run.seed, out=out, resume=resume,
        progress=config.run.progress, checkpoint_every=config.run.checkpoint_every, eval_every=config.run.eval_every,
    )  # fmt: skip
    result.task |= {"dataset": config.task.dataset, "labels": config.task.labels}
    storage.save_json(out / report.REPORT, result.report())
    return result


def load_task(c: configs.TaskConfig):
    """The data that a [task] section names."""
    from . import tasks

    if c.dataset == "fashion_mnist":
        return tasks.fashion_mnist(c.path, forget=c.forget, labels=c.labels)
    load = {"cifar10": tasks.cifar10, "cifar100": tasks.cifar100, "image_folder": tasks.image_folder}[c.dataset]
    return load(c.path, forget=c.forget, labels=c.labels)


def _load_model(tasks, c: configs.ModelConfig) -> nn.Module:
    try:
        model = tasks.load_model(c.factory, **c.kwargs)
    except (ImportError, AttributeError, TypeError) as error:
        raise configs.ConfigError(f"cannot make {c.factory!r}: {error}", key=("model", "factory")) from error
    return tasks.load_weights(model, c.weights) if c.weights else model


