"""step: look-ahead and its exact undo, one byte a parameter; specification in reference/step.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, multi, table
from .launch import cdiv
from .multi import BLOCK, CHUNK, Group, advance, elements, find, groups
from .table import pointer


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


@triton.jit(do_not_specialize=["capacity"])
def _lookahead(
    rows, found, places, index, value, count, chunks, per, capacity: tl.int64, alpha: tl.float64,
    P: tl.constexpr, G: tl.constexpr, ACC: tl.constexpr, INT: tl.constexpr, TOP: tl.constexpr,
    WRITE: tl.constexpr, BOUNDED: tl.constexpr, ALIGNED: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """WRITE false: found[program] = elements whose plain undo is more than 127 floats off (or not finite).
    WRITE true: θ ← θ − alpha·g, its ulps, and those elements at places[program] of index and value, in order.
    BOUNDED: those whose place is not below ``capacity`` stay where they are, with ulps −128.

    Two passes, because how many there are sizes the result, or says who has a slot; the order is that of the elements, every time.
    Bytes: θ and g twice, θ and one byte written; 24 a slot.  Limit: bandwidth.  Fraction reached: not yet run on a GPU.
    """
    start = tl.program_id(0).to(tl.int64) * per
    i = find(rows, count, start, COLUMNS)
    at = tl.load(places + tl.program_id(0)) if WRITE else tl.cast(0, tl.int64)
    for chunk in range(start, tl.minimum(start + per, chunks)):
        i = advance(rows, i, chunk, COLUMNS)
        row = rows + i.to(tl.int64) * COLUMNS
        size = elements(row, ALIGNED)
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
                off = tl.minimum(tl.maximum(off, -127), 127)
                slot = at + tl.cumsum(far.to(tl.int64), 0) - 1
                listed = far
                if BOUNDED:
                    listed = far & (slot < capacity)
                    new = tl.where(far & (slot >= capacity), old, new)
                    off = tl.where(far & (slot >= capacity), -128, off)
                tl.store(theta + e, new, mask=mask)
                ulps = pointer(tl.load(row + 5), tl.int8, ALIGNED)
                tl.store(ulps + e, off.to(tl.int8), mask=mask)
                tl.store(index + 2 * slot, tl.zeros_like(slot) + tl.load(row + 6), mask=listed)
                tl.store(index + 2 * slot + 1, e, mask=listed)
                tl.store(value + slot, old.to(tl.float64), mask=listed)
            at += tl.sum(far.to(tl.int64), 0)
    if not WRITE:
        tl.store(found + tl.program_id(0), at)


@triton.jit
def _undo(
    rows, count, chunks, per, alpha: tl.float64,
    P: tl.constexpr, G: tl.constexpr, ACC: tl.constexpr, INT: tl.constexpr, TOP: tl.constexpr,
    ALIGNED: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """θ ← θ + alpha·g moved by its ulps: the very bits from before the look-ahead, but for the listed elements. −128: θ as it is.

    Bytes: θ, g and one byte read, θ written.  Limit: bandwidth.  Fraction reached: not yet run on a GPU.
    """
    start = tl.program_id(0).to(tl.int64) * per
    i = find(rows, count, start, COLUMNS)
    for chunk in range(start, tl.minimum(start + per, chunks)):
        i = advance(rows, i, chunk, COLUMNS)
        row = rows + i.to(tl.int64) * COLUMNS
        size = elements(row, ALIGNED)
        first = (chunk - tl.load(row)) * CHUNK
        theta, grad = pointer(tl.load(row + 3), P, ALIGNED), pointer(tl.load(row + 4), G, ALIGNED)
        ulps = pointer(tl.load(row + 5), tl.int8, ALIGNED)
        for block in range(0, CHUNK, BLOCK):
            e = first + block + tl.arange(0, BLOCK)
            mask = e < size
            here, g = tl.load(theta + e, mask=mask, other=0.0), tl.load(grad + e, mask=mask, other=0.0)
            back = _moved(here, g, alpha, P, ACC)
            off = tl.load(ulps + e, mask=mask, other=0).to(tl.int64)
            exact = _from_ordered(_ordered(back, INT, TOP) + off, INT, TOP, P)
            tl.store(theta + e, tl.where(off == -128, here, exact), mask=mask)


@triton.jit
def _restore(rows, index, value, count, where, P: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """θ[tensor, element] = value for the listed elements of this group; where: original tensor → row, or −1. Tensor −1: none.

    Bytes: 24 an element.  Limit: latency.  Fraction reached: not yet run on a GPU.
    """
    q = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tensor = tl.load(index + 2 * q, mask=q < count, other=-1)
    row = tl.load(where + tensor, mask=tensor >= 0, other=-1)
    mask = row >= 0
    theta = tl.load(rows + row * COLUMNS + 3, mask=mask, other=0).to(tl.pointer_type(P))
    old = tl.load(value + q, mask=mask, other=0.0)
    tl.store(theta + tl.load(index + 2 * q + 1, mask=mask, other=0), old.to(P), mask=mask)


_INT = {2: tl.int16, 4: tl.int32, 8: tl.int64}


def _lookahead_groups(params, grads, ulps):
    """(dtypes, constants, group, members) of each dtype combination; the extra column is the tensor's own index."""
    grads = [g.contiguous() for g in grads]
    columns = [list(row) for row in zip(params, grads, ulps)]
    for ((dp, dg, _), aligned), members in groups(columns).items():
        group = Group([columns[i] for i in members], [0] * len(members), members, aligned)
        size = dp.itemsize
        constants = dict(
            P=launch.TL[dp], G=launch.TL[dg], ACC=launch.TL[torch.promote_types(dp, torch.float32)], INT=_INT[size],
            TOP=2 ** (8 * size - 1) - 1, ALIGNED=aligned, COLUMNS=group.columns, CHUNK=CHUNK, BLOCK=BLOCK,
            num_warps=4,
        )  # fmt: skip
        yield group, members, constants


@launch.on_device
def step_lookahead(
    params: list[Tensor], grads: list[Tensor], alpha: float, capacity: int | None = None
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Without a capacity the host waits once, for the size of ``index``, which the schema returns exactly; with one, never.

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
            group.rows, found, nothing, nothing, nothing, *group.stretch(), 0, alpha, WRITE=False, BOUNDED=False, **constants
        )
        counts.append(found)
    ends = torch.cat(counts).cumsum(0) if counts else nothing
    if capacity is None:
        slots = int(ends[-1])
        index = torch.empty(slots, 2, dtype=torch.int64, device=device)
        value = torch.empty(slots, dtype=torch.float64, device=device)
    else:
        slots = capacity
        index = torch.full((slots, 2), -1, dtype=torch.int64, device=device)
        value = torch.zeros(slots, dtype=torch.float64, device=device)
    begins = ends - torch.cat(counts) if counts else ends
    for (group, _, constants), places in zip(groups, begins.split([len(c) for c in counts]) if counts else ()):
        _lookahead[(group.programs,)](
            group.rows, nothing, places, index, value, *group.stretch(), slots, alpha, WRITE=True, BOUNDED=capacity is not None, **constants
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


def refuse(op: str, params, grads, *rest) -> str | None:
    return multi.refuse((params, grads), params, others=rest)
