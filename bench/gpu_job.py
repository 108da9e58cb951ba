"""What a job of the GPU matrix is, and how it is measured: medians with a cold L2 cache, memory, ceilings, and what must hold.

Without a GPU the same code runs on the CPU with a wall clock and the CPU's backends: that is for tests/gpu, no measurement.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from entangle_fast import dispatch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
KERNELS = ("triton", "cuda")  # backends that a job may pin, beside the reference; "ours" is whatever dispatch chooses


AGAIN = 75  # exit status: what is left needs a new process, with --again


@dataclass
class Job:
    """ours and peers: calls that do the same thing.

    ops: the operations that ours consists of, for doctor.  backends: ours is measured with each.
    exact: the result that ours must be within tolerance of (relative, 2-norm); default: the first peer's.
    result: call → what is compared, where calls work in place.
    bytes, flops: what the operation cannot do without.  memory: also measure what a call holds beyond its result.
    launches: also count the kernels of a call.  needs: text → (measured, backend) → holds, None where something is missing.
    """

    ours: Callable
    peers: dict[str, Callable]
    ops: tuple[str, ...] = ()
    backends: tuple[str, ...] = ("triton",)
    exact: Callable | None = None
    result: Callable[[Callable], object] = lambda call: call()
    tolerance: float = 1e-2
    bytes: float = 0.0
    flops: float = 0.0
    memory: bool = False
    launches: bool = False
    needs: dict[str, Callable] = field(default_factory=dict)


@dataclass
class Measured:
    """What the needs of a job look at: milliseconds and bytes by provider."""

    job: Job
    top: dict
    ms: dict[str, float] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)
    launches: dict[str, int | None] = field(default_factory=dict)

    def of_copy(self, provider: str) -> float:
        return self.job.bytes / self.ms[provider] * 1e3 / self.top["copy_bytes_per_s"]

    def of_gemm(self, provider: str) -> float:
        return self.job.flops / self.ms[provider] * 1e3 / self.top["gemm_bf16_flops_per_s"]

    def faster(self, provider: str, peer: str) -> float | None:
        """How many times as fast as the peer; None where that was not measured."""
        return self.ms[peer] / self.ms[provider] if peer in self.ms else None

    def smaller(self, provider: str, peer: str) -> float | None:
        return self.peak[peer] / max(self.peak[provider], 1) if peer in self.peak else None


def at_least(value: float | None, least: float) -> bool | None:
    return None if value is None else value >= least


class Timer:
    """Medians of a call's time on the device, the L2 cache overwritten before each run."""

    def __init__(self, repeats: int, limit_s: float):
        self.repeats, self.limit_s = repeats, limit_s
        self.flush = torch.empty(256 << 20 if GPU else 16, dtype=torch.int8, device=DEVICE)

    def once(self, run) -> float:
        self.flush.zero_()
        if not GPU:
            start = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - start)
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop)

    def __call__(self, run) -> dict:
        self.once(run)  # compiles, and sizes the allocator
        times, began = [], time.perf_counter()
        while len(times) < self.repeats and (len(times) < 3 or time.perf_counter() - began < self.limit_s):
            times.append(self.once(run))
        return {"ms": statistics.median(times), "ms_min": min(times), "ms_max": max(times), "runs": len(times)}


def tensors(x) -> list[torch.Tensor]:
    return [x] if isinstance(x, torch.Tensor) else [t for y in x for t in tensors(y)] if isinstance(x, (list, tuple)) else []


def peak_bytes(run) -> int:
    """Device memory that ``run`` holds at its worst beyond what was there before and what it returns; 0 on the CPU."""
    if not GPU:
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = sum(x.nbytes for x in tensors(run()))
    torch.cuda.synchronize()
    return max(0, torch.cuda.max_memory_allocated() - before - kept)


def kernels(run) -> int | None:
    """How many kernels one call launches, memory copies and fills aside; None where the profiler does not say."""
    if not GPU:
        return None
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as found:
        run()
        torch.cuda.synchronize()
    names = [e.name for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not n.startswith(("Memcpy", "Memset")) for n in names) or None


def ceilings(timer: Timer) -> dict:
    """What this very machine reaches: bytes/s of a device copy (read and written), FLOP/s of a large bf16 product."""
    side = 8192 if GPU else 64
    x = torch.empty(1 << (30 if GPU else 12), dtype=torch.int8, device=DEVICE)
    y = torch.empty_like(x)
    copy = timer(lambda: y.copy_(x))["ms"]
    a, b = (torch.randn(side, side, device=DEVICE).bfloat16() for _ in range(2))
    product = timer(lambda: a @ b)["ms"]
    return {"copy_bytes_per_s": 2 * x.numel() / copy * 1e3, "gemm_bf16_flops_per_s": 2 * side**3 / product * 1e3}


def release() -> bool:
    """Cached memory back to the device; False after a fault: the device then answers this process with errors only."""
    if not GPU:
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        traceback.print_exc()
        return False
    return True


