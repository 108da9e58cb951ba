"""The whole job: a model, three sets and a method in; an unlearned model, its history and its report out."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import config as configs
from . import report, storage
from .methods import Entangled
from .methods.checks import check_parameters, check_samples
from .methods.data import NAMES, Data, SampleSet, measured_sets
from .methods.process import NonFinite, Process, sample_cross_entropy
from .metrics import accuracy, evaluate, sample_losses
from .metrics.memory import PeakMemory
from .progress import say, shown
from .report import CHECKPOINT, CONFIG, REPORT

MODEL = "model.safetensors"
FEW = 18  # steps of a run; those of the demo take 90 to 297, of its --quick 18 and more
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
        facts: what the method reports of the run as a whole: for Entangled the two propositions (facts.py says what they mean).
        settings: what config.toml says.  run: what must agree for the run to be taken up again.
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
    settings: dict = field(default_factory=dict, repr=False)
    run: dict = field(default_factory=dict, repr=False)

    def row(self) -> dict:
        """This run as one seed of its method in report.json."""
        return {"seed": self.seed, **self.after, "seconds": self.seconds, "peak_mb": self.peak_mb}

    def report(self) -> dict:
        original = {"seed": self.seed, **self.before, "seconds": None, "peak_mb": None}
        return {
            "methods": {"original": report.aggregate([original]), self.method: report.aggregate([self.row()])},
            "task": self.task, "facts": self.facts, "run": self.run, **report.machine_info(), "figures": [],
        }

    def save(self, folder) -> Path:
        """Write report.json, history.csv, losses.safetensors, config.toml, model.safetensors and the figures, over what is there."""
        folder = Path(folder)
        storage.save_tensors(folder / MODEL, self.model.state_dict())
        storage.save_tensors(folder / report.LOSSES, self.losses)
        report.write_history(folder, self.history)
        storage.save_toml(folder / CONFIG, self.settings)
        storage.save_json(folder / REPORT, self.report())
        self.plot(folder)
        return folder

    def plot(self, folder) -> list[Path]:
        """Draw the figures of a saved run; their paths."""
        from .figures import write_figures

        drawn = write_figures(Path(folder))
        found = report.read_report(folder)
        found["figures"] = [p.name for p in drawn]
        storage.save_json(Path(folder) / REPORT, found)
        return drawn

    def summary(self, console=None) -> None:
        """Print the table."""
        from rich.console import Console

        report.table(self.report(), console or Console())


def unlearn(
    model: nn.Module, *, forget, adjacent, remote, method=None, test=None, loss=sample_cross_entropy, seed: int = 0,
    out=None, resume: bool = False, overwrite: bool = False, progress: bool = True, checkpoint_every: int = 50,
    eval_every: int = 0, augment=None, allow_overlap: bool = False,
) -> Result:  # fmt: skip
    """Make a trained model forget some samples while keeping those that are entangled with them.

    Args:
        model: a trained classifier, changed in place; it runs in eval mode (frozen BatchNorm statistics).
        forget, adjacent, remote: disjoint sets, each (x, y) tensors or a map-style Dataset. ``adjacent`` are the
            retain samples close to the forget set, ``remote`` the others (tasks.by_knn finds them).
        method: a dataclass of entangle_fast.methods; default Entangled().
        test: a tasks.Sets, or a mapping of the three names to (x, y) or a Dataset; default: the training samples themselves.
        loss: (output, y) → per-sample losses (n,); default cross-entropy.
        seed: fixes everything random: the same seed gives the same bits on the same machine.
        out: folder to write to; checkpoints every ``checkpoint_every`` steps, the full record at the end. One that holds
            a run, finished or not, is refused without ``resume`` or ``overwrite``.
        resume: continue the run whose checkpoint lies in ``out``, to the bit; without one start anew; of a finished run
            give the result, its weights in ``model``. Method, options, seed and data must be those of the run: of tensors
            every byte is compared, of other Datasets what SampleSet.digest says; loss and augment cannot be.
        overwrite: start anew in a folder that holds a run; its files stay until there are new ones.
        progress: show a progress bar, or lines where stderr is no terminal.
        eval_every: steps between accuracies in the history; 0: only at stage ends.
        augment: (x, generator) → x, applied to training batches (tasks.RandomShift).
        allow_overlap: do not refuse samples that are in two sets.

    Returns: a Result.

    Raises:
        ValueError: empty or overlapping sets, labels out of range, no trainable parameter, non-finite parameters, a
            folder that holds a run, …
        NonFinite: a loss became NaN or infinite; the step was not taken, the model is as it was before it.
        CheckpointError: a run with other settings or other data, or files that cannot be read or written.
        KeyboardInterrupt: after the step in progress, and after the checkpoint was written if ``out`` is given.

    >>> import torch, entangle_fast as ef
    >>> x, y, model = torch.randn(60, 4), torch.arange(60) % 2, torch.nn.Linear(4, 2)
    >>> result = ef.unlearn(model, forget=(x[:20], y[:20]), adjacent=(x[20:40], y[20:40]), remote=(x[40:], y[40:]),
    ...                     method=ef.FineTune(epochs=2), progress=False)
    >>> sorted(result.after)
    ['adjacent', 'forget', 'per_class', 'remote']
    """
    refuse_used(out, resume, overwrite)
    sets = (forget, adjacent, remote)
    run = _Run(model, sets, method, test, loss, seed, out, checkpoint_every, eval_every, augment, allow_overlap)
    return run.go(resume, progress)


def refuse_used(out, resume: bool, overwrite: bool) -> None:
    """Raise ValueError for a folder that holds a run, unless it is said what to do with it."""
    if resume and overwrite:
        raise ValueError("resume, overwrite: got both; resume goes on with the run in the folder, overwrite starts anew: give one")
    if out is None:
        if resume:
            raise ValueError("resume: needs the folder out= in which the checkpoint lies")
        return
    if resume or overwrite:
        return
    if (Path(out) / CHECKPOINT).exists():
        raise ValueError(f"out: {out} holds a run that is not finished; resume=True (--resume) goes on with it, "
                         "overwrite=True (--overwrite) starts anew")  # fmt: skip
    if (Path(out) / REPORT).exists():
        raise ValueError(f"out: {out} holds a finished run; give another folder, or overwrite=True (--overwrite) to run again into it")


class _Run:
    """One process being driven: timing, history, checkpoints, evaluation."""

    def __init__(self, model, sets, method, test, loss, seed, out, checkpoint_every, eval_every, augment=None, allow_overlap=False):
        method = Entangled() if method is None else method
        if isinstance(method, type) or not (is_dataclass(method) and hasattr(method, "start")):
            got = repr(method) if isinstance(method, (str, type)) else type(method).__name__
            raise ValueError(f"method: got {got}; needs a dataclass of entangle_fast.methods, as in ef.Entangled(alpha=0.5)")
        check_parameters(model)
        device = next(model.parameters()).device
        self.data = Data.of(*sets, device, seed, augment=augment, allow_overlap=allow_overlap)
        self.tests = measured_sets(test, device)
        own = None if loss is sample_cross_entropy else loss
        for name in NAMES:
            check_samples(model, getattr(self.data, name), own, classes=own is None or self.tests is None)
        for samples in (self.tests or {}).values():
            check_samples(model, samples, None, classes=True)
        self.model, self.method, self.test, self.seed = model, method, test, seed
        self.name = type(method).name
        self.out = None if out is None else Path(out)
        self.checkpoint_every, self.eval_every = checkpoint_every, eval_every
        self.settings = {"method": {"name": self.name, **configs.to_dict(method)}, "run": {"seed": seed}}
        self.task = task_facts(test)
        self.process: Process = method.start(model, self.data, loss, seed)
        self.history: list[dict] = []
        self.losses: dict[str, Tensor] = {}
        self.before: dict = {}
        self.seconds = 0.0

    def go(self, resume: bool, progress: bool) -> Result:
        process = self.process
        if resume and (self.out / CHECKPOINT).exists():
            self._load()
        elif resume and (self.out / REPORT).exists():
            say(progress, f"{self.name}: {self.out} holds the finished run; nothing is left to do")
            return self._finished()
        else:
            self.before = self.measure()
            self._note_losses("before")
            say(progress, self._few_steps())
        if self.out is not None:
            storage.must_be_writable(self.out)
        with PeakMemory(process.params[0].device) as peak, _deferred_interrupt() as interrupted:
            with shown(progress, self.name, process.total, done=process.done, text=process.where()[0]) as advance:
                while process.done < process.total and not process.stopped:
                    self._step()
                    advance(process.done, process.where()[0])
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
            [_floats(row) for row in self.history], self.losses, facts, self.task, self.settings, self._identity(),
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
        return (self.tests[name] if self.tests else getattr(self.data, name)).whole()

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
        sets: list[SampleSet] = [*(getattr(self.data, name) for name in NAMES), *(self.tests or {}).values()]
        return {
            "method": self.name, "config": storage.plain(configs.to_dict(self.method)), "seed": self.seed,
            "data": {s.name: [len(s), s.digest] for s in sets},
        }  # fmt: skip

    def _must_agree(self, theirs: dict, path: Path) -> None:
        """Raise CheckpointError where the run in ``path`` was another one."""
        mine, anew = json.loads(json.dumps(self._identity())), "or overwrite=True (--overwrite) to start anew"
        for key in ("method", "config", "seed"):
            got, had = mine[key], theirs.get(key)
            if got == had:
                continue
            if isinstance(got, dict) and isinstance(had, dict):
                option = next(k for k in (*got, *had) if k not in got or k not in had or got[k] != had[k])
                key, got, had = f"{key}.{option}", got.get(option), had.get(option)
            raise storage.CheckpointError(f"{path}: was written by a run with {key} {had}, this one has {got}; give the same, {anew}")
        got, had = mine["data"], theirs.get("data") or {}
        for name in dict.fromkeys((*got, *had)):
            if got.get(name) != had.get(name):
                a, b = (f"{d[name][0]} samples with digest {d[name][1][:12]}" if name in d else "none" for d in (got, had))
                raise storage.CheckpointError(
                    f"{name}: got {a}, the run in {path} had {b}; give the same samples in the same order, {anew}"
                )

    def _few_steps(self) -> str:
        """A hint where the method's passes over this much data are next to no steps; a step of retrain is a whole training."""
        passes = [f.name for f in fields(self.method) if "epochs" in f.name]
        if self.process.total >= FEW or not passes or self.name == "retrain":
            return ""
        sizes = ", ".join(f"{len(getattr(self.data, name))} {name}" for name in NAMES)
        steps = ", ".join(f"{stage} {count}" for stage, count in self.process.stages)
        mend = f"raise {', '.join(passes)}"
        return f"{self.name}: few steps ({steps}) on so few samples ({sizes}); it may change next to nothing: {mend}"

    def _load(self) -> None:
        path = self.out / CHECKPOINT
        notes = storage.json_object(storage.load_metadata(path).get("run", "{}"), path)
        self._must_agree(notes, path)
        tensors = storage.load_tensors(path)
        self._put({k[len("model.") :]: v for k, v in tensors.items() if k.startswith("model.")}, path)
        self.losses = {k[len("losses.") :]: v for k, v in tensors.items() if k.startswith("losses.")}
        self.history, self.before, self.seconds = notes["history"], notes["before"], notes["seconds"]
        self.process.done, self.process.stopped = notes["done"], notes["stopped"]
        self.process.load({k[len("process.") :]: v for k, v in tensors.items() if k.startswith("process.")})

    def _put(self, state: dict[str, Tensor], path: Path) -> None:
        mine, theirs = ({k: (v.shape, v.dtype) for k, v in s.items()} for s in (self.model.state_dict(), state))
        if mine != theirs:
            odd = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
            raise storage.CheckpointError(f"{path}: does not fit this model, first at {odd[0]!r}; give the model it is of")
        self.model.load_state_dict(state)

    def _finished(self) -> Result:
        """The result of the finished run in ``out``, its weights put into the model."""
        found = report.read_report(self.out)
        self._must_agree(found["run"], self.out / REPORT)
        before, after = (dict(found["methods"][name]["seeds"][0]) for name in ("original", self.name))
        seconds, peak_mb = after["seconds"], after["peak_mb"]
        for row in (before, after):
            del row["seed"], row["seconds"], row["peak_mb"]
        history = [{k: v for k, v in row.items() if v is not None} for row in report.read_history(self.out)]
        losses = storage.load_tensors(self.out / report.LOSSES)
        self._put(storage.load_tensors(self.out / MODEL), self.out / MODEL)
        return Result(
            self.model, self.name, self.method, self.seed, before, after, seconds, peak_mb, history, losses, found["facts"],
            found["task"], self.settings, found["run"],
        )  # fmt: skip


