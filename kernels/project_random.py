"""project_random: c_ij = <G_i, D_j>, per-sample gradients onto directions that are drawn where they are used; reference/project.py.

Gradients are formed once into the L2-resident scratch (kernels/tiles.py) and contracted with directions that Philox draws: a call serves
all directions of a tile, 32, 64 or 128 of signs, or 4 of normals.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, layer, philox, tiles, tune
from .launch import cdiv
from .layer import Layer, Side

# by bytes of an element of the scratch; the tile's width is that of _directions
SIGNS = {
    2: [dict(BM=64, BK=64, num_warps=4, num_stages=2), dict(BM=64, BK=64, num_warps=8, num_stages=2)],
    4: [dict(BM=64, BK=32, num_warps=8, num_stages=2), dict(BM=32, BK=64, num_warps=4, num_stages=2)],
}
NORMALS = {
    2: [dict(BM=64, BK=64, num_warps=4, num_stages=2), dict(BM=64, BK=64, num_warps=8, num_stages=2)],
    4: [dict(BM=64, BK=32, num_warps=4, num_stages=2), dict(BM=32, BK=64, num_warps=4, num_stages=2)],
}
MANY = dict(BM=128, BK=64, num_warps=8, num_stages=2)  # more than 64 samples, 2 bytes: half as many draws


@triton.jit
def _random(
    x, partial, n, k, x_pitch, width, per_split, first, base, size, d_in, volume,
    k0: tl.int64, k1: tl.int64, o0: tl.int64, o1: tl.int64,
    GAUSSIAN: tl.constexpr, TURNED: tl.constexpr, PREC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """partial[split] (n, k) += x (n, width) · Dᵀ, D[j, q] = direction j at element base + q of a weight of ``size``, drawn here.

    TURNED: rows of d_in stand channels fastest in the scratch, kernel positions (volume of them) fastest in the weight.
    Bytes: the scratch, from L2; the basis costs none.  FLOPs: 2·n·k·width.  Philox blocks for each block of samples: an element one for BN
    directions of signs, one for 4 of normals.  Instructions of the loop, all kinds, an entry of D (SASS for sm_90, bfloat16): signs 10 at
    BM = BN = 128, 29 at BM = 128, BN = 32.  Limit: instructions, then tensor cores.  Fraction reached: not yet run on a GPU.
    """
    cols = tl.cdiv(k, BN)
    i = (tl.program_id(0) // cols) * BM + tl.arange(0, BM)
    j0 = (tl.program_id(0) % cols) * BN
    im = i < n
    xo = i.to(tl.int64) * x_pitch
    acc = tl.zeros((BM, BN), tl.float32)
    start = tl.program_id(1) * per_split
    stop = min(start + per_split, width)
    for q in range(start, stop, BK):
        c = q + tl.arange(0, BK)
        u = tl.load(x + xo[:, None] + c[None, :], mask=im[:, None] & (c < stop)[None, :], other=0.0)
        if TURNED:
            inner = c % d_in
            channels = d_in // volume
            c += inner % channels * volume + inner // channels - inner
        v = philox.directions(j0, c.to(tl.int64) + base, size, k0, k1, o0, o1, BN, GAUSSIAN)
        acc = tl.dot(u, v.to(u.dtype), acc, input_precision=PREC)
    j = j0 + tl.arange(0, BN)
    at = partial + tl.program_id(1).to(tl.int64) * n * k + i.to(tl.int64)[:, None] * k + j[None, :]
    mask = im[:, None] & (j < k)[None, :]
    if first == 0:
        acc += tl.load(at, mask=mask, other=0.0)
    tl.store(at, acc, mask=mask)


@triton.jit
def _lookup_random(
    ids, b, out, t, d, k, size, b_sample, b_position, padding_idx, k0: tl.int64, k1: tl.int64, o0: tl.int64, o1: tl.int64,
    GAUSSIAN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out[i, j] = Σ_t <b_it, D_j[ids_it]>, positions of padding_idx left out; D_j of ``size`` elements is drawn here, where a row occurs.

    Bytes: b, once for BN directions.  FLOPs: 2·k·n·t·d.  Integer operations an entry of a row, for each position that holds it: of
    signs 2 and 70 / BN, of normals 18, beside logarithm, sine and cosine.  Limit: instructions.  Fraction reached: not yet run on a GPU.
    """
    i, j0 = tl.program_id(0).to(tl.int64), tl.program_id(1) * BN
    m = tl.arange(0, ROWS * BLOCK)
    acc = tl.zeros((ROWS * BLOCK, BN), tl.float32)
    for t0 in range(0, t, ROWS):
        r = t0 + m // BLOCK
        row = tl.load(ids + i * t + r, mask=r < t, other=padding_idx)
        rm = (r < t) & (row != padding_idx)
        for e0 in range(0, d, BLOCK):
            e = e0 + m % BLOCK
            u = tl.load(b + i * b_sample + r.to(tl.int64) * b_position + e, mask=rm & (e < d), other=0.0).to(tl.float32)
            acc += u[:, None] * philox.directions(j0, row.to(tl.int64) * d + e, size, k0, k1, o0, o1, BN, GAUSSIAN)
    j = j0 + tl.arange(0, BN)
    tl.store(out + i * k + j, tl.sum(acc, 0), mask=j < k)


