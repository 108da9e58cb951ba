"""The cost model: which of the three routes contracts a layer's factors into a Gram with the least time.

Counted per layer, symmetric Grams at half the Gram work (one side n, other side m; positions t and s):
  rows   t = s = 1: 2nm(d_in + d_out) FLOPs
  pairs  2nm·ts(d_in + d_out) FLOPs, and two reads of nm·ts products
  tiles  2(n·t [+ m·s])·d_in·d_out FLOPs to form gradients, then 2nm·d_in·d_out to contract them
"""

from __future__ import annotations

# GEMM FLOPs that one element of a t×t product costs beside its dot products (write, read, multiply, add);
# measured on the CPU, see bench/bench_routes.py
PAIR_ELEMENT = 64.0


def costs(n: int, m: int, t: int, s: int, d_in: int, d_out: int, symmetric: bool) -> dict[str, float]:
    """FLOPs (and their equivalent in memory traffic) of "pairs" and "tiles" for one layer."""
    half = 0.5 if symmetric else 1.0
    pairs = half * n * m * t * s * (2 * (d_in + d_out) + PAIR_ELEMENT)
    form = 2 * (n * t + (0 if symmetric else m * s)) * d_in * d_out
    return {"pairs": pairs, "tiles": form + half * 2 * n * m * d_in * d_out}


def route(n: int, m: int, t: int, s: int, d_in: int, d_out: int, symmetric: bool) -> str:
    """The route of least cost: "rows", "pairs" or "tiles"."""
    if t == 1 and s == 1:
        return "rows"
    by_cost = costs(n, m, t, s, d_in, d_out, symmetric)
    return min(by_cost, key=by_cost.get)
