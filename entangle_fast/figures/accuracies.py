"""Accuracies at the end: class by class, and what forgetting costs the adjacent set."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..report import REFERENCES, SETS, shown_classes
from .style import FAINT, MARKERS, METHOD_COLOURS, SET_COLOURS, are_numbers, colour_of, legend, measured, new_figure, title_of

PLACES = (-16, 16, -30, 30, -44, 44, -58, 58, -72, 72, -86, 86, -100, 100)  # points that a label may stand above its mark


def per_class(report: Mapping[str, Any]):
    """Grouped bars of test accuracy (%) per class, a bar per method; None without classes."""
    classes, left_out = shown_classes(report, 20)
    methods = [n for n, m in report["methods"].items() if m["per_class"]]
    bars = [n for n in methods if n not in REFERENCES] or methods
    if not classes:
        return None
    marks = [n for n in methods if n not in bars]
    figure = new_figure(max(6.5, 2.2 + len(classes) * (0.28 + 0.13 * len(bars))), 4.1)
    ax = figure.subplots()
    width = 0.84 / len(bars)
    # a gap between sets
    steps = [0.0] + [1.45 if a[0] != b[0] else 1.0 for a, b in zip(classes, classes[1:])]
    x = np.cumsum(steps)
    for i, name in enumerate(bars):
        heights = [_percent(report["methods"][name]["per_class"].get(c)) for _, c in classes]
        ax.bar(x + (i - (len(bars) - 1) / 2) * width, heights, width * 0.92, color=colour_of(name, methods))
    for name in marks:
        values = np.array([_percent(report["methods"][name]["per_class"].get(c)) for _, c in classes])
        ax.hlines(values, x - 0.45, x + 0.45, color=METHOD_COLOURS[name], linewidth=1.3,
                  linestyle=(0, (1, 1.2)) if name == "original" else (0, (4, 2)), zorder=3)  # fmt: skip
    long = max(len(c) for _, c in classes) > 9 or len(classes) > 12
    ax.set_xticks(x, [c for _, c in classes], rotation=35 if long else 0, ha="right" if long else "center",
                  rotation_mode="anchor" if long else "default")  # fmt: skip
    ax.tick_params(axis="x", length=0)
    ax.set_xlim(x[0] - 0.6, x[-1] + 0.6)
    ax.set_ylim(0, 102)
    ax.set_ylabel(measured(report))
    ax.grid(axis="x", visible=False)
    for kind in SETS:
        where = x[[i for i, (s, _) in enumerate(classes) if s == kind]]
        if where.size:
            across = ax.get_xaxis_transform()
            ax.plot([where[0] - 0.45, where[-1] + 0.45], [1.02, 1.02], color=SET_COLOURS[kind], linewidth=2.5,
                    transform=across, clip_on=False, solid_capstyle="butt")  # fmt: skip
            ax.text(where.mean(), 1.035, kind, color=SET_COLOURS[kind], ha="center", va="bottom", transform=across,
                    fontweight="bold")  # fmt: skip
    if left_out:
        figure.text(0.995, 0.005, f"{left_out} retained classes that lost less are not shown", ha="right", va="bottom",
                    fontsize=8, color=FAINT)  # fmt: skip
    legend(figure, bars, marks)
    figure.suptitle("Accuracy per class", x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


def frontier(report: Mapping[str, Any]):
    """Adjacent over forget accuracy (%): seeds small, means large; None without both numbers."""
    means = {n: (m.get("forget"), m.get("adjacent")) for n, m in report["methods"].items()}
    means = {n: (float(x), float(y)) for n, (x, y) in means.items() if are_numbers(x, y)}
    if not means:
        return None
    methods = list(report["methods"])
    seeds = {
        n: [
            (s["forget"], s["adjacent"])
            for s in report["methods"][n]["seeds"]
            if are_numbers(s.get("forget"), s.get("adjacent"))
        ]
        for n in means
    }
    figure = new_figure(6.4, 4.8)
    ax = figure.subplots()
    everything = np.array([*means.values(), *(p for points in seeds.values() for p in points)], dtype=float)
    low = max(0.0, 10 * math.floor((everything[:, 1].min() - 6) / 10))
    ax.set_ylim(low, 103)
    ax.set_xlim(-4, 119)  # room for names to the right of 100
    ax.set_xticks(range(0, 101, 20))
    for name, (x, y) in means.items():
        colour = colour_of(name, methods)
        for sx, sy in seeds[name]:
            ax.plot([x, sx], [y, sy], color=colour, linewidth=0.7, alpha=0.45, zorder=2)
            ax.plot(sx, sy, MARKERS.get(name, "o"), color=colour, markersize=4, alpha=0.5, markeredgewidth=0, zorder=2)
        ax.plot(x, y, MARKERS.get(name, "o"), color=colour, markersize=15 if name == "entangled" else 9,
                markeredgecolor="white", markeredgewidth=0.8, zorder=4)  # fmt: skip
    figure.draw_without_rendering()  # labels are placed in points, once the axes have their size
    for name, point, (dx, dy, align) in _place_labels(ax, means):
        leader = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 5} if dy else None
        ax.annotate(title_of(name), point, xytext=(dx, dy), textcoords="offset points", ha=align, va="center", zorder=5,
                    color=colour_of(name, methods), fontweight="bold" if name == "entangled" else "normal",
                    arrowprops=leader)  # fmt: skip
    ax.annotate("better", (0.86, 0.16), xytext=(0.97, 0.05), xycoords="axes fraction", color=FAINT, ha="right",
                va="center", arrowprops={"arrowstyle": "->", "color": FAINT})  # fmt: skip
    ax.set_xlabel("accuracy on the forget set, % (lower is better)")
    ax.set_ylabel("accuracy on the adjacent set, % (higher is better)")
    figure.suptitle("What forgetting costs the adjacent classes", x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


def _place_labels(ax, means: Mapping[str, tuple[float, float]]):
    """(name, point, (dx, dy, align)): the nearest place beside each point where its label hits nothing.

    Offsets in points; a label is taken as 5.8 points a letter, 12 high.
    """
    scale = 72 / ax.figure.dpi
    at = {name: ax.transData.transform(point) * scale for name, point in means.items()}
    left, right, low, high = (v * scale for v in (ax.bbox.x0, ax.bbox.x1, ax.bbox.y0, ax.bbox.y1))
    taken = [(x - 9, x + 9, y - 7, y + 7) for x, y in at.values()]
    places = [(11, 0), (-11, 0)]
    places += [(side * (4 + abs(dy) / 3), dy) for dy in PLACES for side in (1, -1)]
    for name in sorted(means, key=lambda n: -at[n][0]):
        x, y = at[name]
        width = 5.8 * len(title_of(name)) * (1.12 if name == "entangled" else 1)
        for dx, dy in places:
            start = x + dx if dx > 0 else x + dx - width
            spot = (start, start + width, y + dy - 6, y + dy + 6)
            inside = spot[0] > left and spot[1] < right and spot[2] > low and spot[3] < high
            if inside and not any(_overlap(spot, other) for other in taken):
                break
        taken.append(spot)
        yield name, means[name], (dx, dy, "left" if dx > 0 else "right")


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]


def _percent(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan
