"""How per-sample losses are spread, set by set, before and after."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..report import SETS
from .style import FAINT, FLOOR, INK, SET_COLOURS, log_x, new_figure, title_of

PHASES = {"before": "before", "stage1": "after stage 1", "stage2": "after stage 2", "after": "after"}


def loss_distributions(losses: Mapping[tuple[str, str, str, str], Any], report: Mapping[str, Any]):
    """Sets down, phases across: share of samples over per-sample loss; None without losses."""
    methods = list(dict.fromkeys(key[0] for key in losses))
    if not methods:
        return None
    method = "entangled" if "entangled" in methods else methods[0]
    pooled: dict[tuple[str, str], list[np.ndarray]] = defaultdict(list)
    for (name, _, phase, kind), tensor in losses.items():
        if name == method and phase in PHASES and kind in SETS:
            values = tensor.numpy()
            pooled[phase, kind].append(values[np.isfinite(values)])
    samples = {key: np.maximum(np.concatenate(parts), FLOOR) for key, parts in pooled.items()}
    samples = {key: values for key, values in samples.items() if values.size}
    phases = [p for p in PHASES if any(key[0] == p for key in samples)]
    kinds = [s for s in SETS if any(key[1] == s for key in samples)]
    if not samples:
        return None

    top = max(10.0, max(v.max() for v in samples.values()))
    edges = np.geomspace(FLOOR, top * 1.05, 46)
    shares = {key: 100 * np.histogram(v, edges)[0] / v.size for key, v in samples.items()}
    figure = new_figure(1.2 + 2.9 * len(phases), 1.3 + 1.45 * len(kinds))
    axes = figure.subplots(len(kinds), len(phases), sharex=True, sharey="row", squeeze=False)
    outputs = _outputs(report)
    for row, kind in enumerate(kinds):
        for column, phase in enumerate(phases):
            ax = axes[row][column]
            colour = SET_COLOURS[kind]
            if column and (phases[0], kind) in shares:
                ax.stairs(shares[phases[0], kind], edges, color=FAINT, linewidth=0.9)
            if (phase, kind) in shares:
                ax.stairs(shares[phase, kind], edges, fill=True, color=colour, alpha=0.85, linewidth=0)
                median = float(np.median(samples[phase, kind]))
                ax.text(
                    0.03, 0.93, f"median {_nats(median)}", transform=ax.transAxes, va="top", fontsize=8.5, color=colour
                )
            if outputs:
                ax.axvline(math.log(outputs), color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
            if row == 0:
                ax.set_title(PHASES[phase])
            log_x(ax)
            ax.set_xlim(FLOOR, edges[-1])
            ax.grid(axis="y", visible=False)
        axes[row][0].set_ylabel(f"{kind}\n% of samples", color=SET_COLOURS[kind])
        # room for the median line over the tallest bar
        tallest = max(s.max() for (_, k), s in shares.items() if k == kind)
        axes[row][0].set_ylim(0, 1.25 * tallest or 1)
    if outputs:
        axes[0][0].text(
            math.log(outputs) * 0.85, 0.72, f"log {outputs}\n= guessing", transform=axes[0][0].get_xaxis_transform(),
            ha="right", va="top", fontsize=8, color=INK,
        )  # fmt: skip
    if len(phases) > 1:
        figure.text(
            0.995, 0.005, f"grey outline: {PHASES[phases[0]]}", ha="right", va="bottom", fontsize=8, color=FAINT
        )
    axes[-1][len(phases) // 2].set_xlabel(f"loss of a sample, nats (log scale; the first bin holds all ≤ {FLOOR:g})")
    figure.suptitle(f"Per-sample loss, {title_of(method)}", x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


def _nats(value: float) -> str:
    return f"≤ {FLOOR:g}" if value <= FLOOR else f"{value:.2g}"


def _outputs(report: Mapping[str, Any]) -> int | None:
    """Number of outputs of the model: task.num_classes, or the classes where labels are fine."""
    task = report.get("task") or {}
    if isinstance(task.get("num_classes"), int) and task["num_classes"] > 1:
        return task["num_classes"]
    if task.get("labels") == "super":  # the classes listed are finer than the outputs
        return None
    return sum(len(v) for v in (task.get("classes") or {}).values()) or None
