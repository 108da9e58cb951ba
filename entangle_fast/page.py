"""index.html of a comparison: one file, no network; light and dark; numbers from report.json alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import __version__
from .compare_report import COLUMNS, failures, notes, rows_of, summary
from .figures.compare import front, svgs, variables
from .report import REFERENCES, SETS, shown_classes
from .storage import atomic_write

TEMPLATE = "compare.html.j2"
PAGE = "index.html"
CAPTIONS = {
    "pareto": "Best is the upper left: forgotten, and the neighbours kept. Bars: one standard deviation over seeds.",
    "delay": "Best is the upper right. In the grey band: not back within the attack's steps.",
    **dict.fromkeys(("relearning_sgd", "relearning_adam"), "The mean over seeds of the median run's loss. Where a line falls at once, "
                                                           "the class was hidden, not removed."),
}  # fmt: skip


def write_page(report: Mapping[str, Any], folder: str | os.PathLike) -> Path:
    """Write index.html into `folder`; its path."""
    return atomic_write(Path(folder) / PAGE, render(report).encode())


def render(report: Mapping[str, Any]) -> str:
    """The page of a comparison's report (`compare_report.collect`)."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name(TEMPLATE).read_text(encoding="utf-8"))
    return template.render(
        report=report, task=report["task"], columns=COLUMNS, rows=_rows(report), classes=_classes(report),
        notes=[*notes(report), *report["notes"]], failures=failures(report),
        figures=svgs(report), captions=CAPTIONS, light=variables(False), dark=variables(True), version=__version__,
        title=lambda name: name.replace("_", " "),
        attacks=list(dict.fromkeys(attack for found in report["membership"].values() for attack in found)),
    )  # fmt: skip


def _rows(report: Mapping[str, Any]) -> list[dict]:
    """One table row a method: name, kind of row, and [(sort value, shown, small print)] for each of COLUMNS."""
    best = front(report)
    rows = []
    for name in rows_of(report):
        entry = report["methods"].get(name)
        errors = list(dict.fromkeys(f["error"] for f in report["failed"] if f["method"] == name))
        cells = []
        for column in COLUMNS if entry else ():
            value = entry.get(column.key)
            cells.append((1e9 if isinstance(value, str) else value, *summary(entry, column)))
        rows.append({"name": name, "reference": name in REFERENCES, "front": name in best, "cells": cells, "errors": errors})
    return rows


def _classes(report: Mapping[str, Any]) -> dict[str, Any]:
    """The table of accuracies per class: methods down, classes across."""
    shown, left_out = shown_classes(report, 40)
    measured = {name: report["methods"][name]["per_class"] for name in rows_of(report) if name in report["methods"]}
    rows = [(name, [found.get(c) for _, c in shown]) for name, found in measured.items()]
    spans = [(s, sum(kind == s for kind, _ in shown)) for s in SETS]
    return {"names": [c for _, c in shown], "sets": [s for s, _ in shown], "spans": [(s, n) for s, n in spans if n], "rows": rows,
            "left_out": left_out}  # fmt: skip
