"""The figures of a comparison: what forgetting costs, how deep it goes, how it comes back.

Drawn as PNG files and, for the page, as SVG whose colours are CSS variables.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..report import REFERENCES
from .style import FAINT, FLOOR, MARKERS, METHOD_COLOURS, SPARE_COLOURS, are_numbers, new_figure, style, title_of

COLOURS = (*SPARE_COLOURS, "#E69F00", "#56B4E9", "#D55E00")  # with a marker each: colours come round, pairs do not
SHAPES = ("X", "p", "h", "<", ">", "d", "H", "8", "P")
ROOT = (lambda x: np.sqrt(np.maximum(x, 0)), np.square)  # an axis that has room near 0, where the methods are
STEPS = (lambda x: np.log1p(np.maximum(x, -0.9)), np.expm1)  # a logarithmic axis that shows 0
ON_DARK = {  # colours that a dark page needs lighter
    "#332288": "#A79BFF", "#000000": "#FFFFFF", "#555555": "#B5B5B5", "#117733": "#4CC277", "#882255": "#E07BB0",
    "#AA4499": "#D983CC", "#D55E00": "#FF9147", "#222222": "#E8E8E8", "#8A8A8A": "#8F8F96", "#E6E6E6": "#3A3A42",
    "#FFFFFF": "#1D1D22",
}  # fmt: skip


def drawings(report: Mapping[str, Any]) -> dict[str, Callable[[], Any]]:
    """name → a function that draws it, or gives None where the report has no numbers for it."""
    return {"pareto": lambda: pareto(report), "delay": lambda: delay(report),
            **{f"relearning_{a}": lambda a=a: relearning(report, a) for a in report["curves"]}}


def svgs(report: Mapping[str, Any]) -> dict[str, str]:
    """name → <svg> for a page: no background, colours var(--c…) that `variables` gives for light and dark."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    found = {}
    for name, draw in drawings(report).items():
        with style(**{"svg.hashsalt": name}):  # the same ids at every run
            if (figure := draw()) is None:
                continue
            figure.patch.set_visible(False)
            for ax in figure.axes:
                ax.patch.set_visible(False)
            text = io.StringIO()
            FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        svg = text.getvalue()
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
        svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
        svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', rf'\1 role="img" aria-label="{title_of(name)}"', svg, count=1)
        svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")  # HTML knows both namespaces
        for colour in ON_DARK:
            svg = re.sub(colour, f"var(--c{colour[1:]})", svg, flags=re.I)
        found[name] = svg
    return found


def variables(dark: bool) -> str:
    """CSS declarations of the colours in `svgs`."""
    return "".join(f"--c{light[1:]}:{on_dark if dark else light};" for light, on_dark in ON_DARK.items())


