"""gram: K_ij = <G_i, G'_j> of per-sample gradients, from the layer factors; specification in reference/gram.py.

rows    t = 1: (A A'ᵀ)∘(B B'ᵀ), all layers of a model in one grouped launch through a pointer table
pairs   small t: the same with every pair of positions, summed inside a tile of pairs and never written out
tiles   large t: tiles of per-sample gradients through an L2-resident scratch (kernels/tiles.py)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cache, launch, layer, table, tiles, tune
from .launch import cdiv
from .layer import Layer, Side, row_offsets
from .pairs import products
from .table import pointer

PAIRS = {
    2: [dict(BM=64, BN=128, BK=32, num_warps=8, num_stages=4), dict(BM=64, BN=128, BK=64, num_warps=8, num_stages=3)],
    4: [dict(BM=32, BN=64, BK=32, num_warps=8, num_stages=2), dict(BM=64, BN=64, BK=16, num_warps=8, num_stages=2)],
}
# operands that are not aligned come one element at a time, through registers of their own
ODD = {2: dict(BM=64, BN=64, BK=32, num_warps=8, num_stages=3), 4: dict(BM=32, BN=32, BK=32, num_warps=4, num_stages=2)}
# on sm_90 a third of the operands in registers is not there, and 128 × 128 reads 64 FLOP a byte from the L2 where 64 × 128 reads 43
ROWS = {2: [*PAIRS[2], dict(BM=128, BN=128, BK=64, num_warps=8, num_stages=3, on=9)], 4: PAIRS[4]}
# matching ids keeps a block of comparisons beside the two of products: smaller tiles, no spills
LOOKUP = {
    2: [dict(BM=64, BN=64, BK=32, num_warps=8, num_stages=4), dict(BM=32, BN=64, BK=64, num_warps=4, num_stages=3)],
    4: [dict(BM=32, BN=64, BK=32, num_warps=8, num_stages=2), dict(BM=32, BN=32, BK=32, num_warps=4, num_stages=2)],
}


@triton.jit
def _rows(
    table, partial, counter, out, layers, n, m, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, SYMMETRIC: tl.constexpr,
    SPLIT: tl.constexpr, PREC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out (n, m) = Σ over layers of (A A2ᵀ)∘(B B2ᵀ); grid: tiles of out × splits of the layers.

    A table row holds ten integers: the addresses of a, b, a2, b2, their four strides between samples, d_in, d_out; after
    the rows stands the first layer of each split, and the count of layers.
    SYMMETRIC: tiles on and above the diagonal only, column by column; what is above it is written twice.
    SPLIT: sums go to partial[split, tile]; the last program of a tile, told by counter[tile] (zero before and after),
    adds them in the order of the splits: the same bits every time.

    Bytes: (n + m)(d_in + d_out) an operand and layer, re-read by each row of tiles (L2); 4 splits·nm written and read.
    FLOPs: 2nm(d_in + d_out) a layer, half when symmetric.  Limit: tensor cores at n ≥ 512, else bandwidth.
    Fraction reached: not yet run on a GPU.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    if SYMMETRIC:
        tl.static_assert(BN % BM == 0)
        high, wide = tile, 0
        while high >= (wide + 1) * (BN // BM):  # a column of tiles ends on the diagonal
            wide += 1
            high -= wide * (BN // BM)
    else:
        high, wide = tile // tl.cdiv(m, BN), tile % tl.cdiv(m, BN)
    r, q = tl.arange(0, BM), tl.arange(0, BN)
    i, j = high * BM + r, wide * BN + q
    im, jm = i < n, j < m
    acc = tl.zeros((BM, BN), tl.float32)
    ends = table + layers * 10 + split
    for l in range(tl.load(ends).to(tl.int32), tl.load(ends + 1).to(tl.int32)):
        row = table + l * 10
        a, b, a2, b2 = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
        sa, sb, sa2, sb2 = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
        d_in, d_out = tl.load(row + 8).to(tl.int32), tl.load(row + 9).to(tl.int32)
        if ALIGNED:  # what argument specialisation says of an ordinary call
            sa, sb = tl.multiple_of(sa, 16), tl.multiple_of(sb, 16)
            sa2, sb2 = tl.multiple_of(sa2, 16), tl.multiple_of(sb2, 16)
            d_in, d_out = tl.multiple_of(d_in, 16), tl.multiple_of(d_out, 16)
        x, y = pointer(a, DTYPE, ALIGNED), pointer(a2, DTYPE, ALIGNED)
        pa = products(x, i * sa, im, y, j * sa2, jm, table, d_in, False, 1, PREC, BM, BN, BK)
        x, y = pointer(b, DTYPE, ALIGNED), pointer(b2, DTYPE, ALIGNED)
        pb = products(x, i * sb, im, y, j * sb2, jm, table, d_out, False, 1, PREC, BM, BN, BK)
        acc += pa * pb
    if SPLIT:
        pitch = tl.num_programs(0).to(tl.int64) * (BM * BN)
        mine = partial + tile.to(tl.int64) * (BM * BN) + r[:, None] * BN + q[None, :]
        tl.store(mine + split * pitch, acc)
        tl.debug_barrier()  # every thread's part is out before one of them counts
        if tl.atomic_add(counter + tile, 1, sem="acq_rel") != tl.num_programs(1) - 1:
            return
        acc = tl.zeros((BM, BN), tl.float32)
        for s in range(0, tl.num_programs(1)):
            acc += tl.load(mine + s * pitch, cache_modifier=".cg")
        tl.store(counter + tile, 0)
    rows, columns = i.to(tl.int64)[:, None], j.to(tl.int64)[None, :]
    mask = im[:, None] & jm[None, :]
    if SYMMETRIC:
        mask = mask & (columns >= rows)
        tl.store(out + columns * m + rows, acc, mask=mask)
    tl.store(out + rows * m + columns, acc, mask=mask)


@triton.jit
def _pairs(
    a, b, a2, b2, ids, ids2, rows, columns, out, n, m, t, s, d_in, d_out,
    a_sample, a_position, b_sample, b_position, a2_sample, a2_position, b2_sample, b2_position,
    groups, a_group, b_group, padding_idx,
    SYMMETRIC: tl.constexpr, MATCH: tl.constexpr, TABLED: tl.constexpr, VEC: tl.constexpr, PREC: tl.constexpr,
    TB: tl.constexpr, SB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[i, j] = Σ_ts <a_it, a2_js><b_it, b2_js>; MATCH (a lookup table): [ids_it = ids2_js] in the first one's place.

    A tile holds BM/TB samples × TB positions by BN/SB × SB; the sum over positions is taken inside the tile, once.
    Bytes: out, and the factors once per row of tiles (L2).  FLOPs: 2·nm·ts·(d_in + d_out), half when symmetric
    (tiles below the diagonal return at once; the others are stored twice).  Limit: tensor cores; MATCH skips blocks
    without an equal pair.  Fraction reached: not yet run on a GPU.
    """
    SI: tl.constexpr = BM // TB
    SJ: tl.constexpr = BN // SB
    cols = tl.cdiv(m, SJ)
    i0, j0 = (tl.program_id(0) // cols) * SI, (tl.program_id(0) % cols) * SJ
    if SYMMETRIC:
        if j0 + SJ <= i0:
            return
    r, q = tl.arange(0, BM), tl.arange(0, BN)
    i, j = (i0 + r // TB).to(tl.int64), (j0 + q // SB).to(tl.int64)
    acc = tl.zeros((BM, BN), tl.float32)
    for t0 in range(0, t, TB):
        tr = t0 + r % TB
        rm = (i < n) & (tr < t)
        for s0 in range(0, s, SB):
            sq = s0 + q % SB
            qm = (j < m) & (sq < s)
            bo, bo2 = i * b_sample + tr.to(tl.int64) * b_position, j * b2_sample + sq.to(tl.int64) * b2_position
            if MATCH:
                left = tl.load(ids + i * t + tr, mask=rm, other=padding_idx)
                right = tl.load(ids2 + j * s + sq, mask=qm, other=padding_idx)
                same = (left[:, None] == right[None, :]) & (rm & ((left != padding_idx) | (padding_idx < 0)))[:, None] & qm[None, :]
                if tl.max(same.to(tl.int32)) > 0:
                    pb = products(b, bo, rm, b2, bo2, qm, columns, d_out, False, 1, PREC, BM, BN, BK)
                    acc += tl.where(same, pb, 0.0)
            else:
                ao = i * a_sample + row_offsets(rows, tr, rm, a_position, TABLED, VEC)
                ao2 = j * a2_sample + row_offsets(rows, sq, qm, a2_position, TABLED, VEC)
                for g in range(0, groups):
                    pa = products(
                        a + g * a_group, ao, rm, a2 + g * a_group, ao2, qm, columns, d_in, TABLED, VEC, PREC, BM, BN, BK
                    )
                    pb = products(
                        b + g * b_group, bo, rm, b2 + g * b_group, bo2, qm, columns, d_out, False, 1, PREC, BM, BN, BK
                    )
                    acc += pa * pb
    k = tl.sum(tl.reshape(acc, (BM, SJ, SB)), 2)
    k = tl.sum(tl.reshape(k, (SI, TB, SJ)), 1)
    i, j = (i0 + tl.arange(0, SI)).to(tl.int64)[:, None], (j0 + tl.arange(0, SJ)).to(tl.int64)[None, :]
    mask = (i < n) & (j < m)
    if SYMMETRIC:
        mask = mask & (j >= i)
        tl.store(out + j * m + i, k, mask=mask)
    tl.store(out + i * m + j, k, mask=mask)


def _counter(count: int, device: torch.device) -> Tensor:
    """Zeros that every launch leaves zero: filled once a stream, so that a call stays one launch."""

    def make():
        return torch.zeros(count, dtype=torch.int32, device=device)

    if cache.capturing(device):  # a graph may be replayed beside other streams: its zeros are its own
        return make()
    count = launch.power_of_2(count, 256)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return cache.cached(("counter", stream, count), device, make)


def _splits(count: int, layers: int, processors: int) -> int:
    """How many runs to cut the layers into: rounds of programs × (layers of one, and one more for its sum) least."""
    return min(range(1, min(layers, 64) + 1), key=lambda s: cdiv(count * s, processors) * (cdiv(layers, s) + 1))


def _shares(work: list[int], count: int) -> list[int]:
    """First layer of each of ``count`` runs of about equal work, and the count of layers."""
    total, ends, done = sum(work), [0], 0
    for l, each in enumerate(work):
        done += each
        while len(ends) < count and done * count >= len(ends) * total:
            ends.append(l + 1)
    return [*ends, len(work)]


@launch.on_device
def gram_layers(a: list[Tensor], b: list[Tensor], a2: list[Tensor], b2: list[Tensor]) -> Tensor:
    """Every layer in one launch."""
    symmetric = not a2
    like, n, m = a[0], a[0].shape[0], (a2 or a)[0].shape[0]
    values, work, aligned, kept = [], [], True, []
    for each in zip(a, b, a2 or a, b2 or b):
        four = [x if x.stride(1) == 1 else x.contiguous() for x in each]
        kept += four  # copies must outlive the launch
        strides, widths = [x.stride(0) for x in four], [x.shape[1] for x in each[:2]]
        values += [*(x.data_ptr() for x in four), *strides, *widths]
        work.append(sum(widths))
        aligned &= all(x.data_ptr() % 16 == 0 for x in four) and all(v % 16 == 0 for v in strides + widths)
    if 0 in (n, m):
        return like.new_zeros(n, m, dtype=torch.float32)
    cfg = tune.config("rows", ROWS[like.element_size()], str(like.dtype), aligned)
    if aligned and like.dtype == torch.float32 and torch.version.hip is None:
        cfg = {**cfg, "maxnreg": 128}  # else ptxas may stop at 80 registers for a third block, and spill
    high, wide = cdiv(n, cfg["BM"]), cdiv(m, cfg["BN"])
    count = high + cfg["BN"] // cfg["BM"] * (wide * (wide - 1) // 2) if symmetric else high * wide
    splits = _splits(count, len(work), launch.processors(like))
    out = like.new_empty(n, m, dtype=torch.float32)
    partial = counter = out  # not touched without splits
    if splits > 1:
        partial, counter = out.new_empty(splits, count, cfg["BM"], cfg["BN"]), _counter(count, like.device)
    _rows[(count, splits)](
        table.table(values + _shares(work, splits), like.device), partial, counter, out, len(work), n, m,
        DTYPE=launch.TL[like.dtype], ALIGNED=aligned, SYMMETRIC=symmetric, SPLIT=splits > 1, PREC=launch.precision(like.dtype), **cfg,
    )  # fmt: skip
    return out


def pair_blocks(t: int, s: int, bm: int, bn: int) -> tuple[int, int]:
    """Positions of one sample in a tile: all of them if they fit (padded to a power of two), else the whole tile."""
    return launch.power_of_2(t, high=bm), launch.power_of_2(s, high=bn)


def _launch_pairs(shape: Layer, left: Side, right: Side | None, ids=None, ids2=None, padding_idx=-1) -> Tensor:
    other = left if right is None else right
    out = left.b.new_empty(left.n, other.n, dtype=torch.float32)
    if 0 in (left.n, other.n):
        return out
    if 0 in (left.t, other.t):
        return out.zero_()
    match = ids is not None
    configs = (LOOKUP if match else PAIRS)[left.b.element_size()]
    cfg = tune.config("lookup" if match else "pairs", configs, str(left.b.dtype))
    if not match and not (shape.aligned(left) and shape.aligned(other)):
        cfg = ODD[left.b.element_size()]
    elif left.b.dtype == torch.float32 and tune.major() == 8:
        cfg = {**cfg, "maxnreg": 192}  # else ptxas may stop at 80 for a third block, and spill
    tb, sb = pair_blocks(left.t, other.t, cfg["BM"], cfg["BN"])
    programs = cdiv(left.n, cfg["BM"] // tb) * cdiv(other.n, cfg["BN"] // sb)
    _pairs[(programs,)](
        left.a, left.b, other.a, other.b, ids if match else left.b, ids2 if match else left.b,
        *shape.tables(left.b), out,
        left.n, other.n, left.t, other.t, shape.d_in, shape.d_out,
        left.a_sample, left.a_position, left.b_sample, left.b_position,
        other.a_sample, other.a_position, other.b_sample, other.b_position,
        shape.groups, shape.a_group, shape.b_group, padding_idx,
        SYMMETRIC=right is None, MATCH=match, TABLED=shape.tabled, VEC=shape.vec,
        PREC=launch.precision(left.b.dtype), TB=tb, SB=sb, **cfg,
    )  # fmt: skip
    return out


def _empty(shape: Layer, left: Side, right: Side | None) -> Tensor | None:
    """The result where there is nothing to contract."""
    other = left if right is None else right
    if 0 in (left.n, other.n, left.t, other.t, shape.d_in, shape.d_out):
        return left.b.new_zeros(left.n, other.n, dtype=torch.float32)
    return None


@launch.on_device
def gram(a: Tensor, b: Tensor, a2: Tensor | None = None, b2: Tensor | None = None, route: str = "tiles") -> Tensor:
    shape, left = layer.linear(a, b)
    right = None if a2 is None else layer.side(a2, b2)
    if (nothing := _empty(shape, left, right)) is not None:
        return nothing
    if route == "rows":
        others = ([], []) if right is None else ([right.a[:, 0]], [right.b[:, 0]])
        return gram_layers([left.a[:, 0]], [left.b[:, 0]], *others)
    return _launch_pairs(shape, left, right) if route == "pairs" else tiles.gram(shape, left, right)


@launch.on_device
def gram_conv(
    x: Tensor, g: Tensor, kernel_size, stride, padding, dilation, groups: int,
    x2: Tensor | None = None, g2: Tensor | None = None, route: str = "tiles",
) -> Tensor:  # fmt: skip
    shape, left = layer.conv(x, g, kernel_size, stride, padding, dilation, groups)
    right = None if x2 is None else layer.conv_side(x2, g2, padding)
    if (nothing := _empty(shape, left, right)) is not None:
        return nothing
    return _launch_pairs(shape, left, right) if route == "pairs" else tiles.gram(shape, left, right)


@launch.on_device
def gram_embedding(
    ids: Tensor, b: Tensor, ids2: Tensor | None = None, b2: Tensor | None = None, padding_idx: int = -1
) -> Tensor:
    left = layer.side(b, b)
    right = None if ids2 is None else layer.side(b2, b2)
    ids = ids.contiguous()
    return _launch_pairs(
        Layer(0, b.shape[-1]), left, right, ids, ids if ids2 is None else ids2.contiguous(), padding_idx
    )


def refuse(op: str, *args) -> str | None:
    if op == "gram_conv":
        x, g, x2, g2 = *args[:2], *(args[7:9] or (None, None))
        if x2 is not None and x2.shape[2:] != x.shape[2:]:
            return f"inputs of two sizes, {tuple(x.shape[2:])} and {tuple(x2.shape[2:])}, need two offset tables"
        return launch.refuse_factors(x, g, x2, g2)
    return launch.refuse_factors(*launch.tensors(args[:4]))
