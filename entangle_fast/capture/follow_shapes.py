"""Followers of what moves, joins, cuts and repeats dimensions."""

from __future__ import annotations

from .follow import _kept, _same, by_axis, follows
from .place import Place


def _order(c) -> list[int] | None:
    """Which input dimension each output dimension was."""
    dims, args = list(range(c.x.dim())), c.args[1:]
    if c.name in ("t", "t_", "T", "mT", "adjoint", "mH", "H"):
        return dims[:-2] + dims[-2:][::-1] if c.name in ("mT", "adjoint", "mH") else dims[::-1]
    if c.name in ("permute", "permute_copy"):
        order = c.kwargs.get("dims", args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args)
        return [d % len(dims) for d in order]
    if c.name in ("movedim", "moveaxis"):
        source, to = (c.kwargs.get(k, args[i] if len(args) > i else None) for i, k in enumerate(("source", "destination")))
        source, to = ([s] if isinstance(s, int) else list(s) for s in (source, to))
        rest = [d for d in dims if d not in {s % len(dims) for s in source}]
        for place, s in sorted((t % len(dims), s % len(dims)) for s, t in zip(source, to)):
            rest.insert(place, s)
        return rest
    names = (("dim0", "axis0"), ("dim1", "axis1"))
    i, j = (next((c.kwargs[n] for n in both if n in c.kwargs), args[k] if len(args) > k else None) for k, both in enumerate(names))
    dims[i], dims[j] = dims[j], dims[i]
    return dims


@follows("transpose", "swapaxes", "swapdims", "transpose_", "permute", "permute_copy", "movedim", "moveaxis", "t", "t_", "T",
         "mT", "adjoint", "mH", "H")  # fmt: skip
def _permuted(c):
    return c.place.at(_order(c).index(c.place.axis))


@follows("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "ravel", "view_as", "reshape_as", "unsqueeze_",
         "squeeze_", "_unsafe_view", "view_copy", "atleast_1d", "atleast_2d", "atleast_3d")  # fmt: skip
def _reshaped(c):
    shape = c.x.shape
    if c.name in ("unsqueeze_", "squeeze_"):  # x has its new shape already
        return _kept(c)
    if c.n > 1 and c.name in ("squeeze", "unsqueeze"):
        big = [d for d, s in enumerate(shape) if s != 1]
        kept = [d for d, s in enumerate(c.y.shape) if s != 1]
        return c.place.at(kept[big.index(c.place.axis)])
    return c.reshaped(shape, c.y.shape)


@follows("as_strided", "as_strided_copy", "as_strided_")
def _strided(c):
    """Strides of the caller's own may go anywhere in memory: nothing can be told, with strict=False neither."""
    return c.mixed("reads its input's memory in an order of its own; spell it with permute, unfold or an index")


@follows("cat", "concat", "concatenate")
def _joined(c):
    dim = by_axis(c.args, c.kwargs, 1, c.y.dim(), 0)
    places = [p for _, p in c.placed]
    if dim != places[0].axis or any(p.axis != dim for p in places):
        return _kept(c)
    tensors = c.args[0] if c.args else c.kwargs["tensors"]
    if len(tensors) != len(places) or any(p.inner != places[0].inner for p in places):
        return c.lost("adds rows to the batch")
    return Place(dim, sum(p.outer for p in places), places[0].inner)


@follows("stack")
def _stacked(c):
    dim = by_axis(c.args, c.kwargs, 1, c.y.dim(), 0)
    place = _same(c, [p for _, p in c.placed]) or c.n == 1
    return c.place.at(c.place.axis + (dim <= c.place.axis)) if place else c.mixed("meets samples in different dimensions")


