"""The figure of a relearning attack: the forget loss coming back, and after how many steps.

Drawn from `metrics.Relearning` objects, or from their ``summary()`` as read back from JSON: the same picture.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..storage import atomic_write
from .style import FAINT, INK, colour_of, new_figure, png, title_of


def relearning_figure(results: Mapping[str, Any]):
    """Left: L_f(θ_t) over steps, the median over seeds and its quartiles. Right: the delay of each seed, and the estimate.

    results: method name → `metrics.Relearning` or its summary (null, inf: not recovered), all of one recipe.
    Returns a matplotlib Figure. Raises ValueError without results, or for results of different attackers or steps.
    """
    from matplotlib.ticker import FuncFormatter, NullLocator

    found = {name: r if isinstance(r, Mapping) else r.summary() for name, r in results.items()}
    if not found:
        raise ValueError("results: got none; needs at least one method's Relearning")
    if len({(s["attacker"], s["steps"], s["tolerance"]) for s in found.values()}) > 1:
        raise ValueError("results: attackers, steps or tolerances differ; draw one figure for each")
    methods, one = list(found), next(iter(found.values()))
    last, goal = one["steps"], one["original_loss"] + one["tolerance"]
    figure = new_figure(10.5, 1.6 + max(2.4, 0.42 * len(methods)))
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    for name, s in found.items():
        curve, colour = s["curve"], colour_of(name, methods)
        left.fill_between(curve["steps"], curve["low"], curve["high"], color=colour, alpha=0.2, linewidth=0)
        left.plot(curve["steps"], curve["median"], color=colour, linewidth=2 if name == "entangled" else 1.4)
    left.axhline(goal, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    left.text(last, goal, f"original + {one['tolerance']:g}", ha="right", va="bottom", fontsize=8)
    left.set_yscale("log")  # on a linear axis every curve reaches the goal at once
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    left.yaxis.set_minor_locator(NullLocator())
    left.set(xlim=(0, last), xlabel=f"relearning steps, {one['attacker']}, lr {one['lr']:g}", ylabel="forget loss, nats (log scale)")
    left.set_ylim(goal / 8, 1.3 * max(goal, *(max(s["curve"]["high"]) for s in found.values())))

    never = 1.08 * last  # the column of seeds that did not recover
    for row, (name, s) in enumerate(found.items()):
        colour = colour_of(name, methods)
        delays = np.array([never if d is None or math.isinf(d) else d for d in s["delays"]])
        spread = 0.16 * np.linspace(-1, 1, len(delays)) if len(delays) > 1 else np.zeros(1)
        right.plot(np.sort(delays), row + spread, "o", color=colour, markersize=4.5, alpha=0.75, markeredgewidth=0, clip_on=False)
        middle = s["median"]
        said = f"> {last}" if middle is None or math.isinf(middle) else f"{middle:g}"
        right.text(1.02, row, said, color=colour, va="center", fontweight="bold", transform=right.get_yaxis_transform())
        estimate = s["estimate"]
        if estimate is not None and math.isfinite(estimate) and estimate <= last:
            right.plot(estimate, row, "|", color=INK, markersize=14, markeredgewidth=1.3)
    right.axvline(last, color=FAINT, linewidth=0.8)
    right.set_xlim(0, 1.13 * last)
    ticks = [t for t in right.get_xticks() if 0 <= t < 0.97 * last]
    right.set_xticks([*ticks, never], [*(f"{t:g}" for t in ticks), f"> {last}"])
    right.set_yticks(range(len(methods)), [title_of(n) for n in methods])
    for label, name in zip(right.get_yticklabels(), methods):
        label.set_color(colour_of(name, methods))
    right.set(ylim=(len(methods) - 0.5, -0.5), xlabel="steps until relearned: dots seeds, right the median")
    right.grid(axis="y", visible=False)
    if any(s["estimate"] is not None and math.isfinite(s["estimate"]) and s["estimate"] <= last for s in found.values()):
        right.set_title("black bar: closed-form estimate", loc="right", fontsize=8.5, color=FAINT)
    seeds = one["seeds"]
    figure.suptitle(f"Relearning the forget set, {seeds} seed{'s' if seeds > 1 else ''}", x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


def write_relearning(path: str | os.PathLike, results: Mapping[str, Any]) -> Path:
    """Draw `relearning_figure` into a PNG at ``path``; returns the path."""
    return atomic_write(path, png(lambda: relearning_figure(results)))