def looks(report: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """name → (colour, marker), each pair once."""
    others = [n for n in report["methods"] if n not in METHOD_COLOURS]
    spare = {n: (COLOURS[i % len(COLOURS)], SHAPES[i % len(SHAPES)]) for i, n in enumerate(others)}
    return {n: spare[n] if n in spare else (METHOD_COLOURS[n], MARKERS[n]) for n in report["methods"]}


def front(report: Mapping[str, Any], x: str = "forget", y: str = "adjacent") -> list[str]:
    """Methods, references aside, that no other method beats in both of two columns (x low, y high), by x."""
    points = {n: (m.get(x), m.get(y)) for n, m in report["methods"].items() if n not in REFERENCES}
    points = {n: p for n, p in points.items() if are_numbers(*p)}

    def beaten(p):
        return any(q[0] <= p[0] and q[1] >= p[1] and q != p for q in points.values())

    return sorted((n for n, p in points.items() if not beaten(p)), key=lambda n: points[n])


def pareto(report: Mapping[str, Any]):
    """Adjacent over forget accuracy (%), with standard deviations and the methods that none beats in both joined."""
    points = {n: (m.get("forget"), m.get("adjacent")) for n, m in report["methods"].items()}
    points = {n: p for n, p in points.items() if are_numbers(*p)}
    if not points:
        return None
    figure, ax = _panel("What forgetting costs the adjacent classes")
    best = [points[n] for n in front(report)]
    if len(best) > 1:
        ax.step(*zip(*best), where="post", color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        ax.text(0.99, 0.02, "dashed: no method is better in both", transform=ax.transAxes, ha="right", color=FAINT, fontsize=8.5)
    low = max(0.0, 10 * math.floor((min(y for _, y in points.values()) - 6) / 10))
    ax.set_ylim(low, 104)
    ax.set_xscale("function", functions=ROOT)
    ax.set_xticks((0, 1, 2, 5, 10, 20, 40, 60, 80, 100))
    ax.set_xlim(0, 104)
    _draw(figure, ax, report, points, "forget", "adjacent")
    ax.set_xlabel("accuracy on the forget set, % (lower is better)")
    ax.set_ylabel("accuracy on the adjacent set, % (higher is better)")
    return figure


def delay(report: Mapping[str, Any], attacker: str = "rcd_sgd"):
    """Mean of adjacent and remote accuracy (%) over the relearning delay (steps, logarithmic)."""
    limit = report["attack_steps"]
    points = {}
    for name, m in report["methods"].items():
        x = m.get(attacker)
        x = 1.5 * limit if isinstance(x, str) else x
        if are_numbers(x, m.get("adjacent"), m.get("remote")):
            points[name] = (x, (m["adjacent"] + m["remote"]) / 2)
    if not points:
        return None
    figure, ax = _panel("How long the forgotten takes to come back")
    ax.set_xscale("function", functions=STEPS)
    ticks = _ticks(limit)
    ax.set_xticks([*ticks, 1.5 * limit], [*map(str, ticks), f">{limit}"])
    ax.set_xlim(-0.15, 2.2 * limit)
    low = max(0.0, 10 * math.floor((min(y for _, y in points.values()) - 6) / 10))
    ax.set_ylim(low, 104)
    ax.axvspan(1.2 * limit, 2.2 * limit, color="#E6E6E6", alpha=0.5, linewidth=0, zorder=0)
    _draw(figure, ax, report, points, attacker, None)
    ax.set_xlabel(f"steps of {attacker.removeprefix('rcd_').upper()} until the forget loss is back (higher is better)")
    ax.set_ylabel("mean of adjacent and remote accuracy, %")
    return figure


def _ticks(limit: int) -> list[int]:
    return [t for t in (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if t <= limit]


def _panel(title: str):
    figure = new_figure(6.4, 5.6)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure, figure.subplots()


def _draw(figure, ax, report: Mapping[str, Any], points: Mapping[str, tuple[float, float]], x: str, y: str | None) -> None:
    """Marks and standard deviations; the names below, since a dozen methods may lie in one corner."""
    look = looks(report)
    for name, point in points.items():
        colour, marker = look[name]
        std = report["methods"][name].get("std") or {}
        spread = [std.get(key) if key else None for key in (x, y)]
        ax.errorbar(*point, xerr=spread[0], yerr=spread[1], color=colour, elinewidth=1, alpha=0.6, zorder=2)
        ax.plot(*point, marker=marker, color=colour, markersize=14 if name == "entangled" else 8.5, markeredgecolor="white",
                markeredgewidth=0.8, zorder=4, clip_on=False, linestyle="none", label=title_of(name))  # fmt: skip
    _names(figure, len(points))


def _names(figure, count: int) -> None:
    figure.legend(loc="outside lower center", ncols=min(count, 4), handletextpad=0.5, columnspacing=1.4, markerscale=0.8)


def relearning(report: Mapping[str, Any], attacker: str):
    """Loss on the forget samples (nats) over one attacker's steps, both logarithmic."""
    curves = report["curves"][attacker]
    if not curves:
        return None
    look = looks(report)
    figure, ax = _panel(f"Relearning by {attacker.upper() if attacker == 'sgd' else attacker.title()}: the forget loss")
    for name, curve in curves.items():
        colour, marker = look[name]
        at = [i for i, step in enumerate(curve["steps"]) if step in _ticks(report["attack_steps"])]
        ax.plot(curve["steps"], [max(v, FLOOR) for v in curve["loss"]], color=colour, marker=marker, markevery=at, markersize=5.5,
                markeredgecolor="white", markeredgewidth=0.5, linewidth=1.8 if name == "entangled" else 1.1,
                label=title_of(name))  # fmt: skip
    ax.set_xscale("function", functions=STEPS)
    ax.set_xticks(_ticks(report["attack_steps"]))
    ax.set_xlim(0, report["attack_steps"] * 1.05)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.yaxis.set_minor_formatter(lambda value, _: "")
    ax.set_xlabel("relearning steps")
    ax.set_ylabel("loss on the forget samples, nats")
    _names(figure, len(curves))
    return figure
