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
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .storage import CheckpointError, atomic_write, load_json, load_tensors

REPORT, HISTORY, LOSSES = "report.json", "history.csv", "losses.safetensors"
CHECKPOINT, CONFIG = "checkpoint.safetensors", "config.toml"  # of a run that is not finished, and of one from a file
UNFINISHED, FINISHED = "a run that is not finished", "a finished run"
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
        **{key: mean_of(row.get(key) for row in rows) for key in (*SETS, "seconds")},
        "peak_mb": max(numbers(row.get("peak_mb") for row in rows), default=None),
        "per_class": {c: mean_of((row.get("per_class") or {}).get(c) for row in rows) for c in classes},
        "std": {key: std_of(row.get(key) for row in rows) for key in SETS},
        "seeds": rows,
    }


def run_in(folder: str | os.PathLike) -> str:
    """What a folder holds: UNFINISHED, FINISHED, or "" without a run."""
    folder = Path(folder)
    return UNFINISHED if (folder / CHECKPOINT).exists() else FINISHED if (folder / REPORT).exists() else ""


def numbers(values: Iterable[Any]) -> list[float]:
    return [float(v) for v in values if is_number(v)]


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def mean_of(values: Iterable[Any]) -> float | None:
    known = numbers(values)
    return statistics.fmean(known) if known else None


def std_of(values: Iterable[Any]) -> float | None:
    known = numbers(values)
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
    """losses.safetensors as `keyed_losses`; {} without the file."""
    path = Path(run_dir) / LOSSES
    return keyed_losses(load_tensors(path)) if path.is_file() else {}


def keyed_losses(losses: Mapping[str, Any]) -> dict[tuple[str, str, str, str], Any]:
    """{"method/seed/phase/set": tensor} as {(method, seed, phase, set): float32 tensor (n,)}; other names are left out."""
    keyed = ((tuple(name.split("/")), tensor) for name, tensor in losses.items())
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
    of_a_job = config.is_file() and "[task]" in config.read_text(encoding="utf-8").splitlines()  # what ef.unlearn writes has none
    return f"entangle-fast unlearn {config} --resume" if of_a_job else f"ef.unlearn(…, out={str(run_dir)!r}, resume=True)"


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
        accuracies = numbers(m["per_class"].get(item[1]) for n, m in report["methods"].items() if n not in REFERENCES)
        before = original.get(item[1])
        return min(accuracies, default=0.0) - (before if is_number(before) else 100.0)

    forget = [item for item in known if item[0] == "forget"][:limit]
    kept = sorted((i for i in known if i[0] != "forget"), key=worst)[: max(limit - len(forget), 0)]
    return [item for item in known if item in forget or item in kept], len(known) - len(forget) - len(kept)