@contextlib.contextmanager
def limited(seconds: float, give_up: Callable) -> Iterator[None]:
    """give_up() and an exit with AGAIN where the block takes longer: what waits for a kernel that hangs cannot be interrupted."""

    def over():
        give_up()
        os._exit(AGAIN)

    watch = threading.Timer(seconds, over)
    watch.daemon = True
    watch.start()
    try:
        yield
    finally:
        watch.cancel()


@contextlib.contextmanager
def chosen(provider: str) -> Iterator[None]:
    """Dispatch to this backend and no other; other providers, and machines without a GPU, are left to dispatch."""
    kept = os.environ.pop(dispatch.ENV, None)
    if GPU and provider in (*KERNELS, "reference"):
        os.environ[dispatch.ENV] = provider
    try:
        yield
    finally:
        os.environ.pop(dispatch.ENV, None)
        if kept is not None:
            os.environ[dispatch.ENV] = kept


def distance(x, want) -> float:
    """Largest relative distance (2-norm) of the tensors of a result to those of another, a chunk of float64 at a time."""
    xs, ws = tensors(x), tensors(want)
    if [t.shape for t in xs] != [t.shape for t in ws]:
        return float("inf")

    def apart(p, q):
        parts = list(zip(p.reshape(-1).split(1 << 26), q.reshape(-1).split(1 << 26)))
        off = sum((u.double() - v.double()).square().sum() for u, v in parts)
        size = sum(v.double().square().sum() for _, v in parts)
        return (off / size.clamp(min=1e-300)).sqrt().item()

    found = [apart(p.detach(), q.detach()) for p, q in zip(xs, ws) if p.numel()]
    return float("nan") if any(f != f for f in found) else max(found, default=0.0)


def measure(job: Job, timer: Timer, top: dict, out: dict | None = None) -> dict:
    """One record for each provider, and whether what must hold holds, put into ``out``. A wrong result gets no time."""
    out = {} if out is None else out
    out |= {"providers": {}, "ran": [], "needs": {}}
    seen, want = Measured(job, top), None
    if job.exact is not None:
        with chosen("reference"):
            want = job.exact()
    calls = {**job.peers, **{b: job.ours for b in job.backends}}
    for provider, call in calls.items():
        ours = provider in job.backends
        row = out["providers"][provider] = {}
        try:
            with chosen(provider):
                found = job.result(call)
                if want is None:  # without an exact result the first peer's counts
                    if ours:
                        raise RuntimeError("no peer ran: nothing tells whether the result is right")
                    want = found
                if found is not None:  # a floor, a plain forward and backward say, gives no result
                    row["error"] = distance(found, want)
                    row["correct"] = row["error"] <= job.tolerance
                if ours and provider in KERNELS:
                    out["ran"] += [{"op": op, "backend": provider, "correct": row["correct"]} for op in job.ops]
                del found
                if ours and not row["correct"]:
                    continue
                row |= timer(call)
                seen.ms[provider] = row["ms"]
                if job.bytes:
                    row["of_copy"] = seen.of_copy(provider)
                if job.flops:
                    row["of_gemm"] = seen.of_gemm(provider)
                if job.memory:
                    row["peak_bytes"] = seen.peak[provider] = peak_bytes(call)
                if job.launches and ours:
                    row["launches"] = seen.launches[provider] = kernels(call)
        except Exception as failure:  # one provider must not cost the others their numbers
            traceback.print_exc()
            row["failed"] = f"{type(failure).__name__}: {str(failure)[:400]}"
        if not release():
            break
    for text, holds in job.needs.items():
        backend = text.partition(":")[0]
        out["needs"][text] = holds(seen, backend) if backend in seen.ms else None
    return out


def failed(record: dict) -> bool:
    """A job of ours that is wrong or did not run; a slow one is no failure, it is a result."""
    rows = record.get("providers", {})
    return "failed" in record or any(not r.get("correct", False) for p, r in rows.items() if p in (*KERNELS, "ours"))


def table(jobs: dict[str, dict]) -> str:
    """One line for each provider of each job, then what must hold and whether it does."""
    lines = [f"{'job':44} {'provider':12} {'ms':>10} {'of copy':>8} {'of GEMM':>8} {'GiB':>7}"]
    for title, record in jobs.items():
        if "providers" not in record or "failed" in record:
            lines.append(f"{title:44} {record.get('failed') or record.get('skipped')}")
        for provider, r in record.get("providers", {}).items():
            share = [f"{r[k]:.2f}" if k in r else "" for k in ("of_copy", "of_gemm")]
            size = f"{r['peak_bytes'] / 2**30:.2f}" if "peak_bytes" in r else ""
            ms = f"{r['ms']:.3f}" if "ms" in r else r["failed"][:60] if "failed" in r else f"WRONG {r.get('error', math.nan):.1e}"
            lines.append(f"{title:44} {provider:12} {ms:>10} {share[0]:>8} {share[1]:>8} {size:>7}")
        words = {True: "holds", False: "FAILS", None: "not measured"}
        lines += [f"{'':44}   {text}: {words[holds]}" for text, holds in record.get("needs", {}).items()]
    return "\n".join(lines)
