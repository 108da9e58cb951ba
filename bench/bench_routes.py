"""The cost model against the clock: on a grid of (n, t, d_in, d_out), how much slower its route is than the best one.

CPU time of one thread, so that other work on the machine does not decide.

    python bench/bench_routes.py [--out bench/results/<machine>/routes.json]
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from measure import machine

import entangle_fast as ef
from entangle_fast.ops import cost
from entangle_fast.storage import save_json

GRID = list(itertools.product((16, 64, 256), (1, 2, 4, 8, 16, 32, 64), ((64, 64), (256, 256), (256, 1024), (1024, 64))))
BUDGET = 6e9  # FLOPs: skip points where a route takes too long to time
LATE = 0.1  # over the best route


def timed(calls: dict) -> dict[str, float]:
    """The least CPU time of each call, all in turns: 3 rounds, and for short ones as many as fill 50 ms, 40 at the most."""
    least = {name: float("inf") for name in calls}

    def turn():
        for name, call in calls.items():
            start = time.thread_time()
            call()
            least[name] = min(least[name], time.thread_time() - start)

    turn()
    for _ in range(int(min(40, max(3, 0.05 / sum(least.values()))))):
        turn()
    return least


def points(grid: Iterable = GRID) -> list[dict]:
    """One record a point: seconds of pairs (of rows where t = 1: the same contraction) and of tiles, the route that the cost
    model chooses, and over, its time over the best one's, less 1."""
    found = []
    for n, t, (d_in, d_out) in grid:
        counted = cost.costs(n, n, t, t, d_in, d_out, True)
        if min(counted.values()) > BUDGET or max(counted.values()) > max(BUDGET, 8 * min(counted.values())):
            continue  # too long, or nothing to decide
        a, b = torch.randn(n, t, d_in), torch.randn(n, t, d_out)
        took = timed({r: partial(ef.ops.gram, a, b, route=r) for r in ("pairs", "tiles")})
        chosen = cost.route(n, n, t, t, d_in, d_out, True)
        mine = took["pairs" if chosen == "rows" else chosen]
        found.append(dict(n=n, t=t, d_in=d_in, d_out=d_out, **took, chosen=chosen, over=mine / min(took.values()) - 1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = points()
    print(f"{'n':>5} {'t':>4} {'d_in':>5} {'d_out':>5} {'pairs ms':>9} {'tiles ms':>9} {'chosen':>7} {'over best':>9}")
    for p in found:
        print(f"{p['n']:5} {p['t']:4} {p['d_in']:5} {p['d_out']:5} {p['pairs'] * 1e3:9.2f} {p['tiles'] * 1e3:9.2f} "
              f"{p['chosen']:>7} {p['over']:9.1%}")  # fmt: skip
    late = sum(p["over"] > LATE for p in found)
    print(f"{len(found)} points; worst {max(p['over'] for p in found):.1%} over the best; {late} more than {LATE:.0%} over")
    if options.out:
        save_json(options.out, {"machine_info": {"bench": machine()}, "routes": found})


if __name__ == "__main__":
    main()
