"""What a folder of a comparison says: cells joined to one entry a method, and the table.

report.json is that of any run (`report.aggregate`), with more columns. A relearning delay that no attack run reached
within its T steps is the string ">T" in a cell; means are then not taken, see `summary`.
"""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import demo, storage
from .compare import CONFIG, SAME, CompareConfig
from .compare_schedule import CELLS, ORIGINAL, RETRAIN
from .config_reading import from_toml
from .machine import machine_info
from .report import REFERENCES, REPORT, SETS, aggregate, mean_of, numbers, std_of
from .report_table import loss_style, new_table, print_table

KIND = "compare"
GOALS = {
    "super": demo.GOAL,
    "fine": "answer as a model that never saw the forgotten class: close to the retrained one; low forget accuracy alone is not it",
}


class Column(NamedTuple):
    """key: in a cell's row; better: "low", "high" or "" where neither is; about: what it is, with its unit."""

    key: str
    heading: str
    better: str
    digits: int
    about: str


COLUMNS = (
    Column("forget", "forget", "low", 1, "accuracy on the forgotten class's test samples, %"),
    Column("adjacent", "adjacent", "high", 1, "accuracy on the test samples of its neighbours, the classes of the same superclass, %"),
    Column("remote", "remote", "high", 1, "accuracy on all other test samples, %"),
    Column("gap", "Δ retrain", "low", 1, "how far the forget accuracy is from the retrained model's of the same seed, points"),
    Column("kl", "KL retrain", "low", 2, "KL(retrained ‖ model) of the predictions, nats: the mean over each test set, "
                                         "then of the three sets"),
    Column("mia", "MIA AUC", "", 3, "membership inference, the strongest attack: how well the forget set's training samples are "
                                    "told from test samples of the same class; 0.5 is a coin, and so should be the retrained model"),
    Column("rcd_sgd", "RCD SGD", "high", 0, "relearning convergence delay: steps of SGD on the forget set until its loss is back "
                                            "near the original's; the median of the attack's runs"),
    Column("rcd_adam", "RCD Adam", "high", 0, "the same for Adam"),
    Column("angle", "angle°", "", 1, "between the gradients of the forget and of the retain loss at the unlearned model, degrees"),
    Column("seconds", "seconds", "low", 1, "unlearning steps alone"),
    Column("peak_mb", "peak MB", "low", 0, "memory above the start of unlearning, MB (10⁶ bytes); the largest of the seeds"),
)  # fmt: skip
SPLIT = 5  # columns in the first of the two tables of a narrow terminal


def collect(folder: str | os.PathLike) -> dict[str, Any]:
    """The report of what the cells of a comparison's folder hold by now.

    As report.json of any run, and: kind, labels' goal in task; failed: [{method, seed, error}]; missing: [method-seed, ...];
    jobs: the most cells at once; settings: config.toml. Raises FileNotFoundError or CheckpointError.
    """
    folder = Path(folder)
    config = from_toml(folder / CONFIG, CompareConfig)
    names = [ORIGINAL, *(n for n in config.method if n != RETRAIN), RETRAIN]
    cells, missing = [], []
    for name in names:
        for seed in range(config.compare.seeds):
            path = folder / CELLS / f"{name}-{seed}.json"
            if path.is_file():
                cells.append(storage.load_json(path))
            else:
                missing.append(f"{name}-{seed}")
    done = [c for c in cells if c.get("state") == "done"]
    methods = {}
    for name in names:
        if rows := [c["row"] for c in done if c["method"] == name]:
            methods[name] = entry(rows)
    task = next((c["task"] for c in done), {"forget": config.task.forget})
    return {
        "kind": KIND,
        "methods": methods,
        "failed": [{k: c.get(k) for k in ("method", "seed", "error")} for c in cells if c.get("state") != "done"],
        "missing": missing,
        "task": {**task, "dataset": config.task.dataset, "labels": config.task.labels, "goal": GOALS[config.task.labels]},
        "jobs": max((c.get("jobs", 1) for c in done), default=1),
        **{key: getattr(config.compare, key) for key in SAME},
        "notes": [f"{c['method']}, seed {c['seed']}: {note}" for c in done for note in c.get("notes", [])],
        "curves": {a: _curves(done, names, f"relearning_{a}") for a in ("sgd", "adam")},
        "membership": _membership(done, names),
        "facts": next((c["facts"] for c in done if c["method"] == "entangled"), {}),
        "settings": config.method,
        **machine_info(),
        "figures": [],
    }


