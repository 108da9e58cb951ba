"""combine: Σ_i w_i G_i, m weightings in one launch; specification in reference/combine.py.

A weight gradient whose rows are scaled as they are loaded: out[m] = (w_m ∘ b)ᵀ a over all rows (sample, position).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, layer, tune
from .launch import cdiv
from .layer import Layer, Side, column_offsets, row_offsets

COMBINE = {
    2: [dict(BO=128, BC=128, BR=32, num_warps=8, num_stages=3), dict(BO=64, BC=128, BR=64, num_warps=4, num_stages=3)],
    4: [dict(BO=64, BC=64, BR=16, num_warps=8, num_stages=2), dict(BO=64, BC=64, BR=32, num_warps=8, num_stages=2)],
}


@triton.jit
def _combine(
    a, b, w, rows, columns, out, n, t, d_in, d_out, m, per_split,
    a_sample, a_position, b_sample, b_position, w_row, w_column, groups, a_group, b_group,
    TABLED: tl.constexpr, VEC: tl.constexpr, PREC: tl.constexpr,
    BO: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out[split, k, g, o, c] = Σ_r w[k, i(r)] b[r, g, o] a[r, g, c] over this split's rows r = (sample i, position).

    Bytes: a and b once per tile that needs them, the m weightings of a tile side by side in L2; out once.
    FLOPs: 2·m·n·t·d_in·d_out.  Limit: tensor cores for n·t ≥ 300, else writing out.
    Fraction reached: not yet run on a GPU.
    """
    tiles_c = tl.cdiv(d_in, BC)
    k = tl.program_id(0) % m
    tile = tl.program_id(0) // m
    g = tl.program_id(2) % groups
    split = tl.program_id(2) // groups
    o = (tile // tiles_c) * BO + tl.arange(0, BO)
    c = (tile % tiles_c) * BC + tl.arange(0, BC)
    om, cm = o < d_out, c < d_in
    a += g * a_group
    b += g * b_group
    off = column_offsets(columns, c, cm, TABLED, VEC)
    acc = tl.zeros((BO, BC), tl.float32)
    total = tl.cast(n, tl.int64) * t
    start = split.to(tl.int64) * per_split
    for r0 in range(start, min(start + per_split, total), BR):
        r = r0 + tl.arange(0, BR)
        rm = r < min(start + per_split, total)
        i, p = r // t, r % t
        ao = i * a_sample + row_offsets(rows, p, rm, a_position, TABLED, VEC)
        bo = i * b_sample + p * b_position
        s = tl.load(w + k.to(tl.int64) * w_row + i * w_column, mask=rm, other=0.0).to(tl.float32)
        u = tl.load(b + bo[:, None] + o[None, :], mask=rm[:, None] & om[None, :], other=0.0)
        v = tl.load(a + ao[:, None] + off[None, :], mask=rm[:, None] & cm[None, :], other=0.0)
        # v, not u: Triton 3.6 overwrites a left operand made in registers while wgmma may still read it (triton issue 9433)
        v = (v.to(tl.float32) * s[:, None]).to(u.dtype)
        acc = tl.dot(tl.trans(u), v, acc, input_precision=PREC)
    at = (((split.to(tl.int64) * m + k) * groups + g) * d_out + o)[:, None] * d_in + c[None, :]
    tl.store(out + at, acc, mask=om[:, None] & cm[None, :])


@triton.jit
def _scatter(
    ids, order, b, w, out, count, t, d, m, num, b_sample, b_position, w_row, w_column, padding_idx, BLOCK: tl.constexpr
):
    """out[k, v] = Σ_{positions with id v} w[k, i] b_it: one program for each run of equal sorted ids, in sorted order.

    Deterministic: no atomics. A run is summed by one program, so one id on most positions is the slow case.
    Bytes: b once per weighting, gathered; the touched rows of out.  FLOPs: 2·m·n·t·d.  Limit: bandwidth.
    Fraction reached: not yet run on a GPU.
    """
    p = tl.program_id(0).to(tl.int64)
    row = tl.load(ids + p)
    before = tl.load(ids + tl.maximum(p - 1, 0))
    if (p > 0) & (before == row):
        return
    if row == padding_idx:
        return
    k = tl.program_id(2).to(tl.int64)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    here = row
    while (p < count) & (here == row):
        at = tl.load(order + p)
        i, q = at // t, at % t
        s = tl.load(w + k * w_row + i * w_column).to(tl.float32)
        acc += s * tl.load(b + i * b_sample + q * b_position + e, mask=e < d, other=0.0).to(tl.float32)
        p += 1
        here = tl.load(ids + p, mask=p < count, other=-1)
    tl.store(out + (k * num + row) * d + e, acc, mask=e < d)


def _contract(shape: Layer, s: Side, w: Tensor) -> Tensor:
    """(m, groups·d_out, d_in) float32, columns in the layer's own order."""
    m = w.shape[0]
    if 0 in (m, s.n, s.t, shape.d_in, shape.d_out):
        return s.a.new_zeros(m, shape.groups * shape.d_out, shape.d_in, dtype=torch.float32)
    cfg = tune.config("combine", COMBINE[s.a.element_size()], str(s.a.dtype))
    tiles = cdiv(shape.d_out, cfg["BO"]) * cdiv(shape.d_in, cfg["BC"]) * m
    total = s.n * s.t
    # a split costs a float32 copy of the result: worth it only for at least 8 blocks of rows
    count = launch.splits(tiles * shape.groups, cdiv(total, 8 * cfg["BR"]), s.a)
    per = cdiv(cdiv(total, count), cfg["BR"]) * cfg["BR"]
    count = cdiv(total, per)
    out = s.a.new_empty(count, m, shape.groups * shape.d_out, shape.d_in, dtype=torch.float32)
    _combine[(tiles, 1, shape.groups * count)](
        s.a, s.b, w, *shape.tables(s.a), out, s.n, s.t, shape.d_in, shape.d_out, m, per,
        s.a_sample, s.a_position, s.b_sample, s.b_position, w.stride(0), w.stride(1),
        shape.groups, shape.a_group, shape.b_group,
        TABLED=shape.tabled, VEC=shape.vec, PREC=launch.precision(s.a.dtype), **cfg,
    )  # fmt: skip
    return out[0] if count == 1 else out.sum(0)


@launch.on_device
def combine(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    return _contract(*layer.linear(a, b), w)


@launch.on_device
def combine_conv(x: Tensor, g: Tensor, w: Tensor, kernel_size, stride, padding, dilation, groups: int) -> Tensor:
    shape, s = layer.conv(x, g, kernel_size, stride, padding, dilation, groups)
    return layer.weight_order(_contract(shape, s, w), x.shape[1] // groups, kernel_size)


@launch.on_device
def combine_embedding(ids: Tensor, b: Tensor, w: Tensor, num_embeddings: int, padding_idx: int = -1) -> Tensor:
    s = layer.side(b, b)
    m, d = w.shape[0], b.shape[-1]
    out = b.new_zeros(m, num_embeddings, d, dtype=torch.float32)
    if 0 in (m, s.n, s.t, d):
        return out
    flat, order = ids.reshape(-1).sort(stable=True)
    block = launch.power_of_2(d, 32, 512)
    _scatter[(flat.numel(), cdiv(d, block), m)](
        flat, order, s.b, w, out, flat.numel(), s.t, d, m, num_embeddings, s.b_sample, s.b_position,
        w.stride(0), w.stride(1), padding_idx, BLOCK=block, num_warps=2,
    )  # fmt: skip
    return out


def refuse(op: str, *args) -> str | None:
    if args[2].dtype not in launch.LOW:
        return f"w: dtype {args[2].dtype} is not one of {', '.join(map(str, launch.LOW))}"
    return launch.refuse_factors(*args[:2])
