"""The table of a benchmark run: python bench/report.py run.json. Ratios only where the results agree."""

from __future__ import annotations

import json
import math
import sys

from job import Job
from measure import Measured, quantile


def record(job: Job, provider: str, found: Measured, peak_memory: int | None = None) -> dict:
    """What is kept of one row, plain data: seconds, FLOP, bytes; the limits in 1e9 a second. Five digits."""
    times, limits, error = found.times[provider], found.limits, found.errors.get(provider, math.nan)
    median, fraction = quantile(times, 0.5), None
    if not job.whole_model and (job.flops or job.bytes):
        fraction = job.flops / median / limits["gemm"] if job.flops else job.bytes / median / limits["copy"]
    kept = {
        "op": job.op, "shape": job.shape, "dtype": str(job.dtype), "provider": provider, "median": median,
        "p20": quantile(times, 0.2), "p80": quantile(times, 0.8), "rounds": len(times), "flops": job.flops, "bytes": job.bytes,
        "gemm_limit": limits["gemm"] / 1e9, "copy_limit": limits["copy"] / 1e9, "fraction": fraction,
        "plain": quantile(found.times["plain"], 0.5) if "plain" in found.times else None,
        "error": error if math.isfinite(error) else None, "tolerance": job.tolerance, "verdict": found.verdicts[provider],
        "ratio": found.ratio(provider), "peak_memory": peak_memory,
    }  # fmt: skip
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in kept.items()}


def title(r: dict) -> str:
    return " ".join([r["op"], *(f"{k}={v}" for k, v in r["shape"].items()), r["dtype"].removeprefix("torch.")])


def table(rows: list[dict]) -> str:
    lines = [f"{'job':52} {'provider':13} {'median':>9} {'p20':>9} {'p80':>9} {'rate':>12} {'of limit':>8} {'x ours':>9} {'memory':>9}"]
    for r in rows:
        whole = r["fraction"] is None  # a model's n²P is what a Gram of formed gradients needs: rows do far less
        amount, unit = (r["flops"], "GFLOP/s") if r["flops"] else (r["bytes"], "GB/s")
        rate = "" if whole else f"{amount / r['median'] / 1e9:.1f} {unit}"
        part = "" if whole else f"{r['fraction']:.2f}"
        # a verdict stands in the place of a ratio that nobody may rely on
        ratio = f"{r['ratio']:.2f}" if r["ratio"] else "-" if r["verdict"] in ("agrees", "floor") else r["verdict"]
        memory = f"{r['peak_memory'] / 2**20:.0f} MiB" if r.get("peak_memory") is not None else ""
        lines.append(f"{title(r):52} {r['provider']:13} {ms(r['median'])} {ms(r['p20'])} {ms(r['p80'])} {rate:>12} {part:>8} "
                     f"{ratio:>9} {memory:>9}")  # fmt: skip
        if r["provider"] == "ours" and r["plain"] and r["verdict"] == "agrees":
            lines.append(f"{'':52} {'':13} {over_the_floor(r)}")
    return "\n".join(lines)


def over_the_floor(r: dict) -> str:
    text = f"{r['median'] / r['plain']:.2f} x plain"
    if r["op"] != "model_gram":
        return text
    floor = r["plain"] + r["flops"] / (r["gemm_limit"] * 1e9)
    return f"floor (plain + n²P at the GEMM rate) {ms(floor).strip()}: {r['median'] / floor:.2f} x floor, {text}"


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:7.2f}ms" if seconds < 10 else f"{seconds:8.2f}s"


if __name__ == "__main__":
    run = json.load(open(sys.argv[1]))
    print(run["machine_info"].get("bench", {}))
    print(table([b["extra_info"] for b in run["benchmarks"] if b.get("extra_info")]))
