"""The cost model: which of the three routes contracts a layer's factors into a Gram with the least time.

Counted per layer in multiply-add FLOPs of a whole register panel, symmetric Grams at half the Gram work
(one side n, other side m; positions t and s; ⌈x⌉ rounds up to a panel of 32):
  rows   t = s = 1: the same contraction as pairs
  pairs  2⌈nt⌉⌈ms⌉(d_in + d_out), and the products read, multiplied and added; the factors packed
  tiles  2(n·t [+ m·s])·d_in·d_out to form gradients, then 2⌈n⌉⌈m⌉·d_in·d_out to contract them
"""

from __future__ import annotations

# Measured on the CPU (bench/bench_routes.py), as FLOPs at the rate of the panel product
FORM = 1.3  # a FLOP of forming gradients: short products, transposed afterwards
PAIR_ELEMENT = 16.0  # an element of both position products: written, read, multiplied, added
PACK_ELEMENT = 26.0  # an element of the factors, packed into panels
TILES, TILES_IN_L2 = 1.1, 0.95  # the tiles route as a whole: where its panels leave L2, and where all gradients fit
L2 = 1 << 18  # elements
CALL = 2.5e6  # what a route costs with nothing to do
PANEL = 32


def _panels(x: int) -> int:
    return -(-x // PANEL) * PANEL


def costs(n: int, m: int, t: int, s: int, d_in: int, d_out: int, symmetric: bool) -> dict[str, float]:
    """FLOPs (and their equivalent in memory traffic) of "pairs" and "tiles" for one layer."""

    def cells(left: int, right: int) -> float:  # of the output that are computed: the lower triangle with its diagonal
        left, right = _panels(left), _panels(right)
        return left * (left + PANEL) / 2 if symmetric else left * right

    positions, width = n * t + (0 if symmetric else m * s), d_in + d_out
    pairs = cells(n * t, m * s) * (2 * width + PAIR_ELEMENT) + PACK_ELEMENT * positions * width
    tiles = 2 * d_in * d_out * (FORM * positions + cells(n, m))
    return {"pairs": pairs + CALL, "tiles": (TILES_IN_L2 if n * d_in * d_out <= L2 else TILES) * (tiles + CALL)}


def route(n: int, m: int, t: int, s: int, d_in: int, d_out: int, symmetric: bool) -> str:
    """The route of least cost: "rows", "pairs" or "tiles"."""
    if t == 1 and s == 1:
        return "rows"
    by_cost = costs(n, m, t, s, d_in, d_out, symmetric)
    return min(by_cost, key=by_cost.get)