def _piece(c, start: int, length: int, step: int = 1):
    """Entries of the samples' dimension: whole batches of it, or lost."""
    p, batch = c.place, c.n * c.place.inner
    if step == 1 and length and length % batch == 0 and start % batch == 0:
        return Place(p.axis, length // batch, p.inner)
    if p.outer == 1 and step == p.inner and length == c.n:  # one position of each sample
        return Place(p.axis)
    return c.lost("takes some of the samples out")


@follows("chunk", "split", "tensor_split", "split_with_sizes", "unsafe_chunk", "unsafe_split")
def _cut(c):
    if by_axis(c.args, c.kwargs, 2, c.x.dim(), 0) != c.place.axis:
        return c.place
    start = sum(z.shape[c.place.axis] for z in c.out[: c.k])
    return _piece(c, start, c.y.shape[c.place.axis])


@follows("narrow", "narrow_copy")
def _narrowed(c):
    if by_axis(c.args, c.kwargs, 1, c.x.dim()) != c.place.axis:
        return c.place
    start = c.kwargs.get("start", c.args[2] if len(c.args) > 2 else 0)
    return _piece(c, int(start), c.y.shape[c.place.axis])


@follows("repeat", "tile")
def _repeated(c):
    reps = c.kwargs.get("repeats", c.kwargs.get("dims", c.args[1] if len(c.args) == 2 else c.args[1:]))
    reps = [reps] if isinstance(reps, int) else list(reps)
    axis = c.y.dim() - (c.x.dim() - c.place.axis)
    tail = c.x.dim() - c.place.axis
    times = reps[-tail] if len(reps) >= tail else 1
    return Place(axis, c.place.outer * times, c.place.inner)


@follows("repeat_interleave")
def _interleaved(c):
    dim = by_axis(c.args, c.kwargs, 2, c.x.dim())
    times = c.kwargs.get("repeats", c.args[1] if len(c.args) > 1 else None)
    if dim is None or not isinstance(times, int):
        return c.place if dim is not None and dim != c.place.axis else c.lost("repeats samples")
    return Place(c.place.axis, c.place.outer, c.place.inner * times) if dim == c.place.axis else c.place


@follows("pad", "constant_pad_nd")
def _padded(c):
    sides = c.kwargs.get("pad", c.args[1] if len(c.args) > 1 else ())
    before = c.x.dim() - 1 - c.place.axis
    if any(sides[2 * before : 2 * before + 2]):
        return c.lost("adds rows to the batch")
    return c.place


@follows("unfold")
def _windows(c):
    if c.y.dim() == c.x.dim() + 1:  # Tensor.unfold(dimension, size, step), not F.unfold of images
        dim = c.kwargs.get("dimension", c.args[1] if len(c.args) > 1 else 0)
        return c.lost("takes some of the samples out") if dim % c.x.dim() == c.place.axis else c.place
    return c.mixed("goes over the samples") if c.place.axis or c.x.dim() < 4 else c.place


@follows("diagonal")
def _on_the_diagonal(c):
    offset, first, second = (c.kwargs.get(k, c.args[i] if len(c.args) > i else d)
                             for i, (k, d) in enumerate((("offset", 0), ("dim1", 0), ("dim2", 1)), 1))  # fmt: skip
    pair = {first % c.x.dim(), second % c.x.dim()}
    if c.place.axis in pair:
        return c.lost("takes some of the samples out") if offset or c.y.shape[-1] != c.n else c.place.at(c.y.dim() - 1)
    return c.place.at(c.place.axis - sum(d < c.place.axis for d in pair))


_STACKS = {"vstack": 0, "row_stack": 0, "hstack": 1, "dstack": 2, "column_stack": 1}


@follows(*_STACKS)
def _side_by_side(c):
    if any(x.dim() != c.x.dim() for x, _ in c.placed):
        return c.lost("joins tensors of several shapes")
    if c.name in ("vstack", "row_stack", "dstack") and c.x.dim() == 1:
        return c.place.at(1)
    dim = 0 if c.name == "hstack" and c.x.dim() == 1 else _STACKS[c.name]
    if c.x.dim() <= dim:  # a new dimension behind the others
        return _kept(c)
    c.args, c.kwargs = (c.args[0], dim), {}
    return _joined(c)


@follows("hsplit", "vsplit", "dsplit")
def _cut_at(c):
    c.args = (c.args[0], c.args[1], {"hsplit": min(1, c.x.dim() - 1), "vsplit": 0, "dsplit": 2}[c.name])
    return _cut(c)


@follows("broadcast_tensors")
def _broadcast_together(c):
    given = c.args[0] if len(c.args) == 1 and isinstance(c.args[0], (tuple, list)) else c.args
    place = next((p for x, p in c.placed if x is given[c.k]), None)
    return place and place.at(c.y.dim() - (given[c.k].dim() - place.axis))


@follows("meshgrid")
def _grid(c):
    given = c.args[0] if len(c.args) == 1 and isinstance(c.args[0], (tuple, list)) else c.args
    at = [k for k, x in enumerate(given) if any(x is z for z, _ in c.placed)]
    if len(at) > 1:
        return c.mixed("pairs samples with others")
    swapped = c.kwargs.get("indexing", "ij") == "xy" and at[0] < 2
    return c.place.at(1 - at[0] if swapped else at[0]) if given[c.k].dim() else c.place
