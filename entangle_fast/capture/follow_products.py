"""Followers of products that add up over a dimension: matmul, einsum, outer and inner, distances."""

from __future__ import annotations

from torch import Tensor

from .follow import _broadcast, _kept, follows
from .sources import tensors_in


def _operands(c) -> list[Tensor]:
    """In their order; names stand so too: mat1 and mat2, batch1 and batch2, x1 and x2."""
    return tensors_in(c.args, *(c.kwargs[name] for name in sorted(c.kwargs) if name != "out"))


@follows("matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "mv", "baddbmm", "addmm", "dot", "linalg_matmul")
def _product(c):
    args = _operands(c)
    left, right = args[-2:] if c.name != "__rmatmul__" else args[::-1]
    added = args[0] if len(args) == 3 else None
    found = []
    for x, p in c.placed:
        if x is added:
            found.append((c.y.dim() - (x.dim() - p.axis), p))
            if x is not left and x is not right:
                continue
        tail = x.dim() - p.axis  # 1: last, 2: last but one
        is_left = x is left
        contracted = 1 if is_left or x.dim() == 1 else 2
        if tail == contracted:
            return c.mixed("adds up over the samples")
        if x is left and x is right:
            if tail < 3:
                return c.mixed("pairs samples with others")
        if tail >= 3:
            found.append((c.y.dim() - tail + (left.dim() == 1) + (right.dim() == 1), p))
        else:
            found.append((c.y.dim() - (2 if is_left and right.dim() > 1 else 1), p))
    if any((a, p.outer, p.inner) != (found[0][0], found[0][1].outer, found[0][1].inner) for a, p in found) and c.n > 1:
        return c.mixed("pairs samples with others")
    return found[0][1].at(found[0][0])


@follows("einsum")
def _einsum(c):
    if len(c.args) < 2 or not isinstance(c.args[0], str):
        return _kept(c)
    operands = list(c.args[1]) if len(c.args) == 2 and isinstance(c.args[1], (tuple, list)) else list(c.args[1:])
    labels, arrow, out = c.args[0].replace(" ", "").partition("->")
    labels = labels.split(",")
    if not arrow:
        every = "".join(labels).replace(".", "")
        out = ("..." if "." in "".join(labels) else "") + "".join(sorted(s for s in set(every) if every.count(s) == 1))
    wide = max((x.dim() - len(s.replace("...", "")) for x, s in zip(operands, labels) if "." in s), default=0)
    spelled = []
    for x, s in zip([*operands, c.y], [*labels, out]):
        dots = x.dim() - len(s.replace("...", ""))
        spelled.append(s.replace("...", "".join(chr(0x3B1 + wide - k) for k in range(dots, 0, -1))))
    places = {id(x): p for x, p in c.placed}
    keys = {(s[p.axis], p.outer, p.inner) for x, s in zip(operands, spelled) if (p := places.get(id(x)))}
    label = next(iter(keys))[0]
    if label not in spelled[-1] or len(keys) > 1:
        return c.mixed("adds up over the samples, or pairs them")
    return c.place.at(spelled[-1].index(label))


@follows("outer", "ger")
def _outer(c):
    return c.mixed("pairs samples") if len(c.placed) > 1 else c.place.at(0 if c.x is c.args[0] else 1)


@follows("inner")
def _inner(c):
    if not all(x.dim() for x in c.args):
        return _broadcast(c)
    if len(c.placed) > 1 or c.place.axis == c.x.dim() - 1:
        return c.mixed("adds up over the samples, or pairs them")
    return c.place if c.x is c.args[0] else c.place.at(c.args[0].dim() - 1 + c.place.axis)


@follows("cdist")
def _distances(c):
    tails = [x.dim() - p.axis for x, p in c.placed]
    first, second = _operands(c)
    if all(t >= 3 for t in tails):
        return _broadcast(c)
    if len(c.placed) > 1 or tails[0] != 2 or first is second:
        return c.mixed("pairs samples with others")
    return c.place.at(c.y.dim() - (2 if c.x is first else 1))