def _curves(cells: list[dict], names: list[str], key: str) -> dict:
    """{method: {"steps": [...], "loss": the mean over seeds of the attack runs' median loss}}, original: its own loss."""
    found = {}
    for name in names:
        if runs := [c[key] for c in cells if c["method"] == name and key in c]:
            curves = [run["curve"]["median"] for run in runs]
            found[name] = {"steps": runs[0]["curve"]["steps"], "loss": [mean_of(values) for values in zip(*curves)]}
    return found


def _membership(cells: list[dict], names: list[str]) -> dict:
    """{method: {attack: mean AUC over seeds}}."""
    found = {}
    for name in names:
        runs = [c["membership"]["auc"] for c in cells if c["method"] == name]
        found |= {name: {attack: mean_of(run.get(attack) for run in runs) for attack in runs[0]}} if runs else {}
    return found


def entry(rows: list[dict]) -> dict[str, Any]:
    """`report.aggregate` of one method's rows, with a mean and std for each of COLUMNS.

    Delays of which one is ">T" have no mean: the value is their median, a number or again ">T".
    """
    found = aggregate(rows)
    for column in COLUMNS:
        if column.key == "peak_mb":
            continue
        values = [row.get(column.key) for row in rows]
        found[column.key], found["std"][column.key] = mean_of(values), std_of(values)
        if beyond := [v for v in values if isinstance(v, str)]:
            middle = statistics.median_low([*numbers(values), *(float("inf") for _ in beyond)])
            found[column.key] = beyond[0] if middle == float("inf") else middle
            found["std"][column.key] = None
    return found


def summary(entry: Mapping[str, Any], column: Column) -> tuple[str, str]:
    """(value, what goes with it) of one column: ("3.1", "± 0.4"), (">100", "(2/3)"), ("35", "(1/3 >100)"), ("-", "")."""
    value, std = entry.get(column.key), (entry.get("std") or {}).get(column.key)
    seeds = [row.get(column.key) for row in entry.get("seeds") or []]
    beyond = sum(isinstance(v, str) for v in seeds)
    shown = value if isinstance(value, str) else f"{value:,.{column.digits}f}" if isinstance(value, (int, float)) else "-"
    if beyond:
        limit = next(v for v in seeds if isinstance(v, str))
        share = f"{beyond}/{len(seeds)}" if shown == limit else f"{beyond}/{len(seeds)} {limit}"
        return shown, f"({share})" if beyond < len(seeds) else ""
    return shown, f"± {std:.{column.digits}f}" if isinstance(std, (int, float)) else ""


def notes(report: Mapping[str, Any]) -> list[str]:
    """What a reader must know beside the table, a sentence each."""
    seeds = [len(m["seeds"]) for m in report["methods"].values()] or [0]
    over = f"{min(seeds)} to {max(seeds)} seeds" if min(seeds) < max(seeds) else f"{max(seeds)} seeds"
    said = [f"mean ± standard deviation over {over}"] if max(seeds) > 1 else ["one seed"]
    if report["jobs"] > 1:
        said.append(f"seconds: up to {report['jobs']} cells ran at once on {report['machine']['cores']} cores and shared them; "
                    "time methods with --jobs 1")  # fmt: skip
    if report.get("quick"):
        said.append("quick: a fifth of the passes; figures to look around with, not to report")
    if report["missing"]:
        said.append(f"not run yet: {', '.join(report['missing'][:6])}{', ...' if len(report['missing']) > 6 else ''}; "
                    "the same command goes on")  # fmt: skip
    return said


