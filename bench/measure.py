"""Interleaved timing, the machine's limits in the same rounds, peak memory in a fresh process."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
SECONDS = float(os.environ.get("BENCH_SECONDS", "4"))  # about what one job may take
_SIDE = 1536


def limits(dtype: torch.dtype) -> dict:
    """Functions whose times give the copy bandwidth and the GEMM rate, and what each moves or does."""
    x = torch.randn(_SIDE, _SIDE).to(dtype)
    y, source = torch.empty_like(x), torch.randn(1 << 25)
    target = torch.empty_like(source)
    return {"copy": (lambda: target.copy_(source), 2 * source.nbytes), "gemm": (lambda: torch.mm(x, x, out=y), 2 * _SIDE**3)}


def interleaved(providers: dict, dtype: torch.dtype, rounds: int | None = None) -> tuple[dict, dict, dict]:
    """Times (seconds) per provider, first results, and the best copy bandwidth and GEMM rate of the same rounds."""
    results, times, first = {}, {name: [] for name in providers}, {}
    for name, call in providers.items():
        start = time.perf_counter()
        found = call()
        first[name] = time.perf_counter() - start
        if isinstance(found, torch.Tensor):
            results[name] = found.detach().double()
    rounds = rounds or int(min(15, max(3, SECONDS / max(1e-6, sum(first.values())))))
    bounds, seen = limits(dtype), {"copy": [], "gemm": []}
    for _ in range(rounds):
        for name, (call, amount) in bounds.items():
            start = time.perf_counter()
            call()
            seen[name].append(amount / (time.perf_counter() - start))
        for name, call in providers.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times, results, {name: statistics.median(rates) for name, rates in seen.items()}


def agreement(results: dict, against: str = "ours") -> dict:
    """Relative distance of each result to ours; a provider without a result is not in it."""
    if against not in results:
        return {}
    ref = results[against]
    return {name: float((x - ref).norm() / ref.norm()) for name, x in results.items() if x.shape == ref.shape}


def quantile(times: list[float], q: float) -> float:
    return sorted(times)[min(len(times) - 1, int(q * len(times)))]


def peak_memory(key: str, provider: str) -> int:
    """Bytes above the resting process of one call, in a process of its own that sees the same entangle_fast."""
    paths = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, str(HERE / "measure.py"), key, provider], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": paths})  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{provider} on {key} fails in a process of its own: {done.stderr.strip().splitlines()[-1:]}")
    return int(done.stdout.split()[-1])


def _status(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def machine() -> dict:
    model = next((x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), "")
    commit = subprocess.run(["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    import entangle_fast

    return {
        "cpu": model, "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version(),
        "entangle_fast": entangle_fast.__version__, "commit": commit, "isa": torch.backends.cpu.get_cpu_capability(),
        "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE", "0"), "load": os.getloadavg()[0],
    }  # fmt: skip


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    from jobs import BY_KEY

    calls = BY_KEY[sys.argv[1]].make()
    resting = _status("VmRSS")
    calls[sys.argv[2]]()
    print(max(0, _status("VmHWM") - resting))
    sys.stdout.flush()
    os._exit(0)