def _directions(k: int, gaussian: bool, itemsize: int = 2) -> int:
    """Of a tile: as many as a call serves, but for the registers that normals take, or a product of float32."""
    return 32 if gaussian else launch.power_of_2(k, 32, 128 if itemsize == 2 else 64)


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
    size, gaussian = shape.groups * shape.d_in * shape.d_out, kind == "gaussian"
    dtype = tiles.scratch_dtype(s.a.dtype)
    wide = _directions(k, gaussian, dtype.itemsize)
    many = s.n > 64 and dtype.itemsize == 2
    cfg = MANY if many else tune.config(f"random_{kind}", (NORMALS if gaussian else SIGNS)[dtype.itemsize], str(dtype))

    def contract(scratch, partial, width, at, first):
        count = partial.shape[0]
        per = cdiv(cdiv(width, count), cfg["BK"]) * cfg["BK"]
        _random[(cdiv(s.n, cfg["BM"]) * cdiv(k, wide), count)](
            scratch, partial, s.n, k, scratch.stride(0), width, per, int(first), at, size, shape.d_in, volume, *philox.key(seed, offset),
            GAUSSIAN=gaussian, TURNED=volume > 1, PREC=tiles.contract_precision(s.a.dtype), BN=wide, **cfg,
        )  # fmt: skip

    return tiles.project(shape, s, k, contract)


@launch.on_device
def project_random_embedding(
    ids: Tensor, b: Tensor, k: int, num_embeddings: int, seed: int, offset: int = 0, kind: str = "sign", padding_idx: int = -1
) -> Tensor:
    s, d, gaussian = layer.side(b, b), b.shape[2], kind == "gaussian"
    out = b.new_zeros(s.n, k, dtype=torch.float32)
    if 0 in (s.n, s.t, k, d):
        return out
    wide = _directions(k, gaussian)
    if s.n * cdiv(k, wide) < 2 * launch.processors(b):  # programs: rather draw more than leave the device idle
        wide = 32
    block = launch.power_of_2(d, 1, 64)
    _lookup_random[(s.n, cdiv(k, wide))](
        ids.contiguous(), s.b, out, s.t, d, k, num_embeddings * d, s.b_sample, s.b_position, padding_idx, *philox.key(seed, offset),
        GAUSSIAN=gaussian, ROWS=64 // block, BLOCK=block, BN=wide, num_warps=8 if gaussian else 4,
    )  # fmt: skip
    return out


def refuse(op: str, *args) -> str | None:
    return launch.refuse_factors(*args[:2])