def table(report: Mapping[str, Any], console: Console, folder: str | os.PathLike | None = None) -> None:
    """Print the comparison: one table where the terminal is wide enough, two where it is not; then notes, failures, files."""
    ascii_only = console.options.ascii_only
    plain = ascii_only or not console.is_terminal
    task = report["task"]
    title = f"Forgetting {', '.join(map(str, task['forget']))} from {task['dataset']}, {task['labels']} labels"
    whole = _table(report, COLUMNS, title, ascii_only)
    wide = whole.__rich_measure__(console, console.options.update(width=10_000)).maximum
    if plain or wide <= console.width:
        print_table(console, whole, plain)
    else:
        print_table(console, _table(report, COLUMNS[:SPLIT], title, ascii_only), plain)
        print_table(console, _table(report, COLUMNS[SPLIT:], "Attacks, angle and cost", ascii_only), plain)

    def say(line: str, style: str = "dim") -> None:
        console.print(Text(_ascii(line) if ascii_only else line, style=style), soft_wrap=True)

    say(f"goal: {task['goal']}")
    for note in notes(report):
        say(note)
    for note in report["notes"]:
        say(note)
    for failure in failures(report):
        say(failure, "red")
    if folder is not None:
        say(f"page: {Path(folder) / 'index.html'}", "")


def _table(report: Mapping[str, Any], columns: Iterable[Column], title: str, ascii_only: bool) -> Table:
    columns, methods = list(columns), report["methods"]
    arrows = {"low": " (low)", "high": " (high)", "": ""} if ascii_only else {"low": " ↓", "high": " ↑", "": ""}
    made = new_table(title)
    made.add_column("method", no_wrap=True)
    for column in columns:
        heading = column.heading + arrows[column.better]
        made.add_column(_ascii(heading) if ascii_only else heading, justify="right", no_wrap=True)
    names = rows_of(report)
    original = methods.get(ORIGINAL, {})
    for i, name in enumerate(names):
        cells = []
        for column in columns:
            if name not in methods:
                cells.append(Text(f"failed: {failure_kind(report, name)}" if column is columns[0] else "", style="red"))
                continue
            value, rest = summary(methods[name], column)
            cell = Text(value, style="dim" if value == "-" else "")
            if column.key in SETS[1:]:
                cell.stylize(loss_style(methods[name].get(column.key), original.get(column.key)))
            cells.append(cell.append(f" {_ascii(rest) if ascii_only else rest}" if rest else "", style="dim"))
        following = names[i + 1] if i + 1 < len(names) else name
        made.add_row(Text(name.replace("_", " ")), *cells, style="dim" if name in REFERENCES else "bold" if name == "entangled" else "",
                     end_section=(name in REFERENCES) != (following in REFERENCES))  # fmt: skip
    return made


def rows_of(report: Mapping[str, Any]) -> list[str]:
    """Names of the table's rows: original, methods, retrain; methods that failed on every seed too."""
    names = list(dict.fromkeys([*report["methods"], *(f["method"] for f in report["failed"])]))
    place = {ORIGINAL: -1, RETRAIN: len(report["settings"])}
    order = list(report["settings"])
    return sorted(names, key=lambda n: place.get(n, order.index(n) if n in order else 0))


def failures(report: Mapping[str, Any]) -> list[str]:
    """A line for each method and error, with the seeds."""
    seeds: dict[tuple[str, str], list[str]] = defaultdict(list)
    for failed in report["failed"]:
        error = " ".join(str(failed["error"]).split())
        seeds[failed["method"].replace("_", " "), error[:400]].append(str(failed["seed"]))
    return [f"failed: {name}, seed {', '.join(s)}: {error}; the same command tries again" for (name, error), s in seeds.items()]


def failure_kind(report: Mapping[str, Any], name: str) -> str:
    """The kind of a method's first error, in a word."""
    error = next(str(f["error"]) for f in report["failed"] if f["method"] == name)
    kind = error.split(":")[0]
    return kind if kind.isidentifier() else "see below"


def _ascii(text: str) -> str:
    for sign, plain in (("±", "+-"), ("Δ", "d"), ("°", " deg"), ("‖", "||"), ("↓", "(low)"), ("↑", "(high)")):
        text = text.replace(sign, plain)
    return text


def write(folder: str | os.PathLike) -> dict[str, Any]:
    """Join the cells of a folder into report.json, draw the figures, write index.html; the report."""
    from .figures.compare import drawings
    from .figures.style import draw_all
    from .page import write_page

    folder = Path(folder)
    report = collect(folder)
    report["figures"] = [path.name for path in draw_all(folder, drawings(report))]
    storage.save_json(folder / REPORT, report)
    write_page(report, folder)
    return report


def rebuild(folder: str | os.PathLike, console: Console | None = None) -> dict[str, Any]:
    """`write`, then print the table."""
    report = write(folder)
    table(report, console or Console(), folder)
    return report
