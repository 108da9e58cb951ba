"""The figures of a run, of its numbers alone: as they lie in its folder, or in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..report import read_history, read_losses, read_report
from .accuracies import frontier, per_class
from .losses import loss_distributions
from .steps import accuracy_over_time, angle
from .style import draw_all


def drawings(
    report: Mapping[str, Any], history: Sequence[Mapping[str, Any]], losses: Mapping[tuple[str, str, str, str], Any]
) -> dict[str, Callable[[], Any]]:
    """name → a function that draws it, or gives None where there are no numbers for it.

    report, history, losses: as `report.read_report`, `read_history` and `read_losses` give them.
    """
    return {
        "loss_distributions": lambda: loss_distributions(losses, report),
        "accuracy_over_time": lambda: accuracy_over_time(history, report),
        "per_class": lambda: per_class(report),
        "angle": lambda: angle(history),
        "frontier": lambda: frontier(report),
    }


def write_figures(run_dir: str | os.PathLike) -> list[Path]:
    """Draw every figure that the files of `run_dir` have numbers for; the paths of the PNGs written.

    A figure without numbers is removed rather than left over from an earlier run. Raises as `report.read_report`.
    """
    run_dir = Path(run_dir)
    return draw_all(run_dir, drawings(read_report(run_dir), read_history(run_dir), read_losses(run_dir)))
