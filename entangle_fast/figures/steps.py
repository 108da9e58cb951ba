"""What happens over the steps of a run: accuracies over time, the angle between the directions of stage 2."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..report import REFERENCES, SETS
from .style import FAINT, INK, MARKERS, METHOD_COLOURS, SET_COLOURS, colour_of, legend, log_x, measured, new_figure


def accuracy_over_time(history: Sequence[Mapping[str, Any]], report: Mapping[str, Any]):
    """Accuracy of each set (%) over wall-clock seconds, a line per method and seed; None without any."""
    runs: dict[tuple[str, Any], list[Mapping[str, Any]]] = defaultdict(list)
    for row in history:
        if row.get("seconds") is not None and any(row.get(f"acc_{s}") is not None for s in SETS):
            runs[str(row.get("method")), row.get("seed")].append(row)
    if not runs:
        return None
    methods = list(dict.fromkeys(name for name, _ in runs))
    ends = [max(row["seconds"] for row in rows) for rows in runs.values()]
    log = max(ends) > 20 * max(min(ends), 1e-3)
    figure = new_figure(11, 3.9)
    axes = figure.subplots(1, len(SETS), sharex=True, sharey=True)
    for ax, kind in zip(axes, SETS):
        for (name, _), rows in runs.items():
            points = [(r["seconds"], r[f"acc_{kind}"]) for r in rows if r.get(f"acc_{kind}") is not None]
            if not points:
                continue
            x, y = zip(*sorted(points))
            strong = name == "entangled"
            ax.plot(x, y, color=colour_of(name, methods), linewidth=1.8 if strong else 1.2,
                    alpha=0.95 if strong else 0.75, zorder=3 if strong else 2)  # fmt: skip
            ax.plot(x[-1], y[-1], MARKERS.get(name, "o"), color=colour_of(name, methods), markersize=8 if strong else 5,
                    markeredgecolor="white", markeredgewidth=0.6, zorder=4, clip_on=False)  # fmt: skip
        for name in REFERENCES:
            value = report["methods"].get(name, {}).get(kind)
            if isinstance(value, (int, float)):
                ax.axhline(
                    value,
                    color=METHOD_COLOURS[name],
                    linewidth=0.9,
                    linestyle=(0, (1, 2) if name == "original" else (4, 3)),
                )
        better = "lower is better" if kind == "forget" else "higher is better"
        ax.set_title(kind, color=SET_COLOURS[kind], fontweight="bold")
        ax.set_title(better, loc="right", fontsize=8.5, color=FAINT)
        ax.set_ylim(0, 102)
        ax.grid(axis="x", visible=False)
        if log:
            log_x(ax)
    axes[0].set_ylabel(measured(report))
    axes[1].set_xlabel(f"seconds of unlearning{' (log scale)' if log else ''}")
    seeds = len({seed for _, seed in runs})
    legend(figure, methods, [n for n in REFERENCES if n in report["methods"]])
    title = "Accuracy while unlearning" + (f", {seeds} seeds" if seeds > 1 else "")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


def angle(history: Sequence[Mapping[str, Any]]):
    """Angle (degrees) between the two projected directions over the steps of stage 2; None without any."""
    series: dict[tuple[str, Any], list[tuple[float, float]]] = defaultdict(list)
    for row in history:
        degrees, cosine = row.get("angle_deg"), row.get("cosine")
        if degrees is None and cosine is not None:
            degrees = math.degrees(math.acos(min(1.0, max(-1.0, cosine))))
        if degrees is not None and math.isfinite(degrees) and row.get("step") is not None:
            series[str(row.get("method")), row.get("seed")].append((row["step"], degrees))
    if not series:
        return None
    method = "entangled" if any(name == "entangled" for name, _ in series) else next(iter(series))[0]
    seeds = [sorted(points) for (name, _), points in series.items() if name == method]
    by_step: dict[float, list[float]] = defaultdict(list)
    for points in seeds:
        for step, degrees in points:
            by_step[step].append(degrees)
    steps = np.array(sorted(by_step))
    mean = np.array([np.mean(by_step[s]) for s in steps])
    window = max(1, len(steps) // 25)
    kernel = np.ones(window)
    smooth = np.convolve(mean, kernel, "same") / np.convolve(np.ones_like(mean), kernel, "same")

    figure = new_figure(7, 3.6)
    ax = figure.subplots()
    for points in seeds:
        ax.plot(*zip(*points), color=METHOD_COLOURS["entangled"], alpha=0.3, linewidth=0.8)
    ax.plot(steps, smooth, color=METHOD_COLOURS["entangled"], linewidth=2.2)
    ax.axhline(90, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    every = np.array([d for points in seeds for _, d in points])
    low, high = min(every.min(), 90.0), max(every.max(), 90.0)
    pad = max(4.0, 0.12 * (high - low))
    low, high = max(0.0, low - pad), min(180.0, high + pad)
    ax.set_ylim(low, high)
    ax.set_yticks([t for t in range(0, 181, 15 if high - low < 100 else 30) if low <= t <= high])
    ax.set_xlim(steps[0] - 0.5, steps[-1] + 0.02 * (steps[-1] - steps[0]) + 0.5)
    label = f"mean of {len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    if window > 1:
        label += f", smoothed over {window} steps"
    ax.text(
        1, 1, label, transform=ax.transAxes, ha="right", va="top", color=METHOD_COLOURS["entangled"], fontweight="bold"
    )
    if len(seeds) > 1:
        ax.text(1, 0.93, "thin: each seed", transform=ax.transAxes, ha="right", va="top", color=FAINT, fontsize=8.5)
    ax.text(steps[0], 90 + 0.015 * (high - low), "orthogonal", fontsize=8.5, va="bottom",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.8})  # fmt: skip
    ax.set_xlabel("step")
    ax.set_ylabel("angle, degrees")
    ax.grid(axis="x", visible=False)
    figure.suptitle(
        "Angle between the forget and the remote direction", x=0.01, ha="left", fontsize=12, fontweight="bold"
    )
    return figure
