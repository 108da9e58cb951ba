"""w2: Wasserstein-2 distances with their per-sample weights; specification in reference/w2.py."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .launch import accumulate_dtype, cdiv

BLOCK = 1024
GROWTH, POLISH = 14, 5  # Newton–Schulz steps: singular values ≥ 1e-6 of the norm reach 1 within float64 rounding


@triton.jit
def _sorted(
    x, y, order, weights, partial, n, m, steps, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    """x (n,), y (m,) sorted: weights[order[i]] = 2 Σ_j mass_ij (x_i − y_j), partial[program] = Σ mass (x_i − y_j)².

    mass_ij = |[i/n, (i+1)/n) ∩ [j/m, (j+1)/m)| in exact integers over n·m; steps bounds the j that meet one i.
    Bytes: x, order, weights once, y once or more (L2).  FLOPs: about 8 for each of n + m overlaps.
    Limit: bandwidth; the device sort before it costs several times more.  Fraction reached: not yet run on a GPU.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    v = tl.load(x + i, mask=mask, other=0.0).to(ACC)
    total = tl.cast(n, tl.int64) * m
    lo, hi = i * m, (i + 1) * m
    slope, value = tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), tl.float64)
    for s in range(0, steps):
        j = lo // n + s
        there = mask & (j < m)
        gap = v - tl.load(y + j, mask=there, other=0.0).to(ACC)
        overlap = tl.maximum(tl.minimum(hi, (j + 1) * n) - tl.maximum(lo, j * n), 0)
        share = tl.where(there, overlap.to(tl.float64) / total.to(tl.float64), 0.0)
        slope += (2.0 * share * gap.to(tl.float64)).to(ACC)
        value += share * gap.to(tl.float64) * gap.to(tl.float64)
    tl.store(weights + tl.load(order + i, mask=mask, other=0), slope, mask=mask)
    tl.store(partial + tl.program_id(0), tl.sum(value, 0))


@triton.jit
def _values(x, y, side, e, mask):
    if side == 0:
        v = tl.load(x + e, mask=mask, other=0.0).to(tl.float64)
    else:
        v = tl.load(y + e, mask=mask, other=0.0).to(tl.float64)
    return v


