"""The figures of a results folder, drawn from its JSON alone.

    python bench/figures.py bench/results/<machine>

    default.json, huge_pages.json   jobs × providers relative to ours   → models_*.png, operations_*.png
    slopes.json                     cost against size, theory dashed    → slopes.png
    routes.json                     the Gram's routes and the choice    → routes.png
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from bench_routes import LATE
from report import ms, title

from entangle_fast.figures.style import FAINT, INK, METHOD_COLOURS, SPARE_COLOURS, draw_all, log_x, new_figure

OURS = METHOD_COLOURS["entangled"]
COLOURS = {
    "ours": OURS, "vmap": "#CC6677", "vmap_qr": "#CC6677", "opacus": "#DDAA33", "torchjd": "#44AA99", "backpack": "#AA4499",
    "ghost": "#999933", "compile": "#882255", "autograd_loop": "#88CCEE", "loop_qr": "#88CCEE", "authors": "#D55E00",
    "torch": "#117733", "reference": "#88CCEE", "einsum": "#DDAA33", "bmm": "#DDAA33", "index_add": "#DDAA33", "loop": "#DDAA33",
    "foreach": "#DDAA33", "pot": "#44AA99", "geomloss": "#AA4499",
}  # fmt: skip
FLOORS = {"plain": ("-", "plain forward + backward"), "capture_only": (":", "capture alone")}
PAGES = {"default": "default pages", "huge_pages": "huge pages"}
PANELS = {"small_mlp": "Gram over n: MLP", "small_cnn": "Gram over n: CNN", "parameters": "over P"}


def write_figures(folder: Path) -> list[Path]:
    """Every figure that the files have numbers for; the paths of the PNGs."""
    drawings: dict[str, Callable[[], Any]] = {}
    for pages, words in PAGES.items():
        run = _read(folder / f"{pages}.json")
        rows = [b["extra_info"] for b in run.get("benchmarks", ()) if b.get("extra_info")]
        for kind, whole in (("models", True), ("operations", False)):
            chosen = [r for r in rows if ("model" in r["shape"]) == whole]
            heading = f"{kind.capitalize()}, {words}: time relative to ours"
            drawings[f"{kind}_{pages}"] = lambda rows=chosen, text=heading, run=run: providers(rows, text, _where(run))
    drawings["slopes"] = lambda: slopes(_read(folder / "slopes.json"))
    drawings["routes"] = lambda: routes(_read(folder / "routes.json"))
    return draw_all(folder, drawings)


def _read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def _where(run: dict) -> str:
    m = run.get("machine_info", {}).get("bench", {})
    return ", ".join(str(x) for x in (m.get("cpu"), f"{m.get('threads')} threads", f"torch {m.get('torch')}", m.get("commit")) if x)


def providers(rows: list[dict], heading: str, where: str):
    """One band a job: a bar for each peer from ours (1) to its ratio, floors as marks. None without rows."""
    jobs = [(name, list(group)) for name, group in groupby(rows, key=title)]
    jobs = [(name, group) for name, group in jobs if any(r["provider"] == "ours" for r in group)]
    if not jobs:
        return None
    height = [max(1, sum(r["provider"] in COLOURS and r["provider"] != "ours" for r in group)) + 0.8 for _, group in jobs]
    columns = 2 if len(jobs) > 12 else 1
    total, parts = sum(height) / columns, [[] for _ in range(columns)]
    done = 0.0
    for job, h in zip(jobs, height):
        parts[min(columns - 1, int(done / total))].append((job, h))
        done += h
    tallest = max(sum(h for _, h in part) for part in parts)
    figure = new_figure(6.9 * columns, 1.4 + 0.155 * tallest)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax, part in zip(axes, parts):
        _bands(ax, part, tallest)
        ax.set_xlabel("× ours; to the right: slower than ours")
    axes[0].set_title(where, fontsize=8.5)
    _provider_legend(figure, {r["provider"] for _, group in jobs for r in group})
    figure.suptitle(heading, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


def _bands(ax, part, tallest: float) -> None:
    y, labels = 0.0, []
    ratios = [r["ratio"] for (_, group), _ in part for r in group if r["ratio"]]
    low, high = min([0.5, *ratios]), max([2.0, *ratios])
    for (name, group), h in part:
        mine = next(r for r in group if r["provider"] == "ours")
        labels.append((y + (h - 0.8) / 2 - 0.5, f"{name}\n{ms(mine['median']).strip()}"))
        at = y
        for r in group:
            if r["provider"] not in COLOURS or r["provider"] == "ours":
                continue
            if r["ratio"]:
                left, width = min(1, r["ratio"]), abs(r["ratio"] - 1)
                ax.barh(at, width, left=left, height=0.86, color=COLOURS[r["provider"]], linewidth=0)
                ax.annotate(f"{r['ratio']:.3g}", (max(1, r["ratio"]), at), xytext=(3, 0), textcoords="offset points", va="center",
                            fontsize=6.5, color=INK)  # fmt: skip
            else:
                ax.annotate(f"{r['provider']}: {r['verdict']}", (1, at), xytext=(3, 0), textcoords="offset points", va="center",
                            fontsize=6.5, color=FAINT)  # fmt: skip
            at += 1
        for r in group:
            if r["provider"] in FLOORS and r["ratio"]:
                ax.plot([r["ratio"]] * 2, [y - 0.5, y + h - 1.3], color=INK, linewidth=1.4, zorder=4,
                        linestyle=FLOORS[r["provider"]][0])  # fmt: skip
        y += h
    ax.axvline(1, color=OURS, linewidth=1.4)
    log_x(ax)
    ax.set_xlim(low / 1.3, high * 1.6)
    ax.set_ylim(tallest - 0.6, -0.8)
    ax.set_yticks([at for at, _ in labels], [text for _, text in labels], fontsize=6.8)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)


def _provider_legend(figure, names: set[str]) -> None:
    from matplotlib.lines import Line2D

    patches: dict[str, list[str]] = {}
    for name in [n for n in COLOURS if n in names and n != "ours"]:
        patches.setdefault(COLOURS[name], []).append(name)
    handles = [Line2D([], [], color=OURS, linewidth=1.4, label="ours")]
    handles += [Line2D([], [], linestyle="", marker="s", markersize=7, color=c, label=" / ".join(who)) for c, who in patches.items()]
    handles += [Line2D([], [], color=INK, linewidth=1.4, linestyle=s, label=text) for n, (s, text) in FLOORS.items() if n in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), fontsize=8, handletextpad=0.4)


def slopes(run: dict):
    """A panel for each axis: measured points, the counted work through their upper half dashed. None without numbers."""
    found = run.get("slopes")
    if not found:
        return None
    panels = list(dict.fromkeys(s["panel"] for s in found))
    figure = new_figure(1 + 3.7 * len(panels), 4.3)
    for ax, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for s, colour in zip([s for s in found if s["panel"] == panel], (OURS, SPARE_COLOURS[1], "#CC6677", FAINT)):
            half = len(s["x"]) // 2
            scale = geometric_mean([t / w for t, w in zip(s["seconds"][half:], s["work"][half:])])
            label = f"{s['name']}: slope {s['slope']:.2f}, theory {s['theory']:.2f}"
            ax.plot(s["x"], s["seconds"], marker="o", markersize=3.5, linewidth=1.3, color=colour, label=label)
            ax.plot(s["x"], [scale * w for w in s["work"]], linestyle="--", linewidth=0.9, color=colour)
        log_x(ax)
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(lambda value, _: ms(value).strip() if value < 1 else f"{value:g}s")
        ax.set_title(PANELS.get(panel, panel))
        ax.set_xlabel({"n": "samples n", "P": "parameters P"}[found[[s["panel"] for s in found].index(panel)]["axis"]])
        ax.legend(fontsize=7.5, loc="upper left")
    figure.suptitle("Cost against size (dashed: counted work)", x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.supxlabel(_where(run), fontsize=8.5, color=INK)
    return figure


def routes(run: dict):
    """Time of both contractions over t, for each n and layer; the choice of the cost model ringed. None without numbers."""
    found = run.get("routes")
    if not found:
        return None
    sizes = sorted({p["n"] for p in found})
    layers = list(dict.fromkeys((p["d_in"], p["d_out"]) for p in found))
    figure = new_figure(1 + 2.5 * len(layers), 1.1 + 1.9 * len(sizes))
    axes = figure.subplots(len(sizes), len(layers), squeeze=False, sharex=True)
    colours = {"pairs": OURS, "tiles": "#DDAA33"}
    for row, n in enumerate(sizes):
        for column, layer in enumerate(layers):
            ax, points = axes[row][column], [p for p in found if p["n"] == n and (p["d_in"], p["d_out"]) == layer]
            for route, colour in colours.items():
                ax.plot([p["t"] for p in points], [p[route] * 1e3 for p in points], marker=".", color=colour, linewidth=1.2, label=route)
            for p in points:
                y = p["pairs" if p["chosen"] == "rows" else p["chosen"]] * 1e3
                late = p["over"] > LATE
                ax.plot(p["t"], y, marker="o", markersize=8, markerfacecolor="none", color="#D55E00" if late else INK, linewidth=0)
                if late:
                    ax.annotate(f"+{p['over']:.0%}", (p["t"], y), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=7,
                                color="#D55E00")  # fmt: skip
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            if row == 0:
                ax.set_title(f"{layer[0]} → {layer[1]}")
            if column == 0:
                ax.set_ylabel(f"n = {n}, ms")
            if row == len(sizes) - 1:
                ax.set_xlabel("positions t")
    axes[0][0].legend(fontsize=8)
    late = sum(p["over"] > LATE for p in found)
    text = f"The Gram's routes; ringed: the cost model's choice ({late} of {len(found)} more than {LATE:.0%} over the best)"
    figure.suptitle(text, x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.supxlabel(_where(run) + ". At t = 1 pairs is the rows route", fontsize=8.5, color=INK)
    return figure


if __name__ == "__main__":
    for path in write_figures(Path(sys.argv[1])):
        print(path)
