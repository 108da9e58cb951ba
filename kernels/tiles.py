"""Shared by gram, project and sqnorm: tiles of per-sample gradients, formed into an L2-resident scratch and contracted.

For layers with many positions a per-sample gradient is smaller than its factors' pair products. A chunk of the weight,
(rows of d_out) × (columns of d_in), is formed for every sample (``form``), written to a scratch that fits the L2 cache,
and contracted at once (``accumulate``) into a few partial Grams; the next chunk overwrites the scratch, so that no
per-sample gradient is ever in device memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, tune
from .launch import cdiv
from .layer import Layer, Side, column_offsets, row_offsets

SCRATCH_BYTES = 24 << 20  # per side; half of an H100's 50 MB L2 for two sides
FORM = {
    # a tile of o × c reads (o + c)·t elements from the L2: 85 FLOP a byte for 128 × 256, 64 for 128²
    2: [dict(BO=128, BC=128, BT=32, num_warps=8, num_stages=3), dict(BO=64, BC=128, BT=64, num_warps=4, num_stages=3),
        dict(BO=128, BC=256, BT=64, num_warps=8, num_stages=3, on=9)],
    4: [dict(BO=64, BC=64, BT=32, num_warps=8, num_stages=2), dict(BO=64, BC=64, BT=16, num_warps=4, num_stages=3)],
}
ACCUMULATE = {
    2: [dict(BM=128, BN=128, BK=64, num_warps=8, num_stages=3), dict(BM=64, BN=64, BK=128, num_warps=4, num_stages=3)],
    4: [dict(BM=64, BN=64, BK=16, num_warps=8, num_stages=2), dict(BM=64, BN=64, BK=32, num_warps=8, num_stages=2)],
}
FEW = {2: [dict(BM=64, BN=64, BK=64, num_warps=4, num_stages=4)], 4: ACCUMULATE[4]}  # at most 64 rows on one side


@triton.jit
def gradient_tile(
    a, b, rows, columns, o, om, c, cm, t_count, a_position, b_position,
    TABLED: tl.constexpr, VEC: tl.constexpr, PREC: tl.constexpr,
    BO: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """G[o, c] = Σ_t b[t, o] a[t, c] of one sample in float32 (BO, BC); a, b point at the sample."""
    acc = tl.zeros((BO, BC), tl.float32)
    off = column_offsets(columns, c, cm, TABLED, VEC)
    for start in range(0, t_count, BT):
        t = start + tl.arange(0, BT)
        tm = t < t_count
        ro = row_offsets(rows, t, tm, a_position, TABLED, VEC)
        u = tl.load(b + t.to(tl.int64)[:, None] * b_position + o[None, :], mask=tm[:, None] & om[None, :], other=0.0)
        v = tl.load(a + ro[:, None] + off[None, :], mask=tm[:, None] & cm[None, :], other=0.0)
        acc = tl.dot(tl.trans(u), v, acc, input_precision=PREC)
    return acc


@triton.jit
def nearest_tf32(x):
    """float32 → the nearest value that tf32 has: tensor cores cut the other 13 bits off, which biases a sum of products."""
    bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def _form(
    a, b, rows, columns, scratch, pitch, t_count, a_sample, a_position, b_sample, b_position,
    o_first, o_count, c_first, c_count,
    TABLED: tl.constexpr, VEC: tl.constexpr, PREC: tl.constexpr, ROUND: tl.constexpr,
    BO: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """scratch[i, o·c_count + c] = G_i[o_first + o, c_first + c].

    ROUND: to what tf32 keeps, for a float32 scratch that is contracted so.
    Bytes: a and b once per tile that needs them (L2), scratch written once.  FLOPs: 2·n·t·o_count·c_count.
    Limit: tensor cores for t ≥ 64.  Fraction reached: not yet run on a GPU.
    """
    tiles_c = tl.cdiv(c_count, BC)
    tiles = tl.cdiv(o_count, BO) * tiles_c
    i, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles  # a grid's second axis ends at 65535
    o = (tile // tiles_c) * BO + tl.arange(0, BO)
    c = (tile % tiles_c) * BC + tl.arange(0, BC)
    om, cm = o < o_count, c < c_count
    g = gradient_tile(
        a + i * a_sample, b + i * b_sample, rows, columns, o_first + o, om, c_first + c, cm, t_count,
        a_position, b_position, TABLED, VEC, PREC, BO, BC, BT,
    )  # fmt: skip
    if ROUND:
        g = nearest_tf32(g)
    at = i * pitch + o.to(tl.int64)[:, None] * c_count + c[None, :]
    tl.store(scratch + at, g.to(scratch.dtype.element_ty), mask=om[:, None] & cm[None, :])


@triton.jit
def _accumulate(
    x, y, partial, n, m, x_pitch, y_pitch, width, per_split, first,
    SYMMETRIC: tl.constexpr, ALONE: tl.constexpr, ROUND: tl.constexpr, PREC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """partial[split] (n, m) += x (n, width) · y (m, width)ᵀ over this split's columns; set, not added, when first.

    Each split owns its partial: launches of one stream add in order, so the sum is the same every time.
    ALONE: x is y, and all of it one tile: read once for both. ROUND: y, which nobody formed here, to what tf32 keeps.
    Bytes: (n + m)·width of the scratch, from L2; half when alone.  FLOPs: 2·n·m·width, half when symmetric (tiles below
    the diagonal return at once).  Limit: the L2 at n ≤ 128, else tensor cores.  Fraction reached: not yet run on a GPU.
    """
    tiles = tl.cdiv(m, BN)
    i0 = (tl.program_id(0) // tiles) * BM
    j0 = (tl.program_id(0) % tiles) * BN
    if SYMMETRIC:
        if j0 + BN <= i0:
            return
    i, j = i0 + tl.arange(0, BM), j0 + tl.arange(0, BN)
    im, jm = i < n, j < m
    xo, yo = i.to(tl.int64) * x_pitch, j.to(tl.int64) * y_pitch
    acc = tl.zeros((BM, BN), tl.float32)
    start = tl.program_id(1) * per_split
    stop = min(start + per_split, width)
    for k in range(start, stop, BK):
        c = k + tl.arange(0, BK)
        cm = c < stop
        u = tl.load(x + xo[:, None] + c[None, :], mask=im[:, None] & cm[None, :], other=0.0)
        if ALONE:
            acc = tl.dot(u, tl.trans(u), acc, input_precision=PREC)
        else:
            v = tl.load(y + yo[:, None] + c[None, :], mask=jm[:, None] & cm[None, :], other=0.0)
            if u.dtype != v.dtype:
                u, v = u.to(tl.float32), v.to(tl.float32)
            if ROUND:
                v = nearest_tf32(v)
            acc = tl.dot(u, tl.trans(v), acc, input_precision=PREC)
    at = partial + tl.program_id(1).to(tl.int64) * n * m + i.to(tl.int64)[:, None] * m + j[None, :]
    mask = im[:, None] & jm[None, :]
    if first == 0:
        acc += tl.load(at, mask=mask, other=0.0)
    tl.store(at, acc, mask=mask)


@triton.jit
def _finish(partial, out, n, m, count, SYMMETRIC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """out (n, m) = Σ_split partial[split], in the order of the splits; below the diagonal from above it.

    Bytes: count·4nm read, 4nm written.  FLOPs: count·nm.  Limit: latency.  Fraction reached: not yet run on a GPU.
    """
    i = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    j = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)[None, :]
    mask = (i < n) & (j < m)
    at = tl.minimum(i, j) * m + tl.maximum(i, j) if SYMMETRIC else i * m + j
    acc = tl.zeros((BM, BN), tl.float32)
    for s in range(0, count):
        acc += tl.load(partial + s * tl.cast(n, tl.int64) * m + at, mask=mask, other=0.0)
    tl.store(out + i * m + j, acc, mask=mask)


def finish(partial: Tensor, symmetric: bool) -> Tensor:
    """(splits, n, m) float32 → (n, m)."""
    count, n, m = partial.shape
    out = partial.new_empty(n, m)
    _finish[(cdiv(n, 32), cdiv(m, 64))](partial, out, n, m, count, SYMMETRIC=symmetric, BM=32, BN=64, num_warps=4)
    return out


def scratch_dtype(dtype: torch.dtype) -> torch.dtype:
    """bfloat16 gradients round to bfloat16 (float32's range); float16 ones would underflow: they stay float32."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def chunks(samples: int, layer: Layer, itemsize: int, whole_rows: bool = False):
    """Rectangles (o_first, o_count, c_first, c_count) of one group's weight whose gradients fill the scratch.

    whole_rows: rectangles span all of d_in, so that their elements are consecutive in the weight.
    """
    columns = max(SCRATCH_BYTES // (itemsize * max(samples, 1)), 1)
    tall = min(layer.d_out, 128)
    wide = layer.d_in
    if not whole_rows and columns // layer.d_in < tall:
        wide = min(layer.d_in, max(128, columns // tall // 128 * 128))
    if wide == layer.d_in:
        tall = min(layer.d_out, max(columns // layer.d_in // 128 * 128, min(tall, 64 if whole_rows else tall)))
    for o in range(0, layer.d_out, tall):
        for c in range(0, layer.d_in, wide):
            yield o, min(tall, layer.d_out - o), c, min(wide, layer.d_in - c)


def form(layer: Layer, s: Side, group: int, scratch: Tensor, chunk: tuple[int, int, int, int]) -> None:
    """Gradients of all samples of ``s``, for one chunk of one group, into scratch (≥ n, pitch)."""
    o, o_count, c, c_count = chunk
    cfg = tune.config("form", FORM[s.a.element_size()], str(s.a.dtype), layer.aligned(s))
    grid = (cdiv(o_count, cfg["BO"]) * cdiv(c_count, cfg["BC"]) * s.n,)
    a = s.a.flatten()[group * layer.a_group :] if layer.tabled else s.a
    b = s.b.flatten()[group * layer.b_group :] if layer.tabled else s.b
    _form[grid](
        a, b, *layer.tables(s.a), scratch, scratch.stride(0), s.t, s.a_sample, s.a_position, s.b_sample, s.b_position,
        o, o_count, c, c_count, TABLED=layer.tabled, VEC=layer.vec, PREC=launch.precision(s.a.dtype),
        ROUND=scratch.dtype == torch.float32 and contract_precision(s.a.dtype) == "tf32", **cfg,
    )  # fmt: skip


def accumulate(x: Tensor, y: Tensor, partial: Tensor, width: int, first: bool, symmetric: bool, exact: str, given: bool = False) -> None:
    """partial (splits, n, m) += x[:, :width] · y[:, :width]ᵀ; x, y with unit stride inside. given: y was not formed here."""
    count, n, m = partial.shape
    name, configs = ("few", FEW) if min(n, m) <= 64 else ("accumulate", ACCUMULATE)
    cfg = tune.config(name, configs[max(x.element_size(), y.element_size())], str(x.dtype))
    alone = symmetric and n <= cfg["BM"] == cfg["BN"]
    per = cdiv(cdiv(width, count), cfg["BK"]) * cfg["BK"]
    grid = (cdiv(n, cfg["BM"]) * cdiv(m, cfg["BN"]), count)
    _accumulate[grid](
        x, y, partial, n, m, x.stride(0), y.stride(0), width, per, int(first), SYMMETRIC=symmetric, ALONE=alone,
        ROUND=given and exact == "tf32", PREC=exact, **cfg,
    )  # fmt: skip


def partials(n: int, m: int, like: Tensor) -> Tensor:
    """Empty partial sums (splits, n, m): as many splits as fill the device."""
    tiles = cdiv(n, 128) * cdiv(m, 128)
    return like.new_empty(launch.splits(tiles, 256, like), n, m, dtype=torch.float32)


def contract_precision(dtype: torch.dtype) -> str:
    """For scratch rows: float16 gradients kept in float32 have float16's 10 bits of mantissa: tf32 keeps them."""
    return "tf32" if dtype == torch.float16 else launch.precision(dtype)


def gram(layer: Layer, left: Side, right: Side | None) -> Tensor:
    """Σ over groups and chunks of scratch · scratchᵀ, (n, m) float32."""
    other = left if right is None else right
    dtype = scratch_dtype(left.a.dtype)
    plan = list(chunks(max(left.n, other.n), layer, dtype.itemsize))
    width = plan[0][1] * plan[0][3]
    pitch = cdiv(width, 64) * 64  # rows begin on a cache line
    x = left.a.new_empty(left.n, pitch, dtype=dtype)
    y = x if right is None else left.a.new_empty(other.n, pitch, dtype=dtype)
    partial, first = partials(left.n, other.n, left.a), True
    for group in range(layer.groups):
        for chunk in plan:
            form(layer, left, group, x, chunk)
            if right is not None:
                form(layer, right, group, y, chunk)
            accumulate(x, y, partial, chunk[1] * chunk[3], first, right is None, contract_precision(left.a.dtype))
            first = False
    return finish(partial, right is None)


def project(layer: Layer, s: Side, k: int, contract) -> Tensor:
    """(n, k) float32: contract(scratch, partial, width, first element of the weight, first launch) adds each chunk of gradients."""
    dtype = scratch_dtype(s.a.dtype)
    plan = list(chunks(s.n, layer, dtype.itemsize, whole_rows=True))
    scratch = s.a.new_empty(s.n, cdiv(plan[0][1] * plan[0][3], 64) * 64, dtype=dtype)
    partial, first = partials(s.n, k, s.a), True
    for group in range(layer.groups):
        for chunk in plan:
            form(layer, s, group, scratch, chunk)
            at = (group * layer.d_out + chunk[0]) * layer.d_in
            contract(scratch, partial, chunk[1] * chunk[3], at, first)
            first = False
    return finish(partial, False)
