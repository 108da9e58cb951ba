"""For each torch function by its name: where the samples are in its result, given where they are in its inputs.

Each follower takes a place.Call and returns a Place or a Lost. Here: the register, broadcasting, functions along dimensions; in
follow_shapes.py, follow_index.py, follow_products.py and follow_layers.py those of their subject; in follow_kinds.py whole kinds, and
which follower serves a name.
"""

from __future__ import annotations

from torch import Tensor

from .place import Place
from .sources import tensors_in

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


def _widened(c) -> bool:
    """Does a tensor with samples, of two operands, have fewer dimensions than the other?"""
    operands = tensors_in(c.args[:2], {k: z for k, z in c.kwargs.items() if k != "weight"})
    return c.n > 1 and max(z.dim() for z in operands) > min(x.dim() for x, _ in c.placed)


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


def _before_last(c, dims: int):
    """Works on the last ``dims`` dimensions of its operands; those before them are a batch."""
    if not _same(c, [p for _, p in c.placed]) and c.n > 1:
        return c.mixed("meets samples in different dimensions")
    if any(p.axis >= x.dim() - dims for x, p in c.placed):
        return c.mixed("goes over the samples")
    return c.lost("broadcasts the samples to more dimensions") if _widened(c) else _kept(c)


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


@follows("sum", "mean", "amax", "amin", "max", "min", "argmax", "argmin", "var", "std", "logsumexp", "norm", "prod", "median",
         "any", "all", "nansum", "nanmean", "var_mean", "std_mean", "vector_norm", "count_nonzero", "softmax", "log_softmax",
         "softmin", "cumsum", "cumprod", "flip", "roll", "sort", "argsort", "topk", "normalize", "logcumsumexp", "cosine_similarity",
         "nanmedian", "mode", "kthvalue", "aminmax", "gumbel_softmax", "diff", "cummax", "cummin", "trapz", "linalg_vecdot",
         "special_softmax", "special_log_softmax", "special_logsumexp")  # fmt: skip
def _along(c):
    """Functions along one or more dimensions: fine unless they go along the samples."""
    if c.name in ("max", "min") and len(c.args) > 1 and isinstance(c.args[1], Tensor):
        return _broadcast(c)
    position = {"norm": 2, "vector_norm": 2, "roll": 2, "normalize": 2, "topk": 2, "cosine_similarity": 2, "kthvalue": 2,
                "diff": 2, "linalg_vecdot": 2}.get(c.name, 1)  # fmt: skip
    default = {"sort": -1, "argsort": -1, "topk": -1, "normalize": 1, "cosine_similarity": 1, "median": None, "diff": -1,
               "linalg_vecdot": -1}
    if c.name == "sort" and len(c.args) > 1 and isinstance(c.args[1], bool):
        position = 9
    dim = by_axis(c.args, c.kwargs, position, c.x.dim(), default.get(c.name))
    if c.name in ("gumbel_softmax",):
        dim = by_axis(c.args, c.kwargs, 4, c.x.dim(), -1)
    along = tuple(range(c.x.dim())) if dim is None or dim == () else (dim,) if isinstance(dim, int) else dim
    if c.name == "flip" and len(c.args) > 2:  # x.flip(0, 1)
        along = tuple(d % c.x.dim() for d in c.args[1:])
    if c.place.axis in along:
        return c.mixed("goes over the samples")
    if not _same(c, [p for _, p in c.placed]) and c.n > 1:
        return c.mixed("meets samples in different dimensions")
    if _widened(c):
        return c.lost("broadcasts the samples to more dimensions")
    gone = 0 if c.y.dim() == c.x.dim() else sum(d < c.place.axis for d in along)
    return c.place.at(c.place.axis - gone)


@follows("layer_norm", "rms_norm")
def _normalised(c):
    shape = c.kwargs.get("normalized_shape", c.args[1] if len(c.args) > 1 else ())
    if c.place.axis >= c.x.dim() - len(shape):
        return c.mixed("normalises over the samples")
    if len(c.placed) > 1:
        return c.mixed("takes a weight from the samples")
    return _kept(c)


@follows("expand_as", "to", "type_as")
def _by_first(c):
    """The second tensor lends its shape or type only."""
    place = next((p for x, p in c.placed if x is c.args[0]), None)
    if place is None:
        return None
    return place.at(c.y.dim() - (c.args[0].dim() - place.axis))


@follows("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor", "size", "numel")
def _fresh(c):
    return None
