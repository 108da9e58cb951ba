"""A report on the console: methods, classes, what was measured on the run, where the figures are; from its folder, drawn anew."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .facts import meaning
from .report import REFERENCES, REPORT, SETS, how_to_go_on, is_number, read_report, shown_classes
from .storage import save_json


def rebuild(run_dir: str | os.PathLike, console: Console | None = None) -> dict[str, Any]:
    """Draw the figures of a run folder again, note them in report.json, print the tables; the report."""
    from .figures.run import write_figures  # matplotlib is slow to import

    run_dir = Path(run_dir)
    report = read_report(run_dir)
    drawn = [path.relative_to(run_dir).as_posix() for path in write_figures(run_dir)]
    if report["figures"] != drawn:
        report["figures"] = drawn
        save_json(run_dir / REPORT, report)
    console = console or Console()
    table(report, console, run_dir)
    if mend := how_to_go_on(run_dir):
        console.print(Text(f"A later run into this folder is not finished; go on with {mend}", style="yellow"), soft_wrap=True)
    return report


def table(report: Mapping[str, Any], console: Console, run_dir: str | os.PathLike | None = None) -> None:
    """Print the report: methods, then classes, then where the figures are.

    Boxes and colour on a terminal that is wide enough; plain aligned text in narrow ones and in pipes.
    """
    ascii_only = console.options.ascii_only
    plain = ascii_only or not console.is_terminal
    down, up = ("(low)", "(high)") if ascii_only else ("↓", "↑")
    methods = report["methods"]
    original = methods.get("original", {})
    task = report.get("task") or {}

    title = f"Accuracy of the {task['measured']}, %" if task.get("measured") else "Test accuracy, %"
    if task.get("forget"):
        title += f": forgetting {', '.join(map(str, task['forget']))} from {task.get('dataset', '?')}"
    main = new_table(title)
    main.add_column("method", no_wrap=True)
    for heading in (f"forget {down}", f"adjacent {up}", f"remote {up}", "seconds", "peak MB"):
        main.add_column(heading, justify="right", no_wrap=True)
    names = sorted(methods, key=lambda name: (name == "retrain", name != "original"))
    for i, name in enumerate(names):
        method = methods[name]
        cells = [_accuracy(method.get(s), method["std"].get(s), ascii_only) for s in SETS]
        for s, cell in zip(SETS, cells):
            cell.stylize("" if s == "forget" else loss_style(method.get(s), original.get(s)))
        next_kind = names[i + 1] in REFERENCES if i + 1 < len(names) else None
        main.add_row(
            Text(name.replace("_", " ")), *cells, _number(method.get("seconds"), 1), _number(method.get("peak_mb"), 0),
            style="dim" if name in REFERENCES else "bold" if name == "entangled" else "",
            end_section=next_kind is not None and next_kind != (name in REFERENCES),
        )  # fmt: skip
    print_table(console, main, plain)
    if seeds := max((len(m["seeds"]) for m in methods.values()), default=0):
        spread = (
            f"mean {'+-' if ascii_only else '±'} standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
        )
        console.print(Text(spread, style="dim"), soft_wrap=True)

    if any(m["per_class"] for m in methods.values()):
        console.print()
        classes, left_out = shown_classes(report, 30)
        by_class = new_table("Per class, %")
        by_class.add_column("class", no_wrap=True)
        for name in names:
            # a word a line, so that many methods fit in 80 columns
            by_class.add_column(name.replace("_", "\n"), justify="right", no_wrap=True, vertical="bottom")
        for i, (kind, c) in enumerate(classes):
            if kind and (i == 0 or classes[i - 1][0] != kind):
                by_class.add_row(Text(kind, style="dim italic"))
            cells = [_accuracy(methods[n]["per_class"].get(c), None, ascii_only) for n in names]
            for n, cell in zip(names, cells):
                before = (original.get("per_class") or {}).get(c)
                cell.stylize("" if kind == "forget" else loss_style(methods[n]["per_class"].get(c), before))
            last = i + 1 < len(classes) and classes[i + 1][0] != kind
            by_class.add_row(Text(f"  {c}" if kind else c), *cells, end_section=last)
        print_table(console, by_class, plain)
        if left_out:
            console.print(
                Text(f"{left_out} retained classes that lost less are not shown", style="dim"), soft_wrap=True
            )

    if lines := list(flat_facts(report.get("facts") or {})):
        console.print()
        console.print(Text("Measured on this run", style="bold"))
        widest = max(len(f"  {key}: {value}") for key, value in lines)
        for key, value in lines:
            line = Text(f"  {key}: {value}")
            if text := meaning(key):
                line = Text(f"{line.plain:{widest}}  ").append(text, style="dim")
            console.print(line, soft_wrap=True)
    if report.get("figures"):
        console.print()
        console.print(Text("Figures", style="bold"))
        for figure in report["figures"]:
            console.print(Text(f"  {Path(run_dir) / figure if run_dir else figure}"), soft_wrap=True)


def new_table(title: str) -> Table:
    """An empty table in the house's style."""
    return Table(title=Text(title, style="bold"), title_justify="left", header_style="bold", box=box.ROUNDED)


def print_table(console: Console, what: Table, plain: bool) -> None:
    """With its box where the console is wide enough and not ``plain``; else without, never cut."""
    wide = console.options.update(width=10_000)
    if not plain and what.__rich_measure__(console, wide).maximum <= console.width:
        console.print(what)
        return
    # no box, and as wide as it needs: numbers cut short would be worse than long lines
    what.box, what.padding, what.pad_edge = None, (0, 2, 0, 0), False
    width = what.__rich_measure__(console, wide).maximum
    for line in console.render_lines(what, console.options.update(width=width), pad=False):
        console.print(Text("".join(part.text for part in line).rstrip()), soft_wrap=True)


def _accuracy(mean: Any, std: Any, ascii_only: bool) -> Text:
    if not is_number(mean):
        return Text("-", style="dim")
    text = Text(f"{mean:.1f}")
    if is_number(std):
        text.append(f" {'+-' if ascii_only else '±'} {std:.1f}", style="dim")
    return text


def _number(value: Any, digits: int) -> Text:
    return Text(f"{value:,.{digits}f}") if is_number(value) else Text("-", style="dim")


def loss_style(value: Any, before: Any) -> str:
    """Red and yellow for retained accuracy that was lost: more than 10, more than 3 points."""
    if not (is_number(value) and is_number(before)):
        return ""
    return "red" if before - value > 10 else "yellow" if before - value > 3 else ""


def flat_facts(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """(name, value) of nested facts as the table shows them."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat_facts(value, f"{prefix}{key} ")
        else:
            yield f"{prefix}{key}", f"{value + 0.0:.4g}" if isinstance(value, float) else str(value)
