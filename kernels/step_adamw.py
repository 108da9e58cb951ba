"""step_adamw: AdamW on a projected gradient for many tensors at once; specification in reference/step.py."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, multi, philox
from .multi import BLOCK, CHUNK, Group, advance, elements, find, groups, places_of, projected, stream
from .table import pointer


@triton.jit
def _adamw(
    rows, coef, step, counter, count, chunks, per, lr: tl.float64, beta1: tl.float64, beta2: tl.float64,
    log1: tl.float64, log2: tl.float64, eps: tl.float64, decay: tl.float64, noise: tl.float64,
    k0: tl.int64, k1: tl.int64, o0: tl.int64, o1: tl.int64,
    P: tl.constexpr, G: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr,
    K: tl.constexpr, NOISE: tl.constexpr, COUNTED: tl.constexpr, ALIGNED: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """g' = g − Σ_k coef_k d_k;  m, u ← means of g', g'²;  θ ← decay·θ − lr m̂ / (√û + eps) + noise ξ: written back once.

    The bias corrections come from the count of steps on the device, in float64, once a program; log1, log2: of the betas.
    Blocks follow the Philox stream as in step.py.
    Bytes: θ, m and u read and written, g and K directions read.  FLOPs: 2K + 14 a parameter, and about 40 with noise.
    Limit: bandwidth.  Fraction reached: not yet run on a GPU.
    """
    o0, o1 = stream(counter, o0, o1, COUNTED)
    t = tl.load(step).to(tl.float64)
    size = tl.cast(lr / (1 - tl.exp(t * log1)), ACC)
    root = tl.cast(1 / tl.sqrt(1 - tl.exp(t * log2)), ACC)
    rest1, rest2 = tl.cast(1 - beta1, ACC), tl.cast(1 - beta2, ACC)
    start = tl.program_id(0).to(tl.int64) * per
    i = find(rows, count, start, COLUMNS)
    for chunk in range(start, tl.minimum(start + per, chunks)):
        i = advance(rows, i, chunk, COLUMNS)
        row = rows + i.to(tl.int64) * COLUMNS
        many, place = elements(row, ALIGNED), tl.load(row + 2)
        first = (chunk - tl.load(row)) * CHUNK
        if NOISE:
            if not ALIGNED:  # ALIGNED promises a place that is a multiple of 4
                first -= place % 4
        theta, grad = pointer(tl.load(row + 3), P, ALIGNED), pointer(tl.load(row + 4), G, ALIGNED)
        mean, squares = pointer(tl.load(row + 5), ACC, ALIGNED), pointer(tl.load(row + 6), ACC, ALIGNED)
        for block in range(0, CHUNK, BLOCK):
            e = first + block + tl.arange(0, BLOCK)
            mask = (e >= 0) & (e < many)
            g = projected(tl.load(grad + e, mask=mask, other=0.0).to(ACC), row, coef, e, mask, D, ACC, K, 7, ALIGNED)
            m = tl.load(mean + e, mask=mask, other=0.0) * tl.cast(beta1, ACC) + rest1 * g
            u = tl.load(squares + e, mask=mask, other=0.0) * tl.cast(beta2, ACC) + rest2 * g * g
            tl.store(mean + e, m, mask=mask)
            tl.store(squares + e, u, mask=mask)
            new = tl.load(theta + e, mask=mask, other=0.0).to(ACC) * tl.cast(decay, ACC)
            new -= size * m / (tl.sqrt(u) * root + tl.cast(eps, ACC))
            if NOISE:
                index = (place + first + block) // 4 + tl.arange(0, BLOCK // 4)
                new += tl.cast(noise, ACC) * philox.normals(index, k0, k1, o0, o1).to(ACC)
            tl.store(theta + e, new.to(P), mask=mask)


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf


@launch.on_device
def step_adamw(
    params: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor], grads: list[Tensor], directions: list[Tensor],
    coef: Tensor, step: Tensor, lr: float, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8,
    weight_decay: float = 0.0, noise: float = 0.0, seed: int = 0, offset: int = 0, counter: Tensor | None = None,
) -> None:  # fmt: skip
    p, k = len(params), len(coef)
    places = places_of(params)
    grads, directions = [g.contiguous() for g in grads], [d.contiguous() for d in directions]
    columns = [
        [params[i], grads[i], exp_avg[i], exp_avg_sq[i], *(directions[j * p + i] for j in range(k))] for i in range(p)
    ]
    for ((dp, dg, acc, _, *dd), aligned), members in groups(columns, places if noise else None).items():
        group = Group([columns[i] for i in members], [places[i] for i in members], [0] * len(members), aligned, bool(noise))
        _adamw[(group.programs,)](
            group.rows, coef.contiguous(), step, step if counter is None else counter, *group.stretch(), lr, beta1, beta2, _log(beta1),
            _log(beta2), eps, 1 - lr * weight_decay, noise, *philox.key(seed, offset),
            P=launch.TL[dp], G=launch.TL[dg], D=launch.TL[dd[0] if dd else dp], ACC=launch.TL[acc], K=k, NOISE=bool(noise),
            COUNTED=counter is not None, ALIGNED=aligned, COLUMNS=group.columns, CHUNK=CHUNK,
            BLOCK=BLOCK * 4 // acc.itemsize, num_warps=4,
        )  # fmt: skip


def refuse(op: str, params, exp_avg, exp_avg_sq, grads, directions, coef, *rest) -> str | None:
    for i, (x, m, u) in enumerate(zip(params, exp_avg, exp_avg_sq)):
        if not m.dtype == u.dtype == torch.promote_types(x.dtype, torch.float32):
            return f"moments {i}: {m.dtype} and {u.dtype} for a parameter of {x.dtype}"
    held = (params, exp_avg, exp_avg_sq)
    return multi.refuse((held, grads, coef), held, directions, len(coef), rest)
