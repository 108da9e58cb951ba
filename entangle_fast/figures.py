"""The figures of a run folder, drawn from its files alone.

One colour for each set and one for each method, all told apart by colour-blind readers (Okabe-Ito
and Tol's muted scheme); what lies on the page is named where it lies.
"""

from __future__ import annotations

import io
import math
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from entangle_fast.report import REFERENCES, SETS, read_history, read_losses, read_report, shown_classes
from entangle_fast.storage import atomic_write

DPI = 150
SET_COLOURS = {"forget": "#D55E00", "adjacent": "#0072B2", "remote": "#009E73"}
METHOD_COLOURS = {
    "original": "#555555", "retrain": "#000000", "entangled": "#332288", "gradient_ascent": "#CC6677",
    "finetune": "#DDAA33", "neggrad": "#44AA99", "random_label": "#AA4499",
}  # fmt: skip
SPARE_COLOURS = ("#88CCEE", "#117733", "#999933", "#882255")
MARKERS = {
    "original": "o", "retrain": "D", "entangled": "*", "gradient_ascent": "v", "finetune": "s", "neggrad": "^",
    "random_label": "P",
}  # fmt: skip
PHASES = {"before": "before", "stage1": "after stage 1", "stage2": "after stage 2", "after": "after"}
INK, FAINT = "#222222", "#8A8A8A"
PLACES = (-16, 16, -30, 30, -44, 44, -58, 58, -72, 72, -86, 86, -100, 100)  # points that a label may stand above its mark
FLOOR = 1e-4  # nats; losses below are as good as zero and share the first bin
STYLE = {
    "font.size": 9.5, "axes.titlesize": 10.5, "axes.labelsize": 9.5, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": FAINT, "axes.labelcolor": INK,
    "text.color": INK, "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "axes.grid": True, "grid.color": "#E6E6E6", "grid.linewidth": 0.7, "axes.axisbelow": True,
    "axes.titlelocation": "left", "lines.solid_capstyle": "round", "legend.frameon": False, "text.parse_math": False,
}  # fmt: skip


def write_figures(run_dir: str | os.PathLike) -> list[Path]:
    """Draw every figure that the files of `run_dir` have numbers for; the paths of the PNGs written.

    loss_distributions, accuracy_over_time, per_class, angle, frontier. A figure without numbers is
    removed rather than left over from an earlier run. Raises as `report.read_report`.
    """
    run_dir = Path(run_dir)
    report, history, losses = read_report(run_dir), read_history(run_dir), read_losses(run_dir)
    return draw_all(run_dir, {
        "loss_distributions": lambda: loss_distributions(losses, report),
        "accuracy_over_time": lambda: accuracy_over_time(history, report),
        "per_class": lambda: per_class(report),
        "angle": lambda: angle(history),
        "frontier": lambda: frontier(report),
    })  # fmt: skip


