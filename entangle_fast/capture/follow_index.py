"""Followers of what reads or writes entries by their indices."""

from __future__ import annotations

import torch
from torch import Tensor

from .follow import _kept, by_axis, follows
from .follow_shapes import _piece
from .place import Row


@follows("select", "unbind")
def _selected(c):
    dim = by_axis(c.args, c.kwargs, 1, c.x.dim(), 0)
    index = c.k if c.name == "unbind" else c.kwargs.get("index", c.args[2] if len(c.args) > 2 else 0)
    if dim == c.place.axis:
        return _one(c, index)
    return c.place.at(c.place.axis - (dim < c.place.axis))


def _one(c, index):
    if c.place.outer == c.place.inner == 1:
        return Row(int(index) % c.n)
    return c.lost("takes some of the samples out")


def _is_arange(index: Tensor, n: int) -> bool:
    flat = index.reshape(-1)
    return flat.numel() == n and flat.dtype == torch.int64 and bool((flat == torch.arange(n, device=flat.device)).all())


@follows("__getitem__")
def _indexed(c):
    table, index = c.args
    index = list(index) if isinstance(index, tuple) else [index]
    index = [torch.as_tensor(i, device=table.device) if isinstance(i, list) or hasattr(i, "__array__")
             and not isinstance(i, (Tensor, int)) else i for i in index]  # fmt: skip
    consumed = sum(i.dim() if isinstance(i, Tensor) and i.dtype == torch.bool else 1
                   for i in index if i is not None and i is not Ellipsis and not isinstance(i, bool))  # fmt: skip
    rest = [slice(None)] * (table.dim() - consumed)
    if any(i is Ellipsis for i in index):
        at = next(k for k, i in enumerate(index) if i is Ellipsis)
        index[at : at + 1] = rest
    else:
        index += rest
    mine = next((p for x, p in c.placed if x is table), None)
    keyed = [(x, p) for x, p in c.placed if x is not table]
    arrays = [i for i in index if isinstance(i, Tensor) and (i.dim() or i.dtype == torch.bool)]
    if any(isinstance(i, bool) or i.dtype == torch.bool for i in index if isinstance(i, (bool, Tensor))):
        dims = 0
        for i in index:
            if isinstance(i, Tensor) and i.dtype == torch.bool:
                if mine is not None and dims <= mine.axis < dims + i.dim() or keyed:
                    return c.lost("selects rows by a mask")
                dims += i.dim()
            elif i is not None and not isinstance(i, bool):
                dims += 1
        if any(isinstance(i, bool) or isinstance(i, Tensor) and i.dtype == torch.bool and not i.dim() for i in index):
            return c.lost("adds a dimension by a truth value")
        # a mask is as many lists of indices as it has dimensions; what they are does not matter
        index = [j for i in index for j in ([i.new_zeros(1, dtype=torch.int64)] * i.dim()
                 if isinstance(i, Tensor) and i.dtype == torch.bool else [i])]  # fmt: skip
        arrays = [i for i in index if isinstance(i, Tensor) and i.dim()]
    block = torch.broadcast_shapes(*(i.shape for i in arrays)) if arrays else ()
    # unlike numpy's, torch's integers select first; the block stands first unless the arrays are neighbours then
    left = [i for i in index if not isinstance(i, int) and not (isinstance(i, Tensor) and not i.dim())]
    spots = [k for k, i in enumerate(left) if isinstance(i, Tensor)]
    joined = arrays and spots == list(range(spots[0], spots[0] + len(spots)))
    out, d, axis, seen = 0, 0, None, False
    if arrays and not joined:
        out, seen, front = len(block), True, 0
    for i in index:
        if i is None:
            out += 1
            continue
        if isinstance(i, slice):
            if mine is not None and d == mine.axis:
                start, stop, step = i.indices(table.shape[d])
                piece = _piece(c, start, len(range(start, stop, step)), step)
                if not hasattr(piece, "axis"):
                    return piece
                axis, mine_now = out, piece
            out += 1
        else:
            if isinstance(i, Tensor) and i.dim() and not seen:
                front, seen = out, True
                out += len(block)
            if mine is not None and d == mine.axis:
                if not isinstance(i, Tensor) or i.dim() == 0:
                    return _one(c, i) if not arrays else c.lost("takes one sample out")
                if mine.outer * mine.inner != 1 or not _is_arange(i, c.n) or not arrays:
                    return c.mixed("reorders or selects samples")
                inside = len(block) - i.dim() + next((k for k, s in enumerate(i.shape) if s == c.n), 0)
                if any(x.dim() - p.axis != len(block) - inside for x, p in keyed):
                    return c.mixed("pairs samples with those of others")
                axis, mine_now = front + inside, mine
        d += 1
    if mine is None:  # a constant table, looked up by the batch
        x, p = keyed[0]
        if any((z.dim() - q.axis, q.outer, q.inner) != (x.dim() - p.axis, p.outer, p.inner) for z, q in keyed):
            return c.mixed("meets samples in different dimensions")
        return p.at(front + len(block) - (x.dim() - p.axis))
    if keyed and not any(isinstance(i, Tensor) and i.dim() and _is_arange(i, c.n) for i in index):
        return c.mixed("looks every sample's index up in every sample")
    return mine_now.at(axis)


