"""What all figures share: colours, fonts, names, and how they become files.

One colour for each set and one for each method, all told apart by colour-blind readers (Okabe-Ito
and Tol's muted scheme); what lies on the page is named where it lies.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..report import is_number
from ..storage import atomic_write

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
INK, FAINT = "#222222", "#8A8A8A"
FLOOR = 1e-4  # nats; losses below are as good as zero and share the first bin
STYLE = {
    "font.size": 9.5, "axes.titlesize": 10.5, "axes.labelsize": 9.5, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": FAINT, "axes.labelcolor": INK,
    "text.color": INK, "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "axes.grid": True, "grid.color": "#E6E6E6", "grid.linewidth": 0.7, "axes.axisbelow": True,
    "axes.titlelocation": "left", "lines.solid_capstyle": "round", "legend.frameon": False, "text.parse_math": False,
}  # fmt: skip


def draw_all(run_dir: Path, drawings: Mapping[str, Callable[[], Any]]) -> list[Path]:
    """NAME.png in `run_dir` for each function that gives a figure; where it gives None the file is removed. Their paths."""
    written = []
    for name, draw in drawings.items():
        path = run_dir / f"{name}.png"
        if content := png(draw):
            written.append(atomic_write(path, content))
        else:
            path.unlink(missing_ok=True)
    return written


def png(draw: Callable[[], Any]) -> bytes | None:
    """The figure that a function gives, in our style whatever the user's is; None where it gives none."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with style():
        if (figure := draw()) is None:
            return None
        page = io.BytesIO()
        FigureCanvasAgg(figure).print_png(page, metadata={"Software": None})
    return page.getvalue()


def figures_of(drawings: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """name → matplotlib Figure of each function that gives one, in our style, to be shown or saved as the caller likes."""
    found = {}
    with style():
        for name, draw in drawings.items():
            if (figure := draw()) is not None:
                figure.draw_without_rendering()  # ticks are made at the first drawing, in the style of that moment
                found[name] = figure
    return found


def style(**more: Any):
    """A context with STYLE and `more` in force, whatever the user's matplotlibrc says."""
    import matplotlib

    backend = {"backend": matplotlib.rcParams["backend"]}
    return matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE, **backend, **more})


def new_figure(width: float, height: float):
    """Of this size in inches, white, axes laid out to fit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.09, h_pad=0.05)  # inches
    return figure


def log_x(ax) -> None:
    """A logarithmic x axis labelled with plain numbers."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    ax.set_xscale("log")
    # plain numbers: the powers of matplotlib need its maths, which class names must not reach
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_locator(NullLocator())


def legend(figure, bars: Sequence[str], lines: Sequence[str]) -> None:
    """Names of the methods in their colours, in one row over the axes."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linestyle="", marker="s", markersize=7, color=colour_of(n, bars), label=title_of(n)) for n in bars
    ]
    handles += [
        Line2D(
            [], [], color=METHOD_COLOURS[n], linewidth=1.3, linestyle=":" if n == "original" else "--", label=title_of(n)
        )
        for n in lines
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), 7), handletextpad=0.4, columnspacing=1.4
    )


def colour_of(name: str, methods: Sequence[str]) -> str:
    """The colour of a method; those without one of their own share a few, by their place among ``methods``."""
    if name in METHOD_COLOURS:
        return METHOD_COLOURS[name]
    others = [n for n in methods if n not in METHOD_COLOURS]
    return SPARE_COLOURS[others.index(name) % len(SPARE_COLOURS)] if name in others else FAINT


def title_of(name: str) -> str:
    """A method's name as it is written."""
    return name.replace("_", " ")


def are_numbers(*values: Any) -> bool:
    return all(map(is_number, values))


def measured(report: Mapping[str, Any]) -> str:
    """The label of an axis of accuracies: of what."""
    where = (report.get("task") or {}).get("measured")
    return f"accuracy of {where}, %" if where else "test accuracy, %"
