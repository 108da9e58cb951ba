"""The table of a benchmark run: python bench/report.py run.json. Ratios only where the results agree."""

from __future__ import annotations

import json
import sys


def table(rows: list[dict]) -> str:
    lines = [f"{'job':44} {'provider':13} {'median':>9} {'p20':>9} {'p80':>9} {'rate':>12} {'of limit':>8} {'x ours':>7} {'memory':>9}"]
    for r in rows:
        job = r["op"] + " " + " ".join(f"{k}={v}" for k, v in r["shape"].items()) + " " + r["dtype"].removeprefix("torch.")
        whole = r["op"] == "model_gram"  # counted n²P is what a Gram of formed gradients needs: rows do far less
        rate = "" if whole else f"{r['gflops']:.0f} GFLOP/s" if r["flops"] else f"{r['gbytes']:.1f} GB/s"
        ratio = f"{r['ratio']:.2f}" if r["ratio"] else "differs"
        memory = f"{r['peak_memory'] / 2**20:.0f} MiB" if r.get("peak_memory") is not None else ""
        lines.append(f"{job:44} {r['provider']:13} {ms(r['median'])} {ms(r['p20'])} {ms(r['p80'])} {rate:>12} "
                     f"{'' if whole else format(r['fraction'], '.2f'):>8} {ratio:>7} {memory:>9}")  # fmt: skip
        if r["op"] == "model_gram" and r["provider"] == "ours" and r["plain"]:
            floor = r["plain"] + r["flops"] / (r["gemm_limit"] * 1e9)
            lines.append(f"{'':44} {'':13} floor (plain + n²P at the GEMM rate) {ms(floor).strip()}: "
                         f"{r['median'] / floor:.2f} x floor, {r['median'] / r['plain']:.2f} x plain")  # fmt: skip
    return "\n".join(lines)


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:7.2f}ms" if seconds < 10 else f"{seconds:8.2f}s"


if __name__ == "__main__":
    run = json.load(open(sys.argv[1]))
    print(run["machine_info"].get("bench", {}))
    print(table([b["extra_info"] for b in run["benchmarks"] if b.get("extra_info")]))
