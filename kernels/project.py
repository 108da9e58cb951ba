"""project: c_ik = <G_i, D_k>, per-sample gradients onto directions; specification in reference/project.py.

rows    t = 1 or one direction: (a D_kᵀ)∘b, the gradient never formed
tiles   else: gradients formed once into the L2-resident scratch (kernels/tiles.py) and contracted with all directions
random  tiles, with the directions drawn by Philox where they are used: never stored
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, layer, philox, tiles, tune
from .launch import cdiv
from .layer import Layer, Side

ROWS = {
    2: [dict(BM=128, BO=64, BK=64, num_warps=4, num_stages=3), dict(BM=64, BO=128, BK=64, num_warps=4, num_stages=3)],
    4: [dict(BM=64, BO=64, BK=32, num_warps=4, num_stages=2), dict(BM=32, BO=64, BK=32, num_warps=4, num_stages=2)],
}
RANDOM = {
    2: [dict(BM=64, BN=32, BK=64, num_warps=4, num_stages=2), dict(BM=64, BN=64, BK=64, num_warps=8, num_stages=2)],
    4: [dict(BM=64, BN=32, BK=32, num_warps=4, num_stages=2), dict(BM=32, BN=64, BK=32, num_warps=4, num_stages=2)],
}
MANY = dict(BM=128, BN=32, BK=64, num_warps=8, num_stages=2)  # more than 64 samples, 2 bytes: half as many draws


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
        z = tl.dot(u, tl.trans(v), z, input_precision=PREC)
    bo = r // t * b_sample + r % t * b_position
    w = tl.load(b + bo[:, None] + o[None, :], mask=rm[:, None] & om[None, :], other=0.0).to(tl.float32)
    at = (tl.program_id(1).to(tl.int64) * tl.num_programs(2) + k) * n * t + r
    tl.store(partial + at, tl.sum(z * w, 1), mask=rm)


@triton.jit
def _random(
    x, partial, n, k, x_pitch, width, per_split, first, base, size, d_in, volume,
    k0: tl.int64, k1: tl.int64, o0: tl.int64, o1: tl.int64,
    GAUSSIAN: tl.constexpr, BLOCKED: tl.constexpr, TURNED: tl.constexpr, PREC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """partial[split] (n, k) += x (n, width) · Dᵀ, D[j, q] = Philox element j·size + base + q, drawn here.

    BLOCKED: size and base are multiples of 4, so one Philox call gives four neighbours.
    TURNED: rows of d_in stand channels fastest in the scratch, kernel positions (volume of them) fastest in the stream.
    Bytes: the scratch, from L2; the basis costs none.  FLOPs: 2·n·k·width, and about 34 integer operations an element of D and
    block of samples (counted from SASS), 100 where not BLOCKED.  Limit: integer arithmetic.  Fraction reached: not yet run on a GPU.
    """
    cols = tl.cdiv(k, BN)
    i = (tl.program_id(0) // cols) * BM + tl.arange(0, BM)
    j = (tl.program_id(0) % cols) * BN + tl.arange(0, BN)
    im, jm = i < n, j < k
    xo = i.to(tl.int64) * x_pitch
    row = j.to(tl.int64)[:, None] * size + base
    acc = tl.zeros((BM, BN), tl.float32)
    start = tl.program_id(1) * per_split
    stop = min(start + per_split, width)
    for q in range(start, stop, BK):
        c = q + tl.arange(0, BK)
        u = tl.load(x + xo[:, None] + c[None, :], mask=im[:, None] & (c < stop)[None, :], other=0.0)
        if TURNED:
            inner = c % d_in
            channels = d_in // volume
            v = philox.single_values(row + (c - inner + inner % channels * volume + inner // channels)[None, :], k0, k1, o0, o1, GAUSSIAN)
        elif BLOCKED:
            block = (row + q) // 4 + tl.arange(0, BK // 4)[None, :]
            v = philox.values(block, k0, k1, o0, o1, GAUSSIAN)
        else:
            v = philox.single_values(row + c[None, :], k0, k1, o0, o1, GAUSSIAN)
        acc = tl.dot(u, tl.trans(v.to(u.dtype)), acc, input_precision=PREC)
    at = partial + tl.program_id(1).to(tl.int64) * n * k + i.to(tl.int64)[:, None] * k + j[None, :]
    mask = im[:, None] & jm[None, :]
    if first == 0:
        acc += tl.load(at, mask=mask, other=0.0)
    tl.store(at, acc, mask=mask)


@triton.jit
def _lookup(
    ids, b, basis, out, t, d, count, b_sample, b_position, padding_idx, k0: tl.int64, k1: tl.int64, o0: tl.int64, o1: tl.int64,
    DRAWN: tl.constexpr, GAUSSIAN: tl.constexpr, BLOCKED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[i, k] = Σ_t <b_it, D_k[ids_it]>, positions of padding_idx left out.

    DRAWN: element e of D_k, flat, is Philox element k·count·d + e; BLOCKED: d is a multiple of 4.
    Bytes: b and as many basis rows, once for each direction.  FLOPs: 2·k·n·t·d.  Limit: bandwidth; drawn, integer arithmetic, 25 to 100
    operations an element of a row for each position that holds it.  Fraction reached: not yet run on a GPU.
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
            if not DRAWN:
                v = tl.load(basis + do[:, None] + e[None, :], mask=mask, other=0.0).to(tl.float32)
            elif BLOCKED:
                block = (do[:, None] + e0) // 4 + tl.arange(0, BLOCK // 4)[None, :]
                v = philox.values(block, k0, k1, o0, o1, GAUSSIAN)
            else:
                v = philox.single_values(do[:, None] + e[None, :], k0, k1, o0, o1, GAUSSIAN)
            acc += u * v
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
    """bf16 factors on a float32 basis are widened, exactly; tf32 then keeps more of both than bf16 would."""
    return launch.precision(torch.float32) if s.a.dtype == basis.dtype else "tf32"


def _by_tiles(shape: Layer, s: Side, k: int, contract) -> Tensor:
    """Gradients into the scratch; contract(scratch, partial, width, first element in a direction, first launch)."""
    dtype = tiles.scratch_dtype(s.a.dtype)
    plan = list(tiles.chunks(s.n, shape, dtype.itemsize, whole_rows=True))
    scratch = s.a.new_empty(s.n, cdiv(plan[0][1] * plan[0][3], 64) * 64, dtype=dtype)
    partial, first = tiles.partials(s.n, k, s.a), True
    for group in range(shape.groups):
        for chunk in plan:
            tiles.form(shape, s, group, scratch, chunk)
            at = (group * shape.d_out + chunk[0]) * shape.d_in
            contract(scratch, partial, chunk[1] * chunk[3], at, first)
            first = False
    return tiles.finish(partial, False)


def _given(shape: Layer, s: Side, basis: Tensor) -> Tensor:
    """basis (k, groups·d_out·d_in) contiguous, columns in the layer's own order."""
    if 0 in (s.n, s.t, len(basis), shape.d_in, shape.d_out):
        return s.a.new_zeros(s.n, len(basis), dtype=torch.float32)
    if not shape.tabled and (s.t == 1 or len(basis) == 1):
        return _by_rows(shape, s, basis)
    exact = "tf32" if s.a.dtype != basis.dtype else tiles.contract_precision(s.a.dtype)

    def contract(scratch, partial, width, at, first):
        tiles.accumulate(scratch, basis[:, at:], partial, width, first, False, exact)

    return _by_tiles(shape, s, len(basis), contract)


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
    return _looked_up(ids, b, basis.contiguous(), *basis.shape[:2], padding_idx, (0, 0, 0, 0))