@triton.jit
def _moments(x, y, partial, n, m, per, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """partial[side, program] = (count, mean, M2) of a stretch of x or y, in float64 about the mean of its first block.

    Sums over the program's threads only there and at the end. VEC: elements of a thread's 16 bytes.
    Bytes: x and y once.  FLOPs: 4 an element.  Limit: bandwidth.  Fraction reached: not yet run on a GPU.
    """
    side = tl.program_id(1)
    length = tl.where(side == 0, n, m)
    start = tl.program_id(0).to(tl.int64) * per
    stop = tl.minimum(start + per, length)
    e = start + tl.arange(0, BLOCK)
    v = _values(x, y, side, e, e < stop)
    base = tl.sum(v, 0) / tl.maximum(tl.minimum(stop - start, BLOCK), 1).to(tl.float64)
    d = tl.reshape(tl.where(e < stop, v - base, 0.0), (BLOCK // VEC, VEC))
    off, square = tl.sum(d, 1), tl.sum(d * d, 1)
    for k in range(start + BLOCK, stop, BLOCK):
        e = k + tl.arange(0, BLOCK)
        v = _values(x, y, side, e, e < stop)
        d = tl.reshape(tl.where(e < stop, v - base, 0.0), (BLOCK // VEC, VEC))
        off += tl.sum(d, 1)
        square += tl.sum(d * d, 1)
    count = tl.maximum(stop - start, 0).to(tl.float64)
    shift = tl.sum(off, 0) / tl.maximum(count, 1.0)
    at = partial + (side * tl.num_programs(0) + tl.program_id(0)) * 3
    tl.store(at, count)
    tl.store(at + 1, base + shift)
    spread = tl.sum(square, 0) - count * shift * shift
    tl.store(at + 2, tl.where(spread < 0.0, 0.0, spread))  # NaN stays


@triton.jit
def _joined(partial, programs, COUNT: tl.constexpr):
    """(mean, M2 / count) of the stretches' moments, Chan's formula about the joint mean."""
    p = tl.arange(0, COUNT)
    mask = p < programs
    size = tl.load(partial + 3 * p, mask=mask, other=0.0)
    own = tl.load(partial + 3 * p + 1, mask=mask, other=0.0)
    total = tl.sum(size, 0)
    mean = tl.sum(size * own, 0) / total
    spread = tl.load(partial + 3 * p + 2, mask=mask, other=0.0) + size * (own - mean) * (own - mean)
    return mean, tl.sum(spread, 0) / total


@triton.jit
def _moment_weights(
    x, partial, value, weights, n, programs, ACC: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr
):
    """weights = (2/n)(μ−μ̄ + (σ−σ̄)(x−μ)/σ); program 0 writes value = (μ−μ̄)² + (σ−σ̄)².

    Bytes: x read, weights written, once.  Limit: bandwidth.  Fraction reached: not yet run on a GPU.
    """
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + e, mask=e < n, other=0.0).to(tl.float64)  # on its way while the moments are joined
    mean, var = _joined(partial, programs, COUNT)
    other_mean, other_var = _joined(partial + 3 * programs, programs, COUNT)
    sigma = tl.sqrt(var)
    shift, stretch = mean - other_mean, sigma - tl.sqrt(other_var)
    if tl.program_id(0) == 0:
        tl.store(value, (shift * shift + stretch * stretch).to(ACC))
    slope = tl.where(sigma > 0.0, stretch / tl.where(sigma > 0.0, sigma, 1.0), 0.0)
    tl.store(weights + e, (2.0 * (shift + slope * (v - mean)) / n).to(ACC), mask=e < n)


@launch.on_device
def w2_sorted(losses: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(losses)
    x, order = losses.to(dtype).sort(stable=True)
    y = reference.to(dtype).sort().values
    n, m = len(x), len(y)
    programs = cdiv(n, BLOCK)
    weights, partial = torch.empty_like(x), x.new_empty(programs, dtype=torch.float64)
    steps = 1 if n == m else cdiv(m, n) + 1
    _sorted[(programs,)](x, y, order, weights, partial, n, m, steps, ACC=launch.TL[dtype], BLOCK=BLOCK, num_warps=4)
    return partial.sum().to(dtype), weights


@launch.on_device
def w2_moments(losses: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(losses)
    x, y = losses.contiguous(), reference.contiguous()
    n, m = len(x), len(y)
    block = 2048 if dtype == torch.float64 else 4096  # 128 or 64 bytes a thread at once
    programs = min(cdiv(max(n, m), block), 256)
    per = cdiv(cdiv(max(n, m), programs), block) * block
    programs = cdiv(max(n, m), per)
    partial = x.new_empty(2, programs, 3, dtype=torch.float64)
    value, weights = x.new_empty((), dtype=dtype), x.new_empty(n, dtype=dtype)
    _moments[(programs, 2)](x, y, partial, n, m, per, VEC=16 // x.element_size(), BLOCK=block, num_warps=4)
    _moment_weights[(cdiv(n, BLOCK),)](
        x, partial, value, weights, n, programs, ACC=launch.TL[dtype], COUNT=launch.power_of_2(programs),
        BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return value, weights


def _polynomials():
    """Odd quintics a s + b s³ + c s⁵: steep at zero first (growth 3.44 a step), then the one that converges to 1."""
    return [(3.4445, -4.7750, 2.0315)] * GROWTH + [(1.875, -1.25, 0.375)] * POLISH


def _polar_of_product(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """For C = x yᵀ: its nuclear norm and polar(C) y, by Newton–Schulz on whichever of n×m or d×d is smaller.

    Only matrix products, so nothing waits for the host; float64, so that rounding in C's null space, grown by
    3.44^GROWTH ≈ 3e7, stays below 1e-8 while singular values down to 1e-6 of ‖C‖ converge.
    """
    d = x.shape[1]
    if d < min(len(x), len(y)):  # every iterate is x A yᵀ: run on A (d, d), which stays in C's spaces
        s, t = x.mT @ x, y.mT @ y
        norm = ((s @ t).diagonal().sum()).clamp(min=0).sqrt()  # ‖x yᵀ‖_F
        a = torch.eye(d, dtype=x.dtype, device=x.device) / norm.clamp(min=torch.finfo(x.dtype).tiny)
        for p, q, r in _polynomials():
            z = t @ a.mT @ s  # X Xᵀ X = x (A z A) yᵀ
            za = z @ a
            a = p * a + a @ (q * za + r * (za @ za))
        return (a * (s @ t)).sum(), x @ (a @ t)
    c = x @ y.mT
    u = c / c.square().sum().sqrt().clamp(min=torch.finfo(c.dtype).tiny)
    wide = u.shape[0] <= u.shape[1]
    u = u if wide else u.mT
    for p, q, r in _polynomials():
        g = u @ u.mT
        u = p * u + (q * g + r * (g @ g)) @ u
    u = u if wide else u.mT
    return (u * c).sum(), u @ y


@launch.on_device
def w2_features(features: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(features)
    x, y = features.double(), reference.double()
    n, m = len(x), len(y)
    shift = x.mean(0) - y.mean(0)
    xc, yc = x - x.mean(0), y - y.mean(0)
    nuclear, moved = _polar_of_product(xc, yc)
    scale = 2 / math.sqrt(n * m)
    value = shift.square().sum() + xc.square().sum() / n + yc.square().sum() / m - scale * nuclear
    return value.clamp(min=0).to(dtype), ((2 / n) * (shift + xc) - scale * moved).to(dtype)


def refuse(op: str, *args) -> str | None:
    losses, reference = args[:2]
    if losses.dtype != reference.dtype:
        return f"losses {losses.dtype} against reference {reference.dtype}"
    return launch.refuse_factors(losses, reference, dtypes=launch.FLOATS)
