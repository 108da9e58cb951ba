"""What is installed, which backend serves what, and what to type where something is missing."""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from entangle_fast.machine import machine_info, package_version

THP = "THP_MEM_ALLOC_ENABLE"  # torch reads it once, at its first large allocation
GPU_BACKENDS = ("triton", "cuda")
PACKAGES = ("torch", "triton", "numpy", "safetensors", "typer", "rich", "matplotlib")


def report(results: Path | None = None) -> dict[str, Any]:
    """Everything `doctor` prints, as plain data.

    results: folder of benchmark results, <device>/*.json; bench/results of the checkout by default.
    Keys: machine, versions, commit, isa (the CPU's), thp, nvcc, extension {file, error, isa (the one that its kernels
    use)}, ops {op: {backend: {available, reason}}}, gpu_runs {"op/backend": line}.
    """
    import torch

    if results is None:
        results = Path(__file__).resolve().parent.parent / "bench" / "results"
    info = machine_info()
    info["versions"] = {"python": platform.python_version(), **{name: package_version(name) for name in PACKAGES}}
    ops = _ops()
    return {
        **info,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "thp": os.environ.get(THP, "0") == "1",
        "nvcc": shutil.which("nvcc") or _in_cuda_home(),
        "extension": _extension(),
        "ops": ops,
        "gpu_runs": gpu_runs(ops if "error" not in ops else {}, results),
    }


def _in_cuda_home() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None


def _extension() -> dict[str, str | None]:
    try:
        module = importlib.import_module("entangle_fast._C")
    except ImportError as error:
        return {"file": None, "error": str(error), "isa": None}
    return {"file": getattr(module, "__file__", None), "error": None, "isa": module.isa()}


def _ops() -> dict[str, Any]:
    try:
        table = importlib.import_module("entangle_fast.dispatch").table()
    except Exception as error:  # a broken install is what a doctor is for
        return {"error": {"dispatch": {"available": False, "reason": f"{type(error).__name__}: {error}"}}}
    return {
        op: {backend: {"available": bool(there), "reason": reason} for backend, (there, reason) in row.items()}
        for op, row in table.items()
    }


def gpu_runs(ops: dict[str, Any], results: Path) -> dict[str, str]:
    """ "op/backend" → where it ran, for every GPU kernel of `ops`.

    A kernel counts as run when a JSON file under results/<device>/, <device> not starting with
    cpu, holds, at any depth, an object with its "op" and "backend"; one with "correct": false
    counts as wrong.
    """
    seen: dict[str, dict[str, bool]] = {}
    for path in sorted(results.glob("*/*.json")) if results.is_dir() else []:
        device = path.parent.name
        if device.lower().startswith("cpu"):
            continue
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        for record in _records(content):
            devices = seen.setdefault(f"{record['op']}/{record['backend']}", {})
            devices[device] = devices.get(device, True) and record.get("correct") is not False
    out = {}
    for op, row in ops.items():
        for backend in GPU_BACKENDS:
            # a kernel that was never written is not owed a run
            if backend in row and not row[backend]["reason"].startswith(("no Triton kernel", "no CUDA C++ kernel", "built without CUDA")):
                devices = seen.get(f"{op}/{backend}", {})
                runs = (f"ran on {device}" if right else f"WRONG on {device}" for device, right in devices.items())
                out[f"{op}/{backend}"] = ", ".join(runs) or "not yet run on a GPU"
    return out


def _records(value: Any) -> Iterator[dict[str, Any]]:
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, dict):
            if isinstance(item.get("op"), str) and item.get("backend") in GPU_BACKENDS:
                yield item
            todo += item.values()
        elif isinstance(item, list):
            todo += item


