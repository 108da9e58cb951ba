"""project: c_ik = <G_i, D_k>, per-sample gradients onto given directions; specification in reference/project.py.

rows    t = 1 or one direction: (a D_kᵀ)∘b, the gradient never formed
tiles   else: gradients formed once into the L2-resident scratch (kernels/tiles.py) and contracted with all directions
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, layer, tiles, tune
from .launch import cdiv
from .layer import Layer, Side

ROWS = {
    2: [dict(BM=128, BO=64, BK=64, num_warps=4, num_stages=3), dict(BM=64, BO=128, BK=64, num_warps=4, num_stages=3)],
    4: [dict(BM=64, BO=64, BK=32, num_warps=4, num_stages=2), dict(BM=32, BO=64, BK=32, num_warps=4, num_stages=2)],
}


@triton.jit
def _rows(
    a, b, basis, partial, n, t, d_in, d_out, a_sample, a_position, b_sample, b_position,
    PREC: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """partial[o block, k, r] = Σ_{o in block} b[r, o] Σ_c a[r, c] D_k[o, c] for rows r = (sample, position).

    Bytes: a, b once per block of d_out, the basis once per block of rows (L2).  FLOPs: 2·k·n·t·d_in·d_out.
    Limit: bandwidth of the basis at n·t < 300, else tensor cores.  Fraction reached: not yet run on a GPU.
    """
    k = tl.program_id(2).to(tl.int64)
    r = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    rm, om = r < tl.cast(n, tl.int64) * t, o < d_out
    ao = r // t * a_sample + r % t * a_position
    do = (k * d_out + o) * d_in
    z = tl.zeros((BM, BO), tl.float32)
    for start in range(0, d_in, BK):
        c = start + tl.arange(0, BK)
        cm = c < d_in
        u = tl.load(a + ao[:, None] + c[None, :], mask=rm[:, None] & cm[None, :], other=0.0)
        v = tl.load(basis + do[:, None] + c[None, :], mask=om[:, None] & cm[None, :], other=0.0)
        if u.dtype != v.dtype:
            u, v = u.to(tl.float32), v.to(tl.float32)
            if PREC == "tf32":
                u, v = tiles.nearest_tf32(u), tiles.nearest_tf32(v)
        z = tl.dot(u, tl.trans(v), z, input_precision=PREC)
    bo = r // t * b_sample + r % t * b_position
    w = tl.load(b + bo[:, None] + o[None, :], mask=rm[:, None] & om[None, :], other=0.0).to(tl.float32)
    at = (tl.program_id(1).to(tl.int64) * tl.num_programs(2) + k) * n * t + r
    tl.store(partial + at, tl.sum(z * w, 1), mask=rm)


@triton.jit
def _lookup(
    ids, b, basis, out, t, d, count, b_sample, b_position, padding_idx, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[i, k] = Σ_t <b_it, D_k[ids_it]>, positions of padding_idx left out.

    Bytes: b and as many basis rows, once for each direction.  FLOPs: 2·k·n·t·d.  Limit: bandwidth.
    Fraction reached: not yet run on a GPU.
    """
    i, k = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for t0 in range(0, t, ROWS):
        r = t0 + tl.arange(0, ROWS)
        row = tl.load(ids + i * t + r, mask=r < t, other=padding_idx)
        rm = (r < t) & (row != padding_idx)
        bo, do = i * b_sample + r.to(tl.int64) * b_position, (k * count + row) * d
        for e0 in range(0, d, BLOCK):
            e = e0 + tl.arange(0, BLOCK)
            mask = rm[:, None] & (e < d)[None, :]
            u = tl.load(b + bo[:, None] + e[None, :], mask=mask, other=0.0).to(tl.float32)
            acc += u * tl.load(basis + do[:, None] + e[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + i * tl.num_programs(1) + k, tl.sum(acc))


def _by_rows(shape: Layer, s: Side, basis: Tensor) -> Tensor:
    cfg = tune.config("project_rows", ROWS[max(s.a.element_size(), basis.element_size())], str(s.a.dtype))
    blocks, k = cdiv(shape.d_out, cfg["BO"]), basis.shape[0]
    partial = s.a.new_empty(blocks, k, s.n, s.t, dtype=torch.float32)
    _rows[(cdiv(s.n * s.t, cfg["BM"]), blocks, k)](
        s.a, s.b, basis, partial, s.n, s.t, shape.d_in, shape.d_out, s.a_sample, s.a_position, s.b_sample, s.b_position,
        PREC=_mixed_precision(s, basis), **cfg,
    )  # fmt: skip
    return partial.sum((0, 3)).T.contiguous()


def _mixed_precision(s: Side, basis: Tensor) -> str:
    """bf16 factors on a float32 basis are widened, exactly; tf32 then keeps more of both than bf16 would. float32 factors lose nothing."""
    return tiles.contract_precision(s.a.dtype) if s.a.dtype in (basis.dtype, torch.float32) else "tf32"


def _given(shape: Layer, s: Side, basis: Tensor) -> Tensor:
    """basis (k, groups·d_out·d_in) contiguous, columns in the layer's own order."""
    if 0 in (s.n, s.t, len(basis), shape.d_in, shape.d_out):
        return s.a.new_zeros(s.n, len(basis), dtype=torch.float32)
    if not shape.tabled and (s.t == 1 or len(basis) == 1):
        return _by_rows(shape, s, basis)
    exact = _mixed_precision(s, basis)

    def contract(scratch, partial, width, at, first):
        tiles.accumulate(scratch, basis[:, at:], partial, width, first, False, exact, given=basis.dtype == torch.float32)

    return tiles.project(shape, s, len(basis), contract)


@launch.on_device
def project(a: Tensor, b: Tensor, basis: Tensor) -> Tensor:
    shape, s = layer.linear(a, b)
    return _given(shape, s, basis.contiguous().flatten(1))


@launch.on_device
def project_conv(x: Tensor, g: Tensor, basis: Tensor, stride, padding, dilation, groups: int) -> Tensor:
    shape, s = layer.conv(x, g, list(basis.shape[3:]), stride, padding, dilation, groups)
    return _given(shape, s, layer.column_order(basis, x.dim() - 2).flatten(1))


@launch.on_device
def project_embedding(ids: Tensor, b: Tensor, basis: Tensor, padding_idx: int = -1) -> Tensor:
    s, (k, count, d) = layer.side(b, b), basis.shape
    out = b.new_zeros(s.n, k, dtype=torch.float32)
    if 0 in (s.n, s.t, k, d):
        return out
    _lookup[(s.n, k)](
        ids.contiguous(), s.b, basis.contiguous(), out, s.t, d, count, s.b_sample, s.b_position, padding_idx,
        ROWS=launch.power_of_2(s.t, 4, 16), BLOCK=launch.power_of_2(d, 32, 128), num_warps=4,
    )  # fmt: skip
    return out


def refuse(op: str, *args) -> str | None:
    factors, basis = args[:2], args[2]
    if basis.dtype not in launch.LOW:
        return f"basis: dtype {basis.dtype} is not one of {', '.join(map(str, launch.LOW))}"
    return launch.refuse_factors(*factors)