def _floats(row: dict) -> dict:
    """Numbers out of 0-d tensors; the angle beside the cosine."""
    out = {k: float(v) if isinstance(v, Tensor) else v for k, v in row.items()}
    if out.get("cosine") is not None:
        out["angle_deg"] = math.degrees(math.acos(max(-1.0, min(1.0, out["cosine"]))))
    return out


def task_facts(test) -> dict:
    """What report.json says of the task, as far as the sets know it."""
    if test is None:
        return {"measured": "training samples"}
    if not hasattr(test, "class_names"):
        return {}
    classes = {name: [test.class_names[i] for i in fine.unique().tolist()]
               for name, fine in zip(NAMES, test.test_fine)}  # fmt: skip
    return {"forget": classes["forget"], "classes": classes, "num_classes": len(test.label_names)}


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


def unlearn_from_config(config: configs.RunConfig, *, resume: bool = False, overwrite: bool = False) -> Result:
    """The job of ``entangle-fast unlearn CONFIG.toml``: task and model from the config, artefacts into config.run.out.

    resume, overwrite and what is raised: as in `unlearn`.
    """
    from . import tasks

    options = config.run
    refuse_used(options.out, resume, overwrite)
    if options.threads:
        torch.set_num_threads(options.threads)
    task = load_task(config.task)
    model = _load_model(tasks, config.model)
    try:
        model.to(options.device)
    except (RuntimeError, AssertionError) as error:  # the second where torch was built without CUDA
        raise configs.ConfigError(f"cannot use {options.device!r}: {str(error).splitlines()[0]}", key=("run", "device")) from error
    if not config.model.weights:
        say(options.progress, "model.weights: none given; what is unlearned is the model as its factory makes it")
    try:
        sets = task.split(config.task.adjacency, model=model)
    except ValueError as error:
        if str(error).partition(":")[0] not in _TASK_KEYS:
            raise  # the model's own
        raise configs.in_keys(error, _TASK_KEYS, ("task",)) from error
    run = _Run(model, sets.train, config.method, sets, sample_cross_entropy, options.seed, options.out, options.checkpoint_every,
               options.eval_every)  # fmt: skip
    run.settings = configs.to_dict(config)
    run.task |= {"dataset": config.task.dataset, "labels": config.task.labels}
    if not resume or not any((run.out / name).exists() for name in (CHECKPOINT, REPORT)):
        storage.save_toml(run.out / CONFIG, run.settings)  # what --resume is given after a run that died
    return run.go(resume, options.progress)


_TASK_KEYS = {name: ("task", key) for name, key in {"folder": "path", "root": "path", "forget": "forget", "labels": "labels"}.items()}


def load_task(c: configs.TaskConfig):
    """The data that a [task] section names."""
    from . import tasks

    load = getattr(tasks, c.dataset)  # TaskConfig lets no other names in
    try:
        return load(c.path, forget=c.forget, labels=c.labels)
    except (OSError, ValueError) as error:
        raise configs.in_keys(error, _TASK_KEYS, ("task", "path") if isinstance(error, OSError) else ("task",)) from error


def _load_model(tasks, c: configs.ModelConfig) -> nn.Module:
    try:
        model = tasks.load_model(c.factory, **c.kwargs)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        said = str(error).removeprefix("name: ")
        raise configs.ConfigError(f"cannot make {c.factory!r}: {said}", key=("model", "factory")) from error
    if not c.weights:
        return model
    try:
        return tasks.load_weights(model, c.weights)
    except (OSError, ValueError, storage.CheckpointError) as error:
        raise configs.in_keys(error, {"path": ("model", "weights")}, ("model", "weights")) from error


