"""What a run folder says: numbers out of report.json, history.csv and losses.safetensors.

report.json holds, for every method, what `aggregate` returns; accuracies are in percent, times in
seconds, memory in MB (10^6 bytes). Nothing here needs the model or the data, so a report can be
rebuilt anywhere.
"""

from __future__ import annotations

import csv
import io
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from entangle_fast.facts import meaning
from entangle_fast.storage import CheckpointError, atomic_write, load_json, load_tensors, save_json

REPORT, HISTORY, LOSSES = "report.json", "history.csv", "losses.safetensors"
CHECKPOINT, CONFIG = "checkpoint.safetensors", "config.toml"  # of a run that is not finished, and of one from a file
SETS = ("forget", "adjacent", "remote")
REFERENCES = ("original", "retrain")  # what the methods are measured against
HISTORY_COLUMNS = (
    "method", "seed", "stage", "step", "epoch", "seconds", "loss_forget", "loss_adjacent", "loss_remote", "w2",
    "cosine", "angle_deg", "constraint", "multiplier", "step_norm", "acc_forget", "acc_adjacent", "acc_remote",
)  # fmt: skip
_TEXT_COLUMNS = ("method", "stage")


def aggregate(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """One method's entry of report.json from its rows, one per seed.

    rows: {seed, forget, adjacent, remote, seconds, peak_mb, per_class: {class: %}}; None and nan
    count as not measured. Accuracies and seconds are means, peak_mb is the largest; std is the
    sample standard deviation, None for fewer than two seeds. Raises ValueError without rows.
    """
    rows = [dict(row) for row in rows]
    if not rows:
        raise ValueError("rows: got none, needs one per seed")
    classes = list(dict.fromkeys(name for row in rows for name in row.get("per_class") or {}))
    return {
        **{key: _mean(row.get(key) for row in rows) for key in (*SETS, "seconds")},
        "peak_mb": max(_known(row.get("peak_mb") for row in rows), default=None),
        "per_class": {c: _mean((row.get("per_class") or {}).get(c) for row in rows) for c in classes},
        "std": {key: _std(row.get(key) for row in rows) for key in SETS},
        "seeds": rows,
    }


def _known(values: Iterable[Any]) -> list[float]:
    return [float(v) for v in values if _is_number(v)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _mean(values: Iterable[Any]) -> float | None:
    known = _known(values)
    return statistics.fmean(known) if known else None


def _std(values: Iterable[Any]) -> float | None:
    known = _known(values)
    return statistics.stdev(known) if len(known) > 1 else None


def write_history(run_dir: str | os.PathLike, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write history.csv, atomically: HISTORY_COLUMNS first, then whatever else the rows have.

    None and missing values become empty cells.
    """
    extra = dict.fromkeys(key for row in rows for key in row if key not in HISTORY_COLUMNS)
    text = io.StringIO()
    writer = csv.DictWriter(text, [*HISTORY_COLUMNS, *extra], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return atomic_write(Path(run_dir) / HISTORY, text.getvalue().encode())


def read_history(run_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """Rows of history.csv in order; numbers as float, empty cells as None; [] without the file.

    Columns other than HISTORY_COLUMNS stay text where they are no numbers. Raises CheckpointError.
    """
    path = Path(run_dir) / HISTORY
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            if missing := {"method", "step"} - set(reader.fieldnames or ()):
                raise CheckpointError(f"{path}: lacks the column {sorted(missing)[0]!r}; run again to write it anew")
            return [{k: _cell(k, v) for k, v in row.items() if k is not None} for row in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not readable CSV ({error}); run again to write it anew") from error


def _cell(column: str, text: str | None) -> Any:
    if not text:
        return None
    if column in _TEXT_COLUMNS:
        return text
    try:
        return float(text)
    except ValueError:
        return None if column in HISTORY_COLUMNS else text


def read_losses(run_dir: str | os.PathLike) -> dict[tuple[str, str, str, str], Any]:
    """losses.safetensors as {(method, seed, phase, set): float32 tensor (n,)}; {} without the file."""
    path = Path(run_dir) / LOSSES
    if not path.is_file():
        return {}
    keyed = ((tuple(name.split("/")), tensor) for name, tensor in load_tensors(path).items())
    return {key: tensor.flatten().float() for key, tensor in keyed if len(key) == 4}


def read_report(run_dir: str | os.PathLike) -> dict[str, Any]:
    """report.json, checked as far as the tables and figures rely on it.

    Raises FileNotFoundError, or CheckpointError naming the file.
    """
    path = Path(run_dir) / REPORT
    if not path.is_file():
        if mend := how_to_go_on(run_dir):
            raise FileNotFoundError(f"{run_dir}: the run is not finished; go on with {mend}")
        raise FileNotFoundError(f"{path}: no such file; give the folder of a finished run")
    report = load_json(path)
    methods = report.get("methods")
    if not isinstance(methods, dict) or not all(isinstance(m, dict) for m in methods.values()):
        raise CheckpointError(f'{path}: lacks "methods" by name; run again to write it anew')
    for name, method in methods.items():
        for key, kind in (("per_class", dict), ("std", dict), ("seeds", list)):
            if not isinstance(method.setdefault(key, kind()), kind):
                raise CheckpointError(f"{path}: methods.{name}.{key} is no {kind.__name__}; run again to write it anew")
        method["seeds"] = [seed for seed in method["seeds"] if isinstance(seed, dict)]
    for key in ("task", "facts", "run", "machine", "versions"):
        if not isinstance(report.get(key), dict):
            report[key] = {}
    report["figures"] = [f for f in report.get("figures") or [] if isinstance(f, str)]
    return report


def how_to_go_on(run_dir: str | os.PathLike) -> str | None:
    """What resumes the run whose checkpoint lies in the folder; None without one."""
    run_dir = Path(run_dir)
    if not (run_dir / CHECKPOINT).is_file():
        return None
    config = run_dir / CONFIG
    return f"entangle-fast unlearn {config} --resume" if config.is_file() else f"ef.unlearn(…, out={str(run_dir)!r}, resume=True)"


def rebuild(run_dir: str | os.PathLike, console: Console | None = None) -> dict[str, Any]:
    """Draw the figures of a run folder again, note them in report.json, print the tables; the report."""
    from entangle_fast.figures import write_figures  # matplotlib is slow to import

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
    main = _new_table(title)
    main.add_column("method", no_wrap=True)
    for heading in (f"forget {down}", f"adjacent {up}", f"remote {up}", "seconds", "peak MB"):
        main.add_column(heading, justify="right", no_wrap=True)
    names = sorted(methods, key=lambda name: (name == "retrain", name != "original"))
    for i, name in enumerate(names):
        method = methods[name]
        cells = [_accuracy(method.get(s), method["std"].get(s), ascii_only) for s in SETS]
        for s, cell in zip(SETS, cells):
            cell.stylize("" if s == "forget" else _loss_style(method.get(s), original.get(s)))
        next_kind = names[i + 1] in REFERENCES if i + 1 < len(names) else None
        main.add_row(
            Text(name.replace("_", " ")), *cells, _number(method.get("seconds"), 1), _number(method.get("peak_mb"), 0),
            style="dim" if name in REFERENCES else "bold" if name == "entangled" else "",
            end_section=next_kind is not None and next_kind != (name in REFERENCES),
        )  # fmt: skip
    _print(console, main, plain)
    if seeds := max((len(m["seeds"]) for m in methods.values()), default=0):
        spread = (
            f"mean {'+-' if ascii_only else '±'} standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
        )
        console.print(Text(spread, style="dim"), soft_wrap=True)

    if any(m["per_class"] for m in methods.values()):
        console.print()
        classes, left_out = shown_classes(report, 30)
        by_class = _new_table("Per class, %")
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
                cell.stylize("" if kind == "forget" else _loss_style(methods[n]["per_class"].get(c), before))
            last = i + 1 < len(classes) and classes[i + 1][0] != kind
            by_class.add_row(Text(f"  {c}" if kind else c), *cells, end_section=last)
        _print(console, by_class, plain)
        if left_out:
            console.print(
                Text(f"{left_out} retained classes that lost less are not shown", style="dim"), soft_wrap=True
            )

    if lines := list(_flat(report.get("facts") or {})):
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


def shown_classes(report: Mapping[str, Any], limit: int) -> tuple[list[tuple[str, str]], int]:
    """Up to `limit` (set, class), forget first, then adjacent, remote; and how many are left out.

    Where there are too many, the retained classes that lost most, by the worst method, are kept.
    """
    groups = (report.get("task") or {}).get("classes") or {}
    known = [(s, str(c)) for s in SETS for c in groups.get(s) or []]
    measured = list(dict.fromkeys(c for m in report["methods"].values() for c in m["per_class"]))
    if not known:
        known = [("", c) for c in measured]
    known = [(s, c) for s, c in known if c in measured]
    original = report["methods"].get("original", {}).get("per_class", {})

    def worst(item: tuple[str, str]) -> float:
        accuracies = _known(m["per_class"].get(item[1]) for n, m in report["methods"].items() if n not in REFERENCES)
        before = original.get(item[1])
        return min(accuracies, default=0.0) - (before if _is_number(before) else 100.0)

    forget = [item for item in known if item[0] == "forget"][:limit]
    kept = sorted((i for i in known if i[0] != "forget"), key=worst)[: max(limit - len(forget), 0)]
    return [item for item in known if item in forget or item in kept], len(known) - len(forget) - len(kept)


def _new_table(title: str) -> Table:
    return Table(title=Text(title, style="bold"), title_justify="left", header_style="bold", box=box.ROUNDED)


def _print(console: Console, what: Table, plain: bool) -> None:
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
    if not _is_number(mean):
        return Text("-", style="dim")
    text = Text(f"{mean:.1f}")
    if _is_number(std):
        text.append(f" {'+-' if ascii_only else '±'} {std:.1f}", style="dim")
    return text


def _number(value: Any, digits: int) -> Text:
    return Text(f"{value:,.{digits}f}") if _is_number(value) else Text("-", style="dim")


def _loss_style(value: Any, before: Any) -> str:
    """Red and yellow for retained accuracy that was lost: more than 10, more than 3 points."""
    if not (_is_number(value) and _is_number(before)):
        return ""
    return "red" if before - value > 10 else "yellow" if before - value > 3 else ""


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key} ")
        else:
            yield f"{prefix}{key}", f"{value:.4g}" if isinstance(value, float) else str(value)


def machine_info() -> dict[str, Any]:
    """{"machine": ..., "versions": ..., "commit": ...}, as report.json has them.

    machine: cpu (name), cores (of this process), threads (torch's), ram_gb, gpu (name or None).
    commit: of the checkout this package lies in, with -dirty where it was changed, or None.
    """
    import torch

    return {
        "machine": {
            "cpu": _cpu_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "ram_gb": _ram_gb(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: package_version(name) for name in ("entangle_fast", "torch", "triton", "numpy")},
        },
        "commit": _commit(),
    }


def package_version(name: str) -> str | None:
    """Installed version of a package, without importing it; None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _ram_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # installed: a repository further up is somebody else's
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
