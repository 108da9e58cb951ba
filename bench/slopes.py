"""Cost against size: per-sample Grams over n, the projected step and squared norms over P; slopes in log-log next to theory.

    python bench/slopes.py [--out bench/results/<machine>/slopes.json]

A slope is fitted over the upper half of the sizes. Theory is the same fit through the counted work: FLOPs
  plain      of a forward and a backward, as torch counts them: ∝ n
  gram       the contraction alone: n² Σ(d_in + d_out) for rows (MLP); n²P and 2ntP to form gradients for tiles (CNN)
  ours       4/6 of plain's, for no weight gradient is formed, and those of gram
and bytes for the step (44 a parameter), n t² (d_in + d_out) for squared norms of a square layer of P weights: ∝ √P.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from measure import machine
from models import build
from peers import GRAM, captured, plain
from step_jobs import BYTES, step
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import entangle_fast as ef
from entangle_fast.storage import save_json

SAMPLES = tuple(2**k for k in range(4, 13))
PARAMETERS = (10**5, 3 * 10**5, 10**6, 3 * 10**6, 10**7, 3 * 10**7, 10**8)
SECONDS = 0.5  # a point's repetitions


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least squares of log y on log x over the upper half of the points."""
    half = len(x) // 2
    u, v = ([math.log(value) for value in side[half:]] for side in (x, y))
    a, b = statistics.fmean(u), statistics.fmean(v)
    return sum((p - a) * (q - b) for p, q in zip(u, v)) / sum((p - a) ** 2 for p in u)


def clock(call: Callable) -> float:
    """Median of at least 3 runs, of as many as SECONDS allow; the first is not counted."""
    call()
    took: list[float] = []
    while len(took) < 3 or (sum(took) < SECONDS and len(took) < 15):
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    return statistics.median(took)


def series(panel: str, name: str, axis: str, x: Sequence[int], seconds: Sequence[float], work: Sequence[float]) -> dict:
    return {"panel": panel, "name": name, "axis": axis, "x": list(x), "seconds": list(seconds), "work": list(work),
            "slope": slope(x, seconds), "theory": slope(x, work)}  # fmt: skip


def over_samples(name: str, sizes: Sequence[int]) -> list[dict]:
    took: dict[str, list[float]] = {"ours": [], "gram": [], "plain": []}
    for n in sizes:
        model, x, y = build(name, n)
        took["plain"].append(clock(plain(model, x, y)))
        took["ours"].append(clock(GRAM["ours"](model, x, y)))
        took["gram"].append(clock(captured(model, x, y).gram))
    linear = _flops(name)
    quadratic, forming = _contraction(name)
    gram = [quadratic * n * n + forming * n for n in sizes]
    work = {"plain": [linear * n for n in sizes], "gram": gram, "ours": [linear * n * 4 / 6 + g for n, g in zip(sizes, gram)]}
    return [series(name, kind, "n", sizes, took[kind], work[kind]) for kind in took]


def _flops(name: str) -> float:
    """Of one sample's forward and backward."""
    model, x, y = build(name, 2)
    with FlopCounterMode(display=False) as counter:
        plain(model, x, y)()
    return counter.get_total_flops() / 2


def _contraction(name: str) -> tuple[float, float]:
    """FLOPs of the Gram's contraction: the coefficients of n² and of n, linear and convolution weights."""
    model, x, _ = build(name, 1)
    quadratic = forming = 0.0

    def count(layer, _, out):
        nonlocal quadratic, forming
        if isinstance(layer, nn.Linear):
            quadratic += layer.in_features + layer.out_features
        else:
            quadratic += layer.weight.numel()
            forming += 2 * layer.weight.numel() * out[0, 0].numel()

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    model(x)
    for hook in hooks:
        hook.remove()
    return quadratic, forming


def over_parameters(sizes: Sequence[int], n: int = 64, t: int = 16) -> list[dict]:
    took: dict[str, list[float]] = {"step, ours": [], "step, _foreach": [], "sqnorm": []}
    for P in sizes:
        calls = step(P, "projected").make(("ours", "foreach"))
        took["step, ours"].append(clock(calls["ours"]))
        took["step, _foreach"].append(clock(calls["foreach"]))
        del calls
        d = math.isqrt(P)
        a, b = torch.randn(n, t, d), torch.randn(n, t, d)
        took["sqnorm"].append(clock(lambda a=a, b=b: ef.ops.sqnorm(a, b)))
    moved = [float(BYTES["projected"]) * P for P in sizes]
    work = {"step, ours": moved, "step, _foreach": moved, "sqnorm": [2.0 * n * t * t * 2 * math.isqrt(P) for P in sizes]}
    return [series("parameters", kind, "P", sizes, took[kind], work[kind]) for kind in took]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = [*over_samples("small_mlp", SAMPLES), *over_samples("small_cnn", SAMPLES), *over_parameters(PARAMETERS)]
    print(f"{'':12} {'':16} {'from':>8} {'to':>10} {'slope':>7} {'theory':>7}")
    for s in found:
        print(f"{s['panel']:12} {s['name']:16} {s['x'][0]:>8} {s['x'][-1]:>10} {s['slope']:7.2f} {s['theory']:7.2f}")
    if options.out:
        save_json(options.out, {"machine_info": {"bench": machine()}, "slopes": found})


if __name__ == "__main__":
    main()
