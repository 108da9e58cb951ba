"""What a run leaves: the model, its accuracies, its history; as a line, a table, figures, files."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import report, storage
from .lock import held
from .machine import machine_info

MODEL = "model.safetensors"


@dataclass(repr=False)
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
    history: list[dict]
    losses: dict[str, Tensor]
    facts: dict = field(default_factory=dict)
    task: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)
    run: dict = field(default_factory=dict)

    def __repr__(self) -> str:
        """One line: the method, seconds, accuracies before -> after."""
        def shown(value):
            return f"{value:.1f}" if report.is_number(value) else "-"

        sets = ", ".join(f"{name} {shown(self.before.get(name))} -> {shown(self.after.get(name))} %" for name in report.SETS)
        return f"Result({self.method}, {self.seconds:.1f} s: {sets})"

    def row(self) -> dict:
        """This run as one seed of its method in report.json."""
        return {"seed": self.seed, **self.after, "seconds": self.seconds, "peak_mb": self.peak_mb}

    def report(self) -> dict:
        """What report.json says, but for the figures that were drawn."""
        original = {"seed": self.seed, **self.before, "seconds": None, "peak_mb": None}
        return {
            "methods": {"original": report.aggregate([original]), self.method: report.aggregate([self.row()])},
            "task": self.task, "facts": self.facts, "run": self.run, **machine_info(), "figures": [],
        }

    def save(self, folder, overwrite: bool = False) -> Path:
        """Write report.json, history.csv, losses.safetensors, config.toml, model.safetensors and the figures.

        Raises ValueError for a folder that holds a run, finished or not, without ``overwrite``, and for one that another process
        writes to; CheckpointError where nothing can be written.
        """
        folder = _path(folder)
        with held(folder, "folder"):
            if not overwrite and (there := report.run_in(folder)):
                raise ValueError(f"folder: {folder} holds {there}; give another folder, or overwrite=True to write over it")
            return self._write(folder)

    def _write(self, folder: Path) -> Path:
        """Of `save`, in a folder that is held already."""
        storage.save_tensors(folder / MODEL, self.model.state_dict())
        storage.save_tensors(folder / report.LOSSES, self.losses)
        report.write_history(folder, self.history)
        storage.save_toml(folder / report.CONFIG, self.settings)
        found = self.report()
        storage.save_json(folder / report.REPORT, found)  # the run is finished, even if a figure should fail
        (folder / report.CHECKPOINT).unlink(missing_ok=True)  # of the run that this one was, or is written over
        found["figures"] = [path.name for path in self.plot(folder)]
        storage.save_json(folder / report.REPORT, found)
        return folder

    def plot(self, folder=None) -> dict[str, Any] | list[Path]:
        """The figures that this run has numbers for, saved or not: {name: matplotlib Figure}.

        With a folder they are written there as NAME.png, over what is there, and their paths are returned instead.
        Of loss_distributions, accuracy_over_time, per_class, angle, frontier. Raises CheckpointError where nothing can be written.
        """
        from .figures import run, style  # matplotlib is slow to import

        found = run.drawings(self.report(), self.history, report.keyed_losses(self.losses))
        return style.figures_of(found) if folder is None else style.draw_all(_path(folder), found)

    def summary(self) -> str:
        """The table of ``entangle-fast report`` as plain text: ``print(result.summary())``."""
        from rich.console import Console

        from .report_table import table

        text = io.StringIO()
        table(self.report(), Console(file=text, force_terminal=False, force_jupyter=False, color_system=None))
        return text.getvalue().rstrip()


def _path(folder) -> Path:
    try:
        return Path(folder)
    except TypeError:
        raise TypeError(f"folder: got {type(folder).__name__}; needs a path: a string or a pathlib.Path") from None
