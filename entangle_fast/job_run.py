"""One run being driven: timing, history, checkpoints, evaluation."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import report, storage
from .config_reading import to_dict
from .methods import Entangled
from .methods.checks import check_parameters, check_samples
from .methods.data import NAMES, Data, SampleSet, measured_sets
from .methods.process import NonFinite, Process, sample_cross_entropy
from .metrics import evaluate, sample_losses
from .metrics.memory import PeakMemory
from .progress import say, shown
from .report import CHECKPOINT, FINISHED, REPORT, how_to_go_on, run_in
from .result import MODEL, Result

FEW = 18  # steps of a run; those of the demo take 90 to 297, of its --quick 18 and more
PHASES = ("stage1", "stage2")  # stages whose end the figures show; other methods have one: "after"


class Run:
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
            check_samples(model, getattr(self.data, name), own, classes=own is None or self.tests is None, trains=True)
        for samples in (self.tests or {}).values():
            check_samples(model, samples, None, classes=True)
        self.model, self.method, self.test, self.seed = model, method, test, seed
        self.name = type(method).name
        self.out = None if out is None else Path(out)
        self.checkpoint_every, self.eval_every = checkpoint_every, eval_every
        self.settings = {"method": {"name": self.name, **to_dict(method)}, "run": {"seed": seed}}
        self.task = task_facts(test)
        self.process: Process = method.start(model, self.data, loss, seed)
        self.history: list[dict] = []
        self.losses: dict[str, Tensor] = {}
        self.before: dict = {}
        self.seconds = 0.0
        self.in_step = False

    def go(self, resume: bool, progress: bool) -> Result:
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
        try:
            return self._drive(progress)
        except KeyboardInterrupt as error:
            error.args = (self._stopped(),)
            raise

    def _drive(self, progress: bool) -> Result:
        process = self.process
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
            _floats(self.history), self.losses, facts, self.task, self.settings, self._identity(),
        )  # fmt: skip
        if self.out is not None:
            result._write(self.out)
        return result

    def _stopped(self) -> str:
        """What a ctrl-C leaves: the model, the folder."""
        process = self.process
        over = process.done >= process.total or process.stopped
        model = "may hold a part of the next one" if self.in_step else f"is as that step left it, {'' if over else 'half '}unlearned"
        if way := how_to_go_on(self.out) if self.out else None:
            kept = f"go on with {way}"
        elif over and self.out and run_in(self.out) == FINISHED:
            kept = f"entangle-fast report {self.out} shows what is finished"
        else:
            kept = "no checkpoint was kept" + ("" if self.out else ": give out= for that")
        return f"{self.name}: stopped after step {process.done} of {process.total}; the model {model}; {kept}"

    def _step(self) -> None:
        process = self.process
        try:
            start = time.perf_counter()
            self.in_step = True
            row = process.step()
            self.in_step = False
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
        try:
            return evaluate(self.model, self.test if hasattr(self.test, "test_fine") else {name: self._samples(name) for name in NAMES})
        except FloatingPointError as error:
            raise NonFinite(str(error)) from error

    def _samples(self, name: str) -> SampleSet:
        return self.tests[name] if self.tests else getattr(self.data, name)

    def _note_losses(self, phase: str) -> None:
        for name in NAMES:
            self.losses[f"{self.name}/{self.seed}/{phase}/{name}"] = sample_losses(self.model, self._samples(name)).float()

    # ---- checkpoints ----

    def _keep(self) -> None:
        if self.out is None or not all(torch.isfinite(p).all() for p in self.process.params):
            return  # an older checkpoint is worth more than weights that are lost
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"process.{k}": v for k, v in self.process.state().items()}
        tensors |= {f"losses.{k}": v for k, v in self.losses.items()}
        self.history = _floats(self.history)
        notes = {
            "done": self.process.done, "stopped": self.process.stopped, "seconds": self.seconds, "history": self.history,
            "before": self.before, **self._identity(),
        }  # fmt: skip
        storage.save_tensors(self.out / CHECKPOINT, tensors, {"run": json.dumps(storage.plain(notes))})

    def _identity(self) -> dict:
        """What must agree for a run to be continued."""
        sets: list[SampleSet] = [*(getattr(self.data, name) for name in NAMES), *(self.tests or {}).values()]
        return {
            "method": self.name, "config": storage.plain(to_dict(self.method)), "seed": self.seed,
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


def _floats(rows: list[dict]) -> list[dict]:
    """Numbers out of 0-d tensors, all read at once: the host waits for a device once, not for each; the angle beside the cosine."""
    held: dict[torch.device, list[Tensor]] = {}
    for v in (v for row in rows for v in row.values() if isinstance(v, Tensor)):
        held.setdefault(v.device, []).append(v.detach().double())
    read = {device: iter(torch.stack(found).tolist()) for device, found in held.items()}
    out = [{k: next(read[v.device]) if isinstance(v, Tensor) else v for k, v in row.items()} for row in rows]
    for row in out:
        if row.get("cosine") is not None:
            row["angle_deg"] = math.degrees(math.acos(max(-1.0, min(1.0, row["cosine"]))))
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