def draw_all(run_dir: Path, drawings: Mapping[str, Callable[[], Any]]) -> list[Path]:
    """NAME.png in `run_dir` for each function that gives a figure; where it gives None the file is removed. Their paths."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    written = []
    for name, draw in drawings.items():
        path = run_dir / f"{name}.png"
        with style():
            figure = draw()
            if figure is None:
                path.unlink(missing_ok=True)
                continue
            png = io.BytesIO()
            FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
        written.append(atomic_write(path, png.getvalue()))
    return written


def style(**more: Any):
    """A context with STYLE and `more` in force, whatever the user's matplotlibrc says."""
    import matplotlib

    backend = {"backend": matplotlib.rcParams["backend"]}
    return matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE, **backend, **more})


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
    figure = _figure(1.2 + 2.9 * len(phases), 1.3 + 1.45 * len(kinds))
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
            _log_x(ax)
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
    figure.suptitle(f"Per-sample loss, {_title(method)}", x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


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
    figure = _figure(11, 3.9)
    axes = figure.subplots(1, len(SETS), sharex=True, sharey=True)
    for ax, kind in zip(axes, SETS):
        for (name, _), rows in runs.items():
            points = [(r["seconds"], r[f"acc_{kind}"]) for r in rows if r.get(f"acc_{kind}") is not None]
            if not points:
                continue
            x, y = zip(*sorted(points))
            strong = name == "entangled"
            ax.plot(x, y, color=_colour(name, methods), linewidth=1.8 if strong else 1.2,
                    alpha=0.95 if strong else 0.75, zorder=3 if strong else 2)  # fmt: skip
            ax.plot(x[-1], y[-1], MARKERS.get(name, "o"), color=_colour(name, methods), markersize=8 if strong else 5,
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
            _log_x(ax)
    axes[0].set_ylabel(_measured(report))
    axes[1].set_xlabel(f"seconds of unlearning{' (log scale)' if log else ''}")
    seeds = len({seed for _, seed in runs})
    _legend(figure, methods, [n for n in REFERENCES if n in report["methods"]])
    title = "Accuracy while unlearning" + (f", {seeds} seeds" if seeds > 1 else "")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


def per_class(report: Mapping[str, Any]):
    """Grouped bars of test accuracy (%) per class, a bar per method; None without classes."""
    classes, left_out = shown_classes(report, 20)
    methods = [n for n, m in report["methods"].items() if m["per_class"]]
    bars = [n for n in methods if n not in REFERENCES] or methods
    if not classes:
        return None
    marks = [n for n in methods if n not in bars]
    figure = _figure(max(6.5, 2.2 + len(classes) * (0.28 + 0.13 * len(bars))), 4.1)
    ax = figure.subplots()
    width = 0.84 / len(bars)
    # a gap between sets
    steps = [0.0] + [1.45 if a[0] != b[0] else 1.0 for a, b in zip(classes, classes[1:])]
    x = np.cumsum(steps)
    for i, name in enumerate(bars):
        heights = [_percent(report["methods"][name]["per_class"].get(c)) for _, c in classes]
        ax.bar(x + (i - (len(bars) - 1) / 2) * width, heights, width * 0.92, color=_colour(name, methods))
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
    ax.set_ylabel(_measured(report))
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
    _legend(figure, bars, marks)
    figure.suptitle("Accuracy per class", x=0.01, ha="left", fontsize=12, fontweight="bold")
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

    figure = _figure(7, 3.6)
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


def frontier(report: Mapping[str, Any]):
    """Adjacent over forget accuracy (%): seeds small, means large; None without both numbers."""
    means = {n: (m.get("forget"), m.get("adjacent")) for n, m in report["methods"].items()}
    means = {n: (float(x), float(y)) for n, (x, y) in means.items() if _both(x, y)}
    if not means:
        return None
    methods = list(report["methods"])
    seeds = {
        n: [
            (s["forget"], s["adjacent"])
            for s in report["methods"][n]["seeds"]
            if _both(s.get("forget"), s.get("adjacent"))
        ]
        for n in means
    }
    figure = _figure(6.4, 4.8)
    ax = figure.subplots()
    everything = np.array([*means.values(), *(p for points in seeds.values() for p in points)], dtype=float)
    low = max(0.0, 10 * math.floor((everything[:, 1].min() - 6) / 10))
    ax.set_ylim(low, 103)
    ax.set_xlim(-4, 119)  # room for names to the right of 100
    ax.set_xticks(range(0, 101, 20))
    for name, (x, y) in means.items():
        colour = _colour(name, methods)
        for sx, sy in seeds[name]:
            ax.plot([x, sx], [y, sy], color=colour, linewidth=0.7, alpha=0.45, zorder=2)
            ax.plot(sx, sy, MARKERS.get(name, "o"), color=colour, markersize=4, alpha=0.5, markeredgewidth=0, zorder=2)
        ax.plot(x, y, MARKERS.get(name, "o"), color=colour, markersize=15 if name == "entangled" else 9,
                markeredgecolor="white", markeredgewidth=0.8, zorder=4)  # fmt: skip
    figure.draw_without_rendering()  # labels are placed in points, once the axes have their size
    for name, point, (dx, dy, align) in _place_labels(ax, means):
        leader = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 5} if dy else None
        ax.annotate(_title(name), point, xytext=(dx, dy), textcoords="offset points", ha=align, va="center", zorder=5,
                    color=_colour(name, methods), fontweight="bold" if name == "entangled" else "normal",
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
        width = 5.8 * len(_title(name)) * (1.12 if name == "entangled" else 1)
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


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.09, h_pad=0.05)  # inches
    return figure


def _log_x(ax) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    ax.set_xscale("log")
    # plain numbers: the powers of matplotlib need its maths, which class names must not reach
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_locator(NullLocator())


def _legend(figure, bars: Sequence[str], lines: Sequence[str]) -> None:
    """Names of the methods in their colours, in one row over the axes."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linestyle="", marker="s", markersize=7, color=_colour(n, bars), label=_title(n)) for n in bars
    ]
    handles += [
        Line2D(
            [], [], color=METHOD_COLOURS[n], linewidth=1.3, linestyle=":" if n == "original" else "--", label=_title(n)
        )
        for n in lines
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), 7), handletextpad=0.4, columnspacing=1.4
    )


def _colour(name: str, methods: Sequence[str]) -> str:
    if name in METHOD_COLOURS:
        return METHOD_COLOURS[name]
    others = [n for n in methods if n not in METHOD_COLOURS]
    return SPARE_COLOURS[others.index(name) % len(SPARE_COLOURS)] if name in others else FAINT


def _title(name: str) -> str:
    return name.replace("_", " ")


def _nats(value: float) -> str:
    return f"≤ {FLOOR:g}" if value <= FLOOR else f"{value:.2g}"


def _percent(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _both(*values: Any) -> bool:
    return all(isinstance(v, (int, float)) and math.isfinite(v) for v in values)


def _measured(report: Mapping[str, Any]) -> str:
    where = (report.get("task") or {}).get("measured")
    return f"accuracy of {where}, %" if where else "test accuracy, %"


def _outputs(report: Mapping[str, Any]) -> int | None:
    """Number of outputs of the model: task.num_classes, or the classes where labels are fine."""
    task = report.get("task") or {}
    if isinstance(task.get("num_classes"), int) and task["num_classes"] > 1:
        return task["num_classes"]
    if task.get("labels") == "super":  # the classes listed are finer than the outputs
        return None
    return sum(len(v) for v in (task.get("classes") or {}).values()) or None
