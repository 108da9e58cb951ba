"""step: one pass over all parameters through a table of pointers; specification in reference/step.py.

One launch serves any number of tensors of one dtype combination: the device-side table has a row a tensor, a program
owns a stretch of equal chunks of the tensors laid end to end, and each program writes its own partial sums.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, philox, table
from .launch import cdiv
from .table import pointer

CHUNK = 4096  # elements a program reads at once from each tensor, over its inner blocks
BLOCK = 1024
HEAD = 3  # columns of a table row before its pointers: first chunk, elements, place in the Philox stream
WAVES = 8  # programs a multiprocessor
DTYPES = tuple(launch.TL)


@triton.jit
def _find(rows, count, chunk, COLUMNS: tl.constexpr):
    """The tensor that holds ``chunk``: rows of the table whose first chunk is not beyond it, less one."""
    below = tl.cast(0, tl.int32)
    for k in range(0, count, 128):
        e = k + tl.arange(0, 128)
        first = tl.load(rows + e.to(tl.int64) * COLUMNS, mask=e < count, other=0x7FFFFFFFFFFFFFFF)
        below += tl.sum((first <= chunk).to(tl.int32), 0)
    return below - 1


@triton.jit
def _advance(rows, i, chunk, COLUMNS: tl.constexpr):
    """The tensor that holds ``chunk``, walking on from tensor i; the table ends with a row beyond the last chunk."""
    while tl.load(rows + (i + 1) * COLUMNS) <= chunk:
        i += 1
    return i


@triton.jit
def _size(row, ALIGNED: tl.constexpr):
    size = tl.load(row + 1)
    return tl.multiple_of(size, 16) if ALIGNED else size


@triton.jit
def _gram(
    rows, partial, count, chunks, per, k,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, COLUMNS: tl.constexpr, KB: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial[program, p, q] = Σ d_p d_q over the program's chunks, products and sums in float64.

    Grid axis 1 runs over pairs of KB directions each; the lower triangle is left to ``finish``.
    Bytes: k directions once (KB-fold less reuse beyond KB directions).  FLOPs: k² P in float64.
    Limit: bandwidth.  Fraction reached: not yet run on a GPU.
    """
    blocks = tl.cdiv(k, KB)
    p0, q0 = (tl.program_id(1) // blocks) * KB, (tl.program_id(1) % blocks) * KB
    if q0 < p0:
        return
    p, q = p0 + tl.arange(0, KB), q0 + tl.arange(0, KB)
    start = tl.program_id(0).to(tl.int64) * per
    i = _find(rows, count, start, COLUMNS)
    acc = tl.zeros((KB, KB, BLOCK), tl.float64)
    for chunk in range(start, tl.minimum(start + per, chunks)):
        i = _advance(rows, i, chunk, COLUMNS)
        row = rows + i.to(tl.int64) * COLUMNS
        first = (chunk - tl.load(row)) * CHUNK
        size = _size(row, ALIGNED)
        up, uq = tl.load(row + 3 + p, mask=p < k, other=0), tl.load(row + 3 + q, mask=q < k, other=0)
        xp, xq = pointer(up, DTYPE, ALIGNED), pointer(uq, DTYPE, ALIGNED)
        for block in range(0, CHUNK, BLOCK):
            e = first + block + tl.arange(0, BLOCK)
            u = tl.load(xp[:, None] + e[None, :], mask=(p < k)[:, None] & (e < size)[None, :], other=0.0).to(tl.float64)
            v = tl.load(xq[:, None] + e[None, :], mask=(q < k)[:, None] & (e < size)[None, :], other=0.0).to(tl.float64)
            acc += u[:, None, :] * v[None, :, :]
    total = tl.sum(acc, 2)
    at = partial + tl.program_id(0).to(tl.int64) * k * k + p[:, None] * k + q[None, :]
    tl.store(at, total, mask=(p < k)[:, None] & (q < k)[None, :])


@triton.jit
def _update(
    rows, coef, count, chunks, per, lr: tl.float64, beta: tl.float64, decay: tl.float64, noise: tl.float64,
    k0: tl.int64, k1: tl.int64, o0: tl.int64, o1: tl.int64,
    P: tl.constexpr, M: tl.constexpr, G: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr,
    K: tl.constexpr, MOMENTUM: tl.constexpr, NOISE: tl.constexpr, ALIGNED: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """v ← β v + g − Σ_k coef_k d_k;  θ ← decay·θ − lr v + noise ξ, in registers, written back once.

    With noise the blocks begin where the tensor's place in the Philox stream is a multiple of 4, so one Philox call
    gives four neighbours.  coef is read by the device only.
    Bytes: θ and v read and written, g and K directions read.  FLOPs: 2K + 6 a parameter, and about 40 with noise.
    Limit: bandwidth.  Fraction reached: not yet run on a GPU.
    """
    start = tl.program_id(0).to(tl.int64) * per
    i = _find(rows, count, start, COLUMNS)
    for chunk in range(start, tl.minimum(start + per, chunks)):
        i = _advance(rows, i, chunk, COLUMNS)
        row = rows + i.to(tl.int64) * COLUMNS
        size, place = _size(row, ALIGNED), tl.load(row + 2)
        first = (chunk - tl.load(row)) * CHUNK
        if NOISE:
            if not ALIGNED:  # ALIGNED promises a place that is a multiple of 4
                first -= place % 4
        theta, grad = pointer(tl.load(row + 3), P, ALIGNED), pointer(tl.load(row + 4), G, ALIGNED)
        for block in range(0, CHUNK, BLOCK):
            e = first + block + tl.arange(0, BLOCK)
            mask = (e >= 0) & (e < size)
            v = tl.load(grad + e, mask=mask, other=0.0).to(ACC)
            if MOMENTUM:
                held = pointer(tl.load(row + 5), M, ALIGNED)
                v += tl.load(held + e, mask=mask, other=0.0).to(ACC) * tl.cast(beta, ACC)
            for j in tl.static_range(K):
                d = tl.load(pointer(tl.load(row + 6 + j), D, ALIGNED) + e, mask=mask, other=0.0).to(ACC)
                v -= tl.load(coef + j).to(ACC) * d
            if MOMENTUM:
                tl.store(held + e, v.to(M), mask=mask)
            new = tl.load(theta + e, mask=mask, other=0.0).to(ACC) * tl.cast(decay, ACC) - tl.cast(lr, ACC) * v
            if NOISE:
                index = (place + first + block) // 4 + tl.arange(0, BLOCK // 4)
                new += tl.cast(noise, ACC) * philox.values(index, k0, k1, o0, o1, True).to(ACC)
            tl.store(theta + e, new.to(P), mask=mask)


@triton.jit
def _ordered(x, INT: tl.constexpr, TOP: tl.constexpr):
    """Floats as int64 in which neighbours differ by one; −0 is one below +0.  TOP: the sign bit's complement."""
    bits = x.to(INT, bitcast=True).to(tl.int64)
    return tl.where(bits < 0, -(bits & TOP) - 1, bits)


@triton.jit
def _from_ordered(i, INT: tl.constexpr, TOP: tl.constexpr, P: tl.constexpr):
    bits = tl.where(i < 0, (-i - 1) | (-TOP - 1), i)
    return bits.to(INT).to(P, bitcast=True)


@triton.jit
def _moved(theta, g, alpha, P: tl.constexpr, ACC: tl.constexpr):
    """θ + alpha·g rounded once to θ's dtype; one fused multiply-add, so that every kernel rounds alike."""
    return tl.fma(g.to(P).to(ACC), tl.zeros_like(g).to(ACC) + tl.cast(alpha, ACC), theta.to(ACC)).to(P)


@triton.jit
def _lookahead(
    rows, found, places, index, value, count, chunks, per, alpha: tl.float64,
    P: tl.constexpr, G: tl.constexpr, ACC: tl.constexpr, INT: tl.constexpr, TOP: tl.constexpr,
    WRITE: tl.constexpr, ALIGNED: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """WRITE false: found[program] = elements whose plain undo is more than 127 floats off (or not finite).
    WRITE true: θ ← θ − alpha·g, its ulps, and those elements at places[program] of index and value, in order.

    Two passes, because how many there are sizes the result; the order is that of the elements, every time.
    Bytes: θ and g twice, θ and one byte written.  Limit: bandwidth.  Fraction reached: not yet run on a GPU.
    """
    start = tl.program_id(0).to(tl.int64) * per
    i = _find(rows, count, start, COLUMNS)
    at = tl.load(places + tl.program_id(0)) if WRITE else tl.cast(0, tl.int64)
    for chunk in range(start, tl.minimum(start + per, chunks)):
        i = _advance(rows, i, chunk, COLUMNS)
        row = rows + i.to(tl.int64) * COLUMNS
        size = _size(row, ALIGNED)
        first = (chunk - tl.load(row)) * CHUNK
        theta, grad = pointer(tl.load(row + 3), P, ALIGNED), pointer(tl.load(row + 4), G, ALIGNED)
        for block in range(0, CHUNK, BLOCK):
            e = first + block + tl.arange(0, BLOCK)
            mask = e < size
            old = tl.load(theta + e, mask=mask, other=0.0)
            g = tl.load(grad + e, mask=mask, other=0.0)
            new = _moved(old, g, -alpha, P, ACC)
            back = _moved(new, g, alpha, P, ACC)
            off = _ordered(old, INT, TOP) - _ordered(back, INT, TOP)
            finite = tl.abs(back.to(ACC)) < float("inf")
            far = ((off > 127) | (off < -127) | (finite == 0)) & mask
            if WRITE:
                tl.store(theta + e, new, mask=mask)
                ulps = pointer(tl.load(row + 5), tl.int8, ALIGNED)
                tl.store(ulps + e, tl.minimum(tl.maximum(off, -127), 127).to(tl.int8), mask=mask)
                slot = at + tl.cumsum(far.to(tl.int64), 0) - 1
                tl.store(index + 2 * slot, tl.zeros_like(slot) + tl.load(row + 6), mask=far)
                tl.store(index + 2 * slot + 1, e, mask=far)
                tl.store(value + slot, old.to(tl.float64), mask=far)
            at += tl.sum(far.to(tl.int64), 0)
    if not WRITE:
        tl.store(found + tl.program_id(0), at)


@triton.jit
def _undo(
    rows, count, chunks, per, alpha: tl.float64,
    P: tl.constexpr, G: tl.constexpr, ACC: tl.constexpr, INT: tl.constexpr, TOP: tl.constexpr,
    ALIGNED: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """θ ← θ + alpha·g moved by its ulps: the very bits from before the look-ahead, but for the listed elements.

    Bytes: θ, g and one byte read, θ written.  Limit: bandwidth.  Fraction reached: not yet run on a GPU.
    """
    start = tl.program_id(0).to(tl.int64) * per
    i = _find(rows, count, start, COLUMNS)
    for chunk in range(start, tl.minimum(start + per, chunks)):
        i = _advance(rows, i, chunk, COLUMNS)
        row = rows + i.to(tl.int64) * COLUMNS
        size = _size(row, ALIGNED)
        first = (chunk - tl.load(row)) * CHUNK
        theta, grad = pointer(tl.load(row + 3), P, ALIGNED), pointer(tl.load(row + 4), G, ALIGNED)
        ulps = pointer(tl.load(row + 5), tl.int8, ALIGNED)
        for block in range(0, CHUNK, BLOCK):
            e = first + block + tl.arange(0, BLOCK)
            mask = e < size
            here, g = tl.load(theta + e, mask=mask, other=0.0), tl.load(grad + e, mask=mask, other=0.0)
            back = _moved(here, g, alpha, P, ACC)
            exact = _ordered(back, INT, TOP) + tl.load(ulps + e, mask=mask, other=0).to(tl.int64)
            tl.store(theta + e, _from_ordered(exact, INT, TOP, P), mask=mask)


@triton.jit
def _restore(rows, index, value, count, where, P: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """θ[tensor, element] = value for the listed elements of this group; where: original tensor → row, or −1.

    Bytes: 24 an element.  Limit: latency.  Fraction reached: not yet run on a GPU.
    """
    q = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(where + tl.load(index + 2 * q, mask=q < count, other=0), mask=q < count, other=-1)
    mask = (q < count) & (row >= 0)
    theta = tl.load(rows + row * COLUMNS + 3, mask=mask, other=0).to(tl.pointer_type(P))
    old = tl.load(value + q, mask=mask, other=0.0)
    tl.store(theta + tl.load(index + 2 * q + 1, mask=mask, other=0), old.to(P), mask=mask)


class _Group:
    """Tensors of one kind: their table on the device and how programs share its chunks."""

    def __init__(self, columns: list[list], places: list[int], extra: list[int], aligned: bool, shifted: bool = False):
        """columns: p rows of pointer columns (tensors, or None); places: element each begins at, end to end; extra: one
        integer a row, after the pointers; shifted: blocks follow the Philox stream, up to 3 elements early."""
        values, chunks = [], 0
        for row, place, last in zip(columns, places, extra):
            values += [chunks, row[0].numel(), place, *(0 if x is None else x.data_ptr() for x in row), last]
            chunks += cdiv(row[0].numel() + (place % 4 if shifted else 0), CHUNK)
        self.columns = HEAD + len(columns[0]) + 1
        values += [chunks, *([0] * (self.columns - 1))]
        self.rows = table.table(values, columns[0][0].device)
        self.count, self.chunks, self.aligned = len(columns), chunks, aligned
        self.per = cdiv(chunks, min(chunks, WAVES * launch.processors(columns[0][0])))
        self.programs = cdiv(chunks, self.per)

    def stretch(self) -> tuple[int, int, int]:
        return self.count, self.chunks, self.per


def _groups(columns: list[list], places: list[int] | None = None) -> dict:
    """(dtypes, whether 16-byte loads are allowed) → indices of the tensors; empty ones are left out.

    One odd tensor must not slow the others: loads of several elements need aligned pointers and whole vectors.
    """
    out: dict = {}
    for i, row in enumerate(columns):
        there = [x for x in row if x is not None]
        aligned = all(x.data_ptr() % 16 == 0 for x in there) and there[0].numel() % 16 == 0
        aligned = aligned and (places is None or places[i] % 4 == 0)
        if there[0].numel():
            out.setdefault((tuple(None if x is None else x.dtype for x in row), aligned), []).append(i)
    return out


def _places(xs: list[Tensor]) -> list[int]:
    places, total = [], 0
    for x in xs:
        places.append(total)
        total += x.numel()
    return places


@launch.on_device
def step_gram(tensors: list[Tensor], k: int) -> Tensor:
    p = len(tensors) // k if k else 0
    device = tensors[0].device if tensors else None
    total = torch.zeros(k, k, dtype=torch.float64, device=device)
    flat = [x.contiguous() for x in tensors]  # read only: a copy is right, if slow
    columns = [[flat[j * p + i] for j in range(k)] for i in range(p)]
    for (dtypes, aligned), members in _groups(columns).items():
        group = _Group([columns[i] for i in members], [0] * len(members), [0] * len(members), aligned)
        kb = min(launch.power_of_2(k), 4)
        blocks = cdiv(k, kb)
        partial = torch.empty(group.programs, k, k, dtype=torch.float64, device=device)
        _gram[(group.programs, blocks * blocks)](
            group.rows, partial, *group.stretch(), k, DTYPE=launch.TL[dtypes[0]], ALIGNED=aligned,
            COLUMNS=group.columns, KB=kb, CHUNK=CHUNK, BLOCK=2048 // (kb * kb), num_warps=4,
        )  # fmt: skip
        upper = partial.triu() if blocks > 1 else partial  # programs below the diagonal wrote nothing
        upper = torch.where(torch.ones_like(upper[0], dtype=torch.bool).triu(), upper, 0).sum(0)
        total += upper + upper.triu(1).T
    return total


@launch.on_device
def step_update(
    params: list[Tensor], momentum: list[Tensor], grads: list[Tensor], directions: list[Tensor], coef: Tensor,
    lr: float, beta: float = 0.0, weight_decay: float = 0.0, noise: float = 0.0, seed: int = 0, offset: int = 0,
) -> None:  # fmt: skip
    p, k = len(params), len(coef)
    places = _places(params)
    grads, directions = [g.contiguous() for g in grads], [d.contiguous() for d in directions]
    held = momentum or [None] * p
    columns = [[params[i], grads[i], held[i], *(directions[j * p + i] for j in range(k))] for i in range(p)]
    for ((dp, dg, dm, *dd), aligned), members in _groups(columns, places if noise else None).items():
        group = _Group(
            [columns[i] for i in members], [places[i] for i in members], [0] * len(members), aligned, bool(noise)
        )
        acc = torch.promote_types(dp, torch.float32)
        _update[(group.programs,)](
            group.rows, coef, *group.stretch(), lr, beta, 1 - lr * weight_decay, noise, *philox.key(seed, offset),
            P=launch.TL[dp], M=launch.TL[dm or dp], G=launch.TL[dg], D=launch.TL[dd[0] if dd else dp],
            ACC=launch.TL[acc], K=k, MOMENTUM=dm is not None, NOISE=bool(noise), ALIGNED=aligned, COLUMNS=group.columns,
            CHUNK=CHUNK, BLOCK=BLOCK * 4 // acc.itemsize, num_warps=4,
        )  # fmt: skip


_INT = {2: tl.int16, 4: tl.int32, 8: tl.int64}


def _lookahead_groups(params, grads, ulps):
    """(dtypes, constants, group, members) of each dtype combination; the extra column is the tensor's own index."""
    grads = [g.contiguous() for g in grads]
    columns = [list(row) for row in zip(params, grads, ulps)]
    for ((dp, dg, _), aligned), members in _groups(columns).items():
        group = _Group([columns[i] for i in members], [0] * len(members), members, aligned)
        size = dp.itemsize
        constants = dict(
            P=launch.TL[dp], G=launch.TL[dg], ACC=launch.TL[torch.promote_types(dp, torch.float32)], INT=_INT[size],
            TOP=2 ** (8 * size - 1) - 1, ALIGNED=aligned, COLUMNS=group.columns, CHUNK=CHUNK, BLOCK=BLOCK,
            num_warps=4,
        )  # fmt: skip
        yield group, members, constants


@launch.on_device
def step_lookahead(params: list[Tensor], grads: list[Tensor], alpha: float) -> tuple[list[Tensor], Tensor, Tensor]:
    """The one host synchronisation here is the size of ``index``, which the schema returns exactly.

    Only the backend that looked ahead can undo to the bit: each rounds θ ± alpha·g in its own way.
    """
    device = params[0].device if params else None
    ulps = [torch.empty_like(x, dtype=torch.int8) for x in params]
    groups = list(_lookahead_groups(params, grads, ulps))
    nothing = torch.zeros(1, dtype=torch.int64, device=device)
    counts = []
    for group, _, constants in groups:
        found = torch.empty(group.programs, dtype=torch.int64, device=device)
        _lookahead[(group.programs,)](
            group.rows, found, nothing, nothing, nothing, *group.stretch(), alpha, WRITE=False, **constants
        )
        counts.append(found)
    ends = torch.cat(counts).cumsum(0) if counts else nothing
    total = int(ends[-1])
    index = torch.empty(total, 2, dtype=torch.int64, device=device)
    value = torch.empty(total, dtype=torch.float64, device=device)
    begins = ends - torch.cat(counts) if counts else ends
    for (group, _, constants), places in zip(groups, begins.split([len(c) for c in counts]) if counts else ()):
        _lookahead[(group.programs,)](
            group.rows, nothing, places, index, value, *group.stretch(), alpha, WRITE=True, **constants
        )
    return ulps, index, value


@launch.on_device
def step_lookahead_undo(
    params: list[Tensor], grads: list[Tensor], ulps: list[Tensor], index: Tensor, value: Tensor, alpha: float
) -> None:
    index, count = index.contiguous(), len(value)
    for group, members, constants in _lookahead_groups(params, grads, [u.contiguous() for u in ulps]):
        _undo[(group.programs,)](group.rows, *group.stretch(), alpha, **constants)
        if count:
            row_of = {i: row for row, i in enumerate(members)}
            where = table.table([row_of.get(i, -1) for i in range(len(params))], value.device)
            _restore[(cdiv(count, 256),)](
                group.rows, index, value, count, where, P=constants["P"], COLUMNS=group.columns, BLOCK=256, num_warps=4
            )


def refuse(op: str, *args) -> str | None:
    read, written, many, k = {
        "step_gram": lambda tensors, k: (tensors, (), tensors, k),
        "step_update": lambda p, m, g, d, coef, *_: ((p, m, g, d, coef), (p, m), d, len(coef)),
        "step_lookahead": lambda p, g, *_: ((p, g), p, (), 0),
        "step_lookahead_undo": lambda p, g, ulps, *_: ((p, g, ulps), p, (), 0),
    }[op](*args)
    xs = launch.tensors([read])
    if len({x.device for x in xs}) > 1:
        return f"tensors are on {', '.join(sorted({str(x.device) for x in xs}))}; all must be on one device"
    for x in xs:
        if x.dtype not in (*DTYPES, torch.int8):
            return f"dtype {x.dtype} is not one of {', '.join(map(str, DTYPES))}"
    for x in launch.tensors([written]):
        if not x.is_contiguous():
            return f"a tensor of shape {tuple(x.shape)} is updated in place but not contiguous"
    p = len(many) // k if k else 0
    for i in range(p):
        if len({many[j * p + i].dtype for j in range(k)}) > 1:
            return f"directions of two dtypes for tensor {i}"
    return None
