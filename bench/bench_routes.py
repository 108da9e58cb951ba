"""The cost model against the clock: on a grid of (n, t, d_in, d_out), how much slower its route is than the best one.

CPU time of one thread, so that other work on the machine does not decide; python bench/bench_routes.py
"""

from __future__ import annotations

import itertools
import time

import torch

import entangle_fast as ef
from entangle_fast.ops import cost

GRID = list(itertools.product((16, 64, 256), (1, 2, 4, 8, 16, 32, 64), ((64, 64), (256, 256), (256, 1024), (1024, 64))))
BUDGET = 6e9  # FLOPs: skip points where a route takes too long to time


def timed(call, least=2) -> float:
    call()
    best = []
    for _ in range(least):
        start = time.thread_time()
        call()
        best.append(time.thread_time() - start)
    return min(best)


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    print(f"{'n':>5} {'t':>4} {'d_in':>5} {'d_out':>5} {'pairs ms':>9} {'tiles ms':>9} {'chosen':>7} {'over best':>9}")
    for n, t, (d_in, d_out) in GRID:
        counted = cost.costs(n, n, t, t, d_in, d_out, True)
        if max(counted.values()) > BUDGET and min(counted.values()) * 8 < max(counted.values()):
            continue  # nothing to decide
        if min(counted.values()) > BUDGET:
            continue
        a, b = torch.randn(n, t, d_in), torch.randn(n, t, d_out)
        took = {r: timed(lambda r=r: ef.ops.gram(a, b, route=r)) for r in ("pairs", "tiles")}
        chosen = cost.route(n, n, t, t, d_in, d_out, True)
        took["rows"] = took["pairs"]
        over = took[chosen] / min(took.values()) - 1
        rows.append((n, t, d_in, d_out, took["pairs"], took["tiles"], over))
        print(f"{n:5} {t:4} {d_in:5} {d_out:5} {took['pairs'] * 1e3:9.2f} {took['tiles'] * 1e3:9.2f} {chosen:>7} {over:9.1%}")
    worst = max(r[-1] for r in rows)
    late = [r for r in rows if r[-1] > 0.1]
    print(f"{len(rows)} points; worst {worst:.1%} over the best; {len(late)} more than 10% over")


if __name__ == "__main__":
    main()