def doctor(console: Console | None = None, verbose: bool = False) -> dict[str, Any]:
    """Print `report()` with the mend for what is missing; the report.

    verbose: each GPU kernel on a line of its own, instead of how many there are of a kind.
    """
    console = console or Console()
    found = report()
    machine, versions, extension = found["machine"], found["versions"], found["extension"]

    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")

    def fact(name: str, value: Any, mend: str | None = None, good: bool = True) -> None:
        text = Text(str(value), style="" if good else "yellow")
        facts.add_row(name, text.append(f"\n{mend}", style="dim") if mend else text)

    fact("versions", ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items()))
    if found["commit"]:
        fact("commit", found["commit"])
    fact(
        "cpu",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['ram_gb']} GB, {found['isa']}",
    )
    fact(
        "huge pages", f"{THP} is {'on' if found['thp'] else 'off'}",
        None if found["thp"] else f"export {THP}=1 before Python starts; demo and unlearn do it themselves",
        found["thp"],
    )  # fmt: skip
    fact(
        "compiled _C", extension["file"] or f"not loaded: {extension['error']}",
        None if extension["file"] else "build it: pip install --no-build-isolation -e . (until then: reference)",
        bool(extension["file"]),
    )  # fmt: skip
    if extension["isa"]:
        from entangle_fast.backends import ISA, unknown_isa

        wish, mend = os.environ.get(ISA), unknown_isa()
        lowered = f"; {ISA}={wish}" if wish else ""
        fact("C++ kernels", f"{extension['isa']}{lowered}", mend, not mend)
    fact(
        "nvcc",
        found["nvcc"] or "not found",
        None if found["nvcc"] else "only needed to build CUDA kernels; set CUDA_HOME if it is elsewhere",
    )
    fact("gpu", machine["gpu"] or "none found")
    console.print(facts)

    console.print()
    backends = list(dict.fromkeys(b for row in found["ops"].values() for b in row))
    grid = Table(title=Text("Which backend serves what", style="bold"), title_justify="left", box=None,
                 header_style="bold", padding=(0, 2, 0, 0), pad_edge=False)  # fmt: skip
    for heading in ("operation", *backends):
        grid.add_column(heading, no_wrap=True)
    reasons: dict[str, list[str]] = {}
    for op, row in found["ops"].items():
        cells = []
        for backend in backends:
            state = row.get(backend, {"available": False, "reason": ""})
            cells.append(Text("yes", style="green") if state["available"] else Text("-", style="dim"))
            if not state["available"] and state["reason"]:
                reasons.setdefault(f"{backend}: {state['reason']}", []).append(op)
        grid.add_row(op, *cells)
    console.print(grid)
    for reason, ops in reasons.items():
        all_of_them = len(ops) == len(found["ops"])
        which = "" if all_of_them else f" ({', '.join(ops) if len(ops) < 7 else f'{len(ops)} operations'})"
        console.print(Text(f"  {reason}{which}", style="dim"), soft_wrap=True)

    if found["gpu_runs"]:
        console.print()
        console.print(Text("GPU kernels", style="bold"))
        for kernels, line in _runs(found["gpu_runs"], verbose):
            style = "red" if "WRONG" in line else "yellow" if line.startswith("not") else "green"
            console.print(Text(f"  {kernels}: ").append(line, style=style), soft_wrap=True)
    return found


def _runs(gpu_runs: dict[str, str], verbose: bool) -> Iterator[tuple[str, str]]:
    """(kernels, where they ran): one by one where one is wrong or all are asked for, else counted by backend."""
    for line in dict.fromkeys(gpu_runs.values()):
        same = [kernel for kernel, ran in gpu_runs.items() if ran == line]
        if verbose or "WRONG" in line or len(same) < 4:
            yield from ((kernel, line) for kernel in same)
            continue
        counts = {backend: sum(kernel.endswith(f"/{backend}") for kernel in same) for backend in GPU_BACKENDS}
        by_backend = " and ".join(f"{count} {backend}" for backend, count in counts.items() if count)
        yield f"{by_backend} kernels (--verbose names them)", line
