"""Interleaved timing, agreement, the machine's limits in the same rounds, peak memory in a fresh process, the machine's name."""

from __future__ import annotations

import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from job import FLOORS, TRUSTED, Job

HERE = Path(__file__).parent
SECONDS = float(os.environ.get("BENCH_SECONDS", "4"))  # about what one job may take
_SIDE, _COPIED = 1536, 1 << 25  # the product and the copy that give the limits: rows, elements


@dataclass
class Measured:
    """times: provider → seconds of each round. verdicts: provider → how its result compares (see verdict). errors: relative
    distance to the trusted result. failed: peer → what it raised. limits: bytes/s of a copy, FLOP/s of a product."""

    times: dict[str, list[float]]
    verdicts: dict[str, str]
    errors: dict[str, float]
    failed: dict[str, str]
    limits: dict[str, float]

    def ratio(self, provider: str) -> float | None:
        """Median over that of ours; None unless both results are known to be right, or the provider is a floor."""
        right = self.verdicts.get("ours") == "agrees" and self.verdicts[provider] in ("agrees", "floor")
        return quantile(self.times[provider], 0.5) / quantile(self.times["ours"], 0.5) if right else None


def limits(dtype: torch.dtype) -> dict:
    """Functions whose times give the copy bandwidth and the GEMM rate, and what each moves or does."""
    x = torch.randn(_SIDE, _SIDE).to(dtype)
    y, source = torch.empty_like(x), torch.randn(_COPIED)
    target = torch.empty_like(source)
    return {"copy": (lambda: target.copy_(source), 2 * source.nbytes), "gemm": (lambda: torch.mm(x, x, out=y), 2 * _SIDE**3)}


def measure(job: Job, rounds: int | None = None) -> Measured:
    """All providers of a job in turns, round after round. A peer that fails is left out; ours may not fail.

    Each round has an order of its own: who comes after a peer that gave gigabytes back touches fresh pages.
    """
    calls, failed, results, first = job.calls(), {}, {}, {}
    for name, call in list(calls.items()):
        try:
            found, seconds = _timed(call)
            first[name] = _timed(call)[1] if name == "compile" else seconds  # its first call compiles
        except Exception as error:  # what a peer cannot do must not cost the others their numbers
            if name == "ours":
                raise
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            del calls[name]
            continue
        if isinstance(found, torch.Tensor):
            results[name] = found.detach().double()
        elif found:  # tensors shaped like the parameters, as one vector; what it takes is not timed
            results[name] = torch.cat([x.detach().double().flatten() for x in found])
    errors = distances(results)
    verdicts = {name: verdict(name, errors, results, job.tolerance) for name in calls}
    del results
    rounds = rounds or int(min(15, max(3, SECONDS / max(1e-6, sum(first.values())))))
    times, bounds, seen = {name: [] for name in calls}, limits(job.dtype), {"copy": [], "gemm": []}
    for turn in range(rounds):
        for name, (call, amount) in bounds.items():
            seen[name].append(amount / _timed(call)[1])
        for name in random.Random(turn).sample(list(calls), len(calls)):
            times[name].append(_timed(calls[name])[1])
    return Measured(times, verdicts, errors, failed, {name: statistics.median(rates) for name, rates in seen.items()})


def _timed(call):
    start = time.perf_counter()
    found = call()
    return found, time.perf_counter() - start


def distances(results: dict) -> dict[str, float]:
    """Relative distance of each result to that of the trusted provider; inf for another shape. Empty where nobody is trusted."""
    trusted = next((name for name in TRUSTED if name in results), None)
    if trusted is None:
        return {}
    ref = results[trusted]
    gap = lambda x: float((x - ref).norm() / ref.norm()) if x.shape == ref.shape else math.inf  # noqa: E731
    return {name: gap(x) for name, x in results.items()}


def verdict(name: str, errors: dict, results: dict, tolerance: float) -> str:
    """ "agrees", "differs", "floor" (does less than the job, by design), or "unchecked" (nothing to compare with)."""
    if name in FLOORS:
        return "floor"
    if name not in errors or len(results) < 2:
        return "unchecked"
    return "agrees" if errors[name] <= tolerance else "differs"  # NaN differs


def quantile(times: list[float], q: float) -> float:
    return sorted(times)[min(len(times) - 1, int(q * len(times)))]


def peak_memory(key: str, provider: str) -> int:
    """Bytes above the resting process of one call, in a process of its own that sees the same entangle_fast.

    glibc's threshold between heap and mmap is held at 1 MiB, for every provider alike: else it grows as tensors are freed, they
    come to lie in the heap, and what is counted is holes (20 to 140 MB here, another number every run).
    """
    paths = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, str(HERE / "measure.py"), key, provider], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": paths, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)})  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{provider} on {key} fails in a process of its own: {done.stderr.strip().splitlines()[-1:]}")
    return int(done.stdout.split()[-1])


def _status(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def cpu_name(info: dict[str, str] | None = None, cores: int | None = None) -> str:
    """The results folder of this CPU, such as cpu-amd-epyc-zen4-2c: its model, AMD's generation, the cores it may use.

    info: fields of /proc/cpuinfo; a virtual machine often says no more than "AMD EPYC", so the family tells the generation.
    """
    info = _cpuinfo() if info is None else info
    if cores is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    model = re.sub(r"\((r|tm)\)|cpu|processor|\d+-core|@.*|\bwith\b.*", " ", info.get("model name", "").lower())
    words = re.findall(r"[a-z0-9]+", model or platform.machine().lower())
    return "-".join(["cpu", *words, *filter(None, [_zen(info)]), f"{cores}c"])


def _zen(info: dict[str, str]) -> str:
    """By family and model, as Linux tells them apart (arch/x86/kernel/cpu/amd.c)."""
    if info.get("vendor_id") != "AuthenticAMD":
        return ""
    family, model = int(info.get("cpu family", 0)), int(info.get("model", 0))
    if family == 0x17:
        return "zen2" if model >= 0x30 else "zen1"
    if family == 0x19:
        return "zen4" if 0x10 <= model <= 0x1F or 0x60 <= model <= 0xAF else "zen3"
    return {0x1A: "zen5"}.get(family, "")


def machine() -> dict:
    """What a result has to say about where it was measured; no host name, no path."""
    commit = subprocess.run(["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    import entangle_fast

    return {
        "cpu": _cpuinfo().get("model name", platform.machine()), "name": cpu_name(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "python": platform.python_version(), "entangle_fast": entangle_fast.__version__,
        "commit": commit, "isa": torch.backends.cpu.get_cpu_capability(),
        "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE", "0"), "load": os.getloadavg()[0],
    }  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:] == ["name"]:
        sys.exit(print(cpu_name()))
    from jobs import BY_KEY

    call = BY_KEY[sys.argv[1]].calls((sys.argv[2],))[sys.argv[2]]
    resting = _status("VmRSS")
    call()
    print(max(0, _status("VmHWM") - resting))
    sys.stdout.flush()
    os._exit(0)