@launch.on_device
def project_random_embedding(
    ids: Tensor, b: Tensor, k: int, num_embeddings: int, seed: int, offset: int = 0, kind: str = "sign", padding_idx: int = -1
) -> Tensor:
    return _looked_up(ids, b, None, k, num_embeddings, padding_idx, philox.key(seed, offset), kind == "gaussian")


def _looked_up(ids: Tensor, b: Tensor, basis: Tensor | None, k: int, count: int, padding_idx: int, key, gaussian: bool = False) -> Tensor:
    s, d = layer.side(b, b), b.shape[2]
    out = b.new_zeros(s.n, k, dtype=torch.float32)
    if 0 in (s.n, s.t, k, d):
        return out
    most, warps = (64, 8) if basis is None else (128, 4)  # sine and cosine take registers
    _lookup[(s.n, k)](
        ids.contiguous(), s.b, s.b if basis is None else basis, out, s.t, d, count, s.b_sample, s.b_position, padding_idx, *key,
        DRAWN=basis is None, GAUSSIAN=gaussian, BLOCKED=basis is None and d % 4 == 0,
        ROWS=launch.power_of_2(s.t, 4, 16), BLOCK=launch.power_of_2(d, 32, most), num_warps=warps,
    )  # fmt: skip
    return out


@launch.on_device
def project_random(a: Tensor, b: Tensor, k: int, seed: int, offset: int = 0, kind: str = "sign") -> Tensor:
    return _drawn(*layer.linear(a, b), k, 1, seed, offset, kind)


@launch.on_device
def project_random_conv(
    x: Tensor, g: Tensor, k: int, kernel_size, stride, padding, dilation, groups: int, seed: int, offset: int = 0, kind: str = "sign",
) -> Tensor:  # fmt: skip
    return _drawn(*layer.conv(x, g, kernel_size, stride, padding, dilation, groups), k, math.prod(kernel_size), seed, offset, kind)


def _drawn(shape: Layer, s: Side, k: int, volume: int, seed: int, offset: int, kind: str) -> Tensor:
    """volume: of a convolution's kernel."""
    if 0 in (s.n, s.t, k, shape.d_in, shape.d_out):
        return s.a.new_zeros(s.n, k, dtype=torch.float32)
    size = shape.groups * shape.d_in * shape.d_out
    dtype = tiles.scratch_dtype(s.a.dtype)
    cfg = MANY if s.n > 64 and dtype.itemsize == 2 else tune.config("random", RANDOM[dtype.itemsize], str(dtype))

    def contract(scratch, partial, width, at, first):
        count = partial.shape[0]
        per = cdiv(cdiv(width, count), cfg["BK"]) * cfg["BK"]
        _random[(cdiv(s.n, cfg["BM"]) * cdiv(k, cfg["BN"]), count)](
            scratch, partial, s.n, k, scratch.stride(0), width, per, int(first), at, size, shape.d_in, volume, *philox.key(seed, offset),
            GAUSSIAN=kind == "gaussian", BLOCKED=volume == 1 and math.gcd(size, at) % 4 == 0, TURNED=volume > 1,
            PREC=tiles.contract_precision(s.a.dtype), **cfg,
        )  # fmt: skip

    return _by_tiles(shape, s, k, contract)


def refuse(op: str, *args) -> str | None:
    if "random" in op:
        return launch.refuse_factors(*args[:2])
    factors, basis = args[:2], args[2]
    if basis.dtype not in launch.LOW:
        return f"basis: dtype {basis.dtype} is not one of {', '.join(map(str, launch.LOW))}"
    return launch.refuse_factors(*factors)