@follows("__setitem__", "index_put_", "index_put")
def _written(c):
    target = c.args[0]
    mine = next((p for x, p in c.placed if x is target), None)
    value = c.args[2] if len(c.args) > 2 else None
    there = next(((x, p) for x, p in c.placed if x is value), None)
    if there is None:
        return mine if mine is not None else c.lost("writes at places that the batch decides")
    axis = _axis_written(target, c.args[1], there[0].dim() - there[1].axis)
    if axis is None or (mine is not None and mine != there[1].at(axis)):
        return c.lost("writes samples to places that are not known")
    return there[1].at(axis)


def _axis_written(target: Tensor, index, tail: int) -> int | None:
    """Which dimension of ``target`` the value's dimension ``tail`` (from the right) fills, through an index of integers,
    slices, None and …; None where it is cut, or the index is another."""
    index = list(index) if isinstance(index, tuple) else [index]
    if any(not (i is None or i is Ellipsis or isinstance(i, slice) or type(i) is int) for i in index):
        return None
    used = sum(i is not None and i is not Ellipsis for i in index)
    rest = [slice(None)] * (target.dim() - used)
    at = next((k for k, i in enumerate(index) if i is Ellipsis), None)
    index = index + rest if at is None else index[:at] + rest + index[at + 1 :]
    left, d = [], 0  # dimensions of target[index]: the dimension of target, and whether it is whole
    for i in index:
        if i is None:
            left.append((None, True))
            continue
        if isinstance(i, slice):
            left.append((d, i.indices(target.shape[d]) == (0, target.shape[d], 1)))
        d += 1
    if tail > len(left):
        return None
    axis, whole = left[-tail]
    return axis if whole else None


@follows("index_select", "gather", "scatter", "scatter_add", "index_add", "scatter_", "scatter_add_", "index_add_", "take_along_dim",
         "index_fill", "index_copy", "scatter_reduce", "index_copy_")  # fmt: skip
def _addressed(c):
    dim = by_axis(c.args, c.kwargs, 2 if c.name == "take_along_dim" else 1, c.y.dim())
    mine = next((p for x, p in c.placed if x is c.args[0]), None)
    if mine is None and c.name == "index_select":
        return c.place.at(dim)
    if dim is None or dim == (mine or c.place).axis or (c.name == "index_select" and len(c.placed) > 1):
        return c.mixed("reorders or selects samples")
    return _kept(c)


@follows("nonzero", "masked_select", "argwhere", "unique", "take", "bincount", "histc", "masked_scatter", "masked_scatter_",
         "unique_consecutive", "_pack_padded_sequence", "_pad_packed_sequence")  # fmt: skip
def _selected_by_value(c):
    return c.lost("selects rows by their values")
