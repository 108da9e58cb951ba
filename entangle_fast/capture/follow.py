"""For each torch function by its name: where the samples are in its result, given where they are in its inputs.

Each follower takes a places.Call and returns a Place or a Lost. follow_kinds.py has those that come in kinds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .place import Place, Row

FOLLOW = {}


def follows(*names: str):
    def register(fn):
        FOLLOW.update(dict.fromkeys(names, fn))
        return fn

    return register


def by_axis(args, kwargs, position: int, dims: int, default=None):
    """The dimension argument of a call: one integer ≥ 0, a tuple of them, or None for all."""
    dim = kwargs.get("dim", kwargs.get("axis", kwargs.get("dims", args[position] if len(args) > position else default)))
    if isinstance(dim, int) and not isinstance(dim, bool):
        return dim % max(1, dims)
    if isinstance(dim, (tuple, list)) and all(isinstance(d, int) for d in dim):
        return tuple(d % max(1, dims) for d in dim)
    return None


def _same(c, places) -> bool:
    return all(p == places[0] for p in places)


def _kept(c):
    places = [p for _, p in c.placed]
    if not _same(c, places) and c.n > 1:
        return c.mixed(f"meets samples in dimensions {', '.join(str(p.axis) for p in places)}")
    if c.place.axis < c.y.dim() and c.y.shape[c.place.axis] == c.place.size(c.n):
        return c.place
    if c.y.dim() == 0:
        return c.mixed("reduces over the samples")
    fits = [d for d, s in enumerate(c.y.shape) if s == c.n and not c.y.requires_grad]
    return Place(fits[0]) if len(fits) == 1 else c.lost(f"leaves {tuple(c.y.shape)}, without the samples")


@follows(
    "add", "sub", "mul", "div", "true_divide", "multiply", "subtract", "divide", "rsub", "pow", "maximum", "minimum",
    "addcmul", "addcdiv", "lerp", "where", "atan2", "fmod", "remainder", "hypot", "add_", "sub_", "mul_", "div_", "pow_",
    "__add__", "__radd__", "__iadd__", "__sub__", "__rsub__", "__isub__", "__mul__", "__rmul__", "__imul__", "__truediv__",
    "__rtruediv__", "__itruediv__", "__div__", "__pow__", "__rpow__", "__ipow__", "eq", "ne", "lt", "le", "gt", "ge",
    "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__and__", "__or__", "__xor__", "logical_and", "logical_or",
    "bitwise_and", "bitwise_or", "masked_fill", "masked_fill_", "clamp", "logaddexp", "copy_", "addcmul_", "addcdiv_",
    "expand", "broadcast_to", "floor_divide", "__floordiv__", "__mod__", "xlogy", "fmax", "fmin", "copysign",
    "binary_cross_entropy", "binary_cross_entropy_with_logits", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss",
)  # fmt: skip
def _broadcast(c):
    """Aligned to the right, as broadcasting does."""
    tail = [(x.dim() - p.axis, p.outer, p.inner) for x, p in c.placed]
    if any(t != tail[0] for t in tail) and c.n > 1:
        return c.mixed("meets samples in different dimensions")
    if c.y.dim() == 0 and c.x.dim():
        return c.mixed("reduces over the samples")
    axis = c.y.dim() - tail[0][0]
    return c.place.at(axis) if axis >= 0 else c.lost("drops a dimension")


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


@follows("sum", "mean", "amax", "amin", "max", "min", "argmax", "argmin", "var", "std", "logsumexp", "norm", "prod", "median",
         "any", "all", "nansum", "nanmean", "var_mean", "std_mean", "vector_norm", "count_nonzero", "softmax", "log_softmax",
         "softmin", "cumsum", "cumprod", "flip", "roll", "sort", "argsort", "topk", "normalize", "logcumsumexp", "cosine_similarity",
         "nanmedian", "mode", "kthvalue", "aminmax", "gumbel_softmax", "diff", "cummax", "cummin", "trapz",
         "special_softmax", "special_log_softmax", "special_logsumexp")  # fmt: skip
def _along(c):
    """Functions along one or more dimensions: fine unless they go along the samples."""
    if c.name in ("max", "min") and len(c.args) > 1 and isinstance(c.args[1], Tensor):
        return _broadcast(c)
    position = {"norm": 2, "vector_norm": 2, "roll": 2, "normalize": 2, "topk": 2, "cosine_similarity": 2, "kthvalue": 2,
                "diff": 2}.get(c.name, 1)  # fmt: skip
    default = {"sort": -1, "argsort": -1, "topk": -1, "normalize": 1, "cosine_similarity": 1, "median": None, "diff": -1}
    if c.name == "sort" and len(c.args) > 1 and isinstance(c.args[1], bool):
        position = 9
    dim = by_axis(c.args, c.kwargs, position, c.x.dim(), default.get(c.name))
    if c.name in ("gumbel_softmax",):
        dim = by_axis(c.args, c.kwargs, 4, c.x.dim(), -1)
    along = tuple(range(c.x.dim())) if dim is None or dim == () else (dim,) if isinstance(dim, int) else dim
    if c.name == "flip" and dim is None:
        along = tuple(d % c.x.dim() for d in c.args[1:])
    if c.place.axis in along:
        return c.mixed("goes over the samples")
    if len(c.placed) > 1:
        return _kept(c)
    gone = 0 if c.y.dim() == c.x.dim() else sum(d < c.place.axis for d in along)
    return c.place.at(c.place.axis - gone)


@follows("layer_norm", "rms_norm")
def _normalised(c):
    shape = c.kwargs.get("normalized_shape", c.args[1] if len(c.args) > 1 else ())
    if c.place.axis >= c.x.dim() - len(shape):
        return c.mixed("normalises over the samples")
    return _kept(c)


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
        dims, where = 0, None
        for i in index:
            if isinstance(i, Tensor) and i.dtype == torch.bool:
                if mine is not None and dims <= mine.axis < dims + i.dim() or keyed:
                    return c.lost("selects rows by a mask")
                where = dims if where is None else where
                dims += i.dim()
            elif i is not None and not isinstance(i, bool):
                dims += 1
        return _kept(c)
    block = torch.broadcast_shapes(*(i.shape for i in arrays)) if arrays else ()
    spots = [k for k, i in enumerate(index) if isinstance(i, (Tensor, int)) and not isinstance(i, bool)]
    # integers join the arrays where there are arrays; the block stands first unless they are neighbours
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
            if arrays and not seen:
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


@follows("matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "mv", "baddbmm", "addmm", "dot", "linalg_matmul")
def _product(c):
    args = [a for a in c.args if isinstance(a, Tensor)] + [v for v in c.kwargs.values() if isinstance(v, Tensor)]
    left, right = args[-2:] if c.name != "__rmatmul__" else args[::-1]
    added = args[0] if len(args) == 3 else None
    found = []
    for x, p in c.placed:
        if x is added:
            found.append((c.y.dim() - (x.dim() - p.axis), p))
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


@follows("expand_as", "to", "type_as")
def _by_first(c):
    """The second tensor lends its shape or type only."""
    place = next((p for x, p in c.placed if x is c.args[0]), None)
    if place is None:
        return None
    return place.at(c.y.dim() - (c.args[0].dim() - place.axis))


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


@follows("multi_head_attention_forward")
def _attention(c):
    return Place(1 if c.k == 0 else 0)


@follows("lstm", "gru", "rnn_tanh", "rnn_relu")
def _recurrent(c):
    packed = isinstance(c.args[1], Tensor) and c.args[1].dim() == 1
    if packed or c.place.axis != (0 if c.args[-1] else 1):
        return c.lost("has a packed batch") if packed else c.mixed("takes the samples for positions")
    return c.place.at(c.place.axis if c.k == 0 else 1)


@follows("ctc_loss")
def _ctc(c):
    return c.place.at(0) if c.y.dim() else c.mixed("reduces over the samples")


@follows("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor", "size", "numel")
def _fresh(c):
    return None
