"""sqnorm: ‖G_i‖² without the Gram's other entries; specification in reference/sqnorm.py.

Per sample either all pairs of positions, Σ_ts <a_t,a_s><b_t,b_s>, or tiles of the gradient formed in registers and
squared there, whichever counts fewer products. Each program writes its own partial; they are added in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, layer, tune
from .gram import PAIRS
from .launch import cdiv
from .layer import Layer, Side, row_offsets
from .pairs import products
from .tiles import FORM, gradient_tile


@triton.jit
def _pair_norms(
    a, b, ids, rows, columns, partial, t, d_in, d_out, a_sample, a_position, b_sample, b_position,
    groups, a_group, b_group, padding_idx,
    MATCH: tl.constexpr, TABLED: tl.constexpr, VEC: tl.constexpr, PREC: tl.constexpr,
    TB: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """partial[i, block] = Σ over a TB × TB block of position pairs of sample i; blocks below the diagonal count twice.

    Bytes: the factors t/TB times (L2).  FLOPs: n·t²·(d_in + d_out).  Limit: tensor cores, bandwidth at t ≤ TB.
    Fraction reached: not yet run on a GPU.
    """
    blocks = tl.cdiv(t, TB)
    i, block = (tl.program_id(0) // (blocks * blocks)).to(tl.int64), tl.program_id(0) % (blocks * blocks)
    t0, s0 = (block // blocks) * TB, (block % blocks) * TB
    at = partial + tl.program_id(0)
    if s0 < t0:
        tl.store(at, 0.0)
        return
    tr, sq = t0 + tl.arange(0, TB), s0 + tl.arange(0, TB)
    rm, qm = tr < t, sq < t
    a += i * a_sample
    b += i * b_sample
    bo, bo2 = tr.to(tl.int64) * b_position, sq.to(tl.int64) * b_position
    acc = tl.zeros((TB, TB), tl.float32)
    if MATCH:
        left = tl.load(ids + i * t + tr, mask=rm, other=padding_idx)
        right = tl.load(ids + i * t + sq, mask=qm, other=padding_idx)
        same = (left[:, None] == right[None, :]) & (rm & ((left != padding_idx) | (padding_idx < 0)))[:, None] & qm[None, :]
        acc = tl.where(same, products(b, bo, rm, b, bo2, qm, columns, d_out, False, 1, PREC, TB, TB, BK), 0.0)
    else:
        ao = row_offsets(rows, tr, rm, a_position, TABLED, VEC)
        ao2 = row_offsets(rows, sq, qm, a_position, TABLED, VEC)
        for g in range(0, groups):
            u, v = a + g * a_group, b + g * b_group
            pa = products(u, ao, rm, u, ao2, qm, columns, d_in, TABLED, VEC, PREC, TB, TB, BK)
            acc += pa * products(v, bo, rm, v, bo2, qm, columns, d_out, False, 1, PREC, TB, TB, BK)
    total = tl.sum(acc)
    tl.store(at, tl.where(s0 > t0, 2.0, 1.0) * total)


@triton.jit
def _tile_norms(
    a, b, rows, columns, partial, t, d_in, d_out, a_sample, a_position, b_sample, b_position, groups, a_group, b_group,
    TABLED: tl.constexpr, VEC: tl.constexpr, PREC: tl.constexpr,
    BO: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """partial[i, tile] = Σ G_i[o, c]² over one tile of the gradient, formed in registers.

    Bytes: a d_out/BO times, b d_in/BC times (L2).  FLOPs: 2·n·t·d_in·d_out.  Limit: tensor cores for t ≥ 64.
    Fraction reached: not yet run on a GPU.
    """
    tiles_c = tl.cdiv(d_in, BC)
    per_group = tl.cdiv(d_out, BO) * tiles_c
    i, g = (tl.program_id(0) // (per_group * groups)).to(tl.int64), tl.program_id(0) // per_group % groups
    tile = tl.program_id(0) % per_group
    o, c = (tile // tiles_c) * BO + tl.arange(0, BO), (tile % tiles_c) * BC + tl.arange(0, BC)
    acc = gradient_tile(
        a + i * a_sample + g * a_group, b + i * b_sample + g * b_group, rows, columns, o, o < d_out, c, c < d_in, t,
        a_position, b_position, TABLED, VEC, PREC, BO, BC, BT,
    )  # fmt: skip
    tl.store(partial + tl.program_id(0), tl.sum(acc * acc))


@triton.jit
def _row_norms(a, b, out, d_in, d_out, a_sample, b_sample, BLOCK: tl.constexpr):
    """t = 1: out[i] = ‖a_i‖²‖b_i‖².  Bytes: a and b once.  FLOPs: 2n(d_in + d_out).  Limit: bandwidth.

    Fraction reached: not yet run on a GPU.
    """
    i = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK)
    na, nb = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for k in range(0, d_in, BLOCK):
        x = tl.load(a + i * a_sample + k + e, mask=k + e < d_in, other=0.0).to(tl.float32)
        na += x * x
    for k in range(0, d_out, BLOCK):
        x = tl.load(b + i * b_sample + k + e, mask=k + e < d_out, other=0.0).to(tl.float32)
        nb += x * x
    tl.store(out + i, tl.sum(na, 0) * tl.sum(nb, 0))


def _by_pairs(shape: Layer, s: Side, ids=None, padding_idx: int = -1) -> Tensor:
    cfg = tune.config("pairs", PAIRS[s.b.element_size()], str(s.b.dtype))
    tb = launch.power_of_2(s.t, 16, cfg["BM"])
    blocks = cdiv(s.t, tb)
    partial = s.b.new_empty(s.n, blocks * blocks, dtype=torch.float32)
    match = ids is not None
    _pair_norms[(blocks * blocks * s.n,)](
        s.a, s.b, ids if match else s.b, *shape.tables(s.b), partial, s.t, shape.d_in, shape.d_out,
        s.a_sample, s.a_position, s.b_sample, s.b_position, shape.groups, shape.a_group, shape.b_group, padding_idx,
        MATCH=match, TABLED=shape.tabled, VEC=shape.vec, PREC=launch.precision(s.b.dtype), TB=tb, BK=cfg["BK"],
        num_warps=4, num_stages=cfg["num_stages"],
    )  # fmt: skip
    return partial.sum(1)


def _by_tiles(shape: Layer, s: Side) -> Tensor:
    cfg = tune.config("form", FORM[s.a.element_size()], str(s.a.dtype), shape.aligned(s))
    tiles = shape.groups * cdiv(shape.d_out, cfg["BO"]) * cdiv(shape.d_in, cfg["BC"])
    partial = s.b.new_empty(s.n, tiles, dtype=torch.float32)
    _tile_norms[(tiles * s.n,)](
        s.a, s.b, *shape.tables(s.b), partial, s.t, shape.d_in, shape.d_out, s.a_sample, s.a_position,
        s.b_sample, s.b_position, shape.groups, shape.a_group, shape.b_group, TABLED=shape.tabled, VEC=shape.vec,
        PREC=launch.precision(s.a.dtype), **cfg,
    )  # fmt: skip
    return partial.sum(1)


def _either(shape: Layer, s: Side) -> Tensor:
    if 0 in (s.n, s.t, shape.d_in, shape.d_out):
        return s.b.new_zeros(s.n, dtype=torch.float32)
    if s.t * (shape.d_in + shape.d_out) <= shape.d_in * shape.d_out:
        return _by_pairs(shape, s)
    return _by_tiles(shape, s)


@launch.on_device
def sqnorm(a: Tensor, b: Tensor) -> Tensor:
    shape, s = layer.linear(a, b)
    if s.t != 1 or s.n == 0:
        return _either(shape, s)
    out = s.a.new_empty(s.n, dtype=torch.float32)
    _row_norms[(s.n,)](
        s.a, s.b, out, shape.d_in, shape.d_out, s.a_sample, s.b_sample,
        BLOCK=launch.power_of_2(max(shape.d_in, shape.d_out), 128, 2048), num_warps=4,
    )  # fmt: skip
    return out


@launch.on_device
def sqnorm_conv(x: Tensor, g: Tensor, kernel_size, stride, padding, dilation, groups: int) -> Tensor:
    return _either(*layer.conv(x, g, kernel_size, stride, padding, dilation, groups))


@launch.on_device
def sqnorm_embedding(ids: Tensor, b: Tensor, padding_idx: int = -1) -> Tensor:
    s = layer.side(b, b)
    if 0 in (s.n, s.t, b.shape[-1]):
        return b.new_zeros(s.n, dtype=torch.float32)
    return _by_pairs(Layer(0, b.shape[-1]), s, ids.contiguous(), padding_idx)


def refuse(op: str, *args) -> str | None:
    return launch.refuse_factors(*args[:2])
