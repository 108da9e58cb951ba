"""Raw parameters in elementwise code: positional embeddings, class tokens, layer scale, gates, HF's norms.

The parameter is given a row for each sample; the gradient of that copy is the per-sample gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map

from .errors import CaptureError
from .factors import DenseFactor
from .layout import Layout
from .place import Place
from .sources import function_name, tensors_in


class _PerSample(torch.autograd.Function):
    """(shape) → (n, *shape), the same row for each sample; backward records the gradient of each row."""

    @staticmethod
    def forward(ctx, anchor, value, n, use):
        ctx.use = use
        return value.expand(n, *value.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        ctx.use.record(DenseFactor(g))
        return None, None, None, None


def per_sample_copy(recorder, p: Tensor) -> Tensor:
    """A watched tensor as (n, *shape), one row for each sample."""
    cut, use = recorder.use(p, p.dtype)
    return _PerSample.apply(recorder.anchor, cut, recorder.n, use)


def aligned(recorder, p: Tensor, layout: Layout, shape: torch.Size) -> Tensor:
    """A watched tensor, one copy a sample, broadcastable to an activation of this shape."""
    if recorder.n == 1:  # every use is the one sample's
        return per_sample_copy(recorder, p)[0]
    full = (1,) * (len(shape) - p.dim()) + tuple(p.shape)
    if full[layout.axis] != 1:
        raise CaptureError(
            f"{recorder.describe(p)}: shape {tuple(p.shape)} meets an activation {tuple(shape)} position by position along "
            "the batch; a parameter that indexes the samples has no per-sample gradient"
        )
    others = [s for d, s in enumerate(full) if d != layout.axis]
    return layout.spread(per_sample_copy(recorder, p).reshape(recorder.n, *others), shape)


def elementwise(recorder, func, args, kwargs):
    """Any broadcasting function of activations and watched tensors."""
    inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    shape = torch.broadcast_shapes(*(x.shape for x in inputs))
    batch = next(x for x in inputs if recorder.carries_samples(x))
    layout = recorder.layout(batch, function_name(func))
    layout = replace(layout, axis=layout.axis + len(shape) - batch.dim())
    dtype = None  # a scalar parameter must not widen the result
    if any(x.dim() == 0 and x in recorder.sources for x in inputs):
        dtype = functools.reduce(torch.promote_types, [x.dtype for x in inputs if x.dim() and x.is_floating_point()] or [None])

    def swap(x):
        if not isinstance(x, Tensor) or x not in recorder.sources:
            return x
        rows = aligned(recorder, x, layout, shape)
        return rows if x.dim() or dtype is None else rows.to(dtype)

    return func(*(swap(x) for x in args), **{k: swap(x) for k, x in kwargs.items()})


def like(recorder, x: Tensor, y: Tensor) -> Tensor:
    """y, made from x inside a rule, has its samples where x has them."""
    if (place := recorder.places.of(x)) is not None:
        recorder.places.put(y, place)
    return y


def rounded(rule: Callable) -> Callable:
    """The rule of a function of which autocast casts all arguments, those that are only added too: its result is in that dtype."""

    def served(recorder, func, args, kwargs):
        out = rule(recorder, func, args, kwargs)
        if out is NotImplemented or out.dtype == (dtype := recorder.autocast_dtype(out)):
            return out
        return like(recorder, out, out.to(dtype))

    return served


def add_parameter(recorder, x: Tensor, p: Tensor) -> Tensor:
    return elementwise(recorder, torch.add, (x, p), {})


def multiply_parameter(recorder, x: Tensor, p: Tensor) -> Tensor:
    return elementwise(recorder, torch.mul, (x, p), {})


def _prelu(recorder, func, args, kwargs):
    def bind(input, weight):
        return input, weight

    x, weight = bind(*args, **kwargs)
    slope = weight.view(-1, *(1,) * (x.dim() - 2)) if x.dim() > 2 and weight.numel() > 1 else weight
    recorder.sources.derive(Tensor.view, [weight], slope)
    return (F.relu(x) - multiply_parameter(recorder, like(recorder, x, F.relu(-x)), slope)).to(x.dtype)


_GROWING = {"expand", "expand_as", "repeat", "broadcast_to", "tile", "repeat_interleave"}


def repeat_over_batch(recorder, func, args, kwargs):
    """A class token or query expanded to the batch by the model itself: from here on it has a row for each sample."""
    p = args[0] if args else None
    name = function_name(func)
    if name not in _GROWING or recorder.n is None or not isinstance(p, Tensor) or p not in recorder.sources:
        return NotImplemented
    out = func(*args, **kwargs)
    axis = recorder.batch_dim or 0
    axis = axis if axis < out.dim() else 0
    if out.dim() == 0 or out.shape[axis] != recorder.n:
        return NotImplemented
    full = (1,) * (out.dim() - p.dim()) + tuple(p.shape)
    if full[axis] != 1:
        return NotImplemented
    others = [s for d, s in enumerate(full) if d != axis]
    shape = [s for d, s in enumerate(out.shape) if d != axis]
    owned = name in ("repeat", "tile", "repeat_interleave")  # memory of its own, to be viewed and written to
    if owned and others != shape:
        return NotImplemented  # repeated along other dimensions too
    rows = per_sample_copy(recorder, p).reshape(recorder.n, *others).expand(recorder.n, *shape).movedim(0, axis)
    rows = rows.clone(memory_format=torch.contiguous_format) if owned else rows
    recorder.places.put(rows, Place(axis))
    return rows


NO_VMAP = {"lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell"}  # torch.func.vmap cannot map these
_ROW_BY_ROW = {"gru_cell", "rnn_tanh_cell", "rnn_relu_cell", "bilinear"}  # of two operands: row i of one meets row i of the other


def through_vmap(recorder, func, args, kwargs):
    """The general path (strict=False): the function of one sample, mapped over the batch and a copy of the parameter."""
    name, inputs = function_name(func), tensors_in(args, kwargs)
    watched = dict.fromkeys(recorder.describe(x) for x in inputs if x in recorder.sources)
    what = f"{' and '.join(watched)}: {name}"
    layouts = {id(x): recorder.layout(x, what) for x in inputs if x not in recorder.sources and recorder.carries_samples(x)}
    if name in _ROW_BY_ROW:  # a first state of zeros comes from nowhere, and yet has a row for each sample
        operands = [x for x in (*args[:2], *map(kwargs.get, ("input", "hx", "input1", "input2"))) if isinstance(x, Tensor)]
        if layout := next((layouts[id(x)] for x in operands if id(x) in layouts), None):
            layouts |= {id(x): layout for x in operands if x not in recorder.sources and id(x) not in layouts}
    if any(layout.flat for layout in layouts.values()):
        raise CaptureError(f"{what}: positions are folded into the dimension of the samples; give them one of their own, or freeze it")

    def per_sample(x, copy=lambda x: per_sample_copy(recorder, x), value=lambda x: x):
        if isinstance(x, Tensor) and x in recorder.sources:
            return copy(x), 0
        if isinstance(x, Tensor) and id(x) in layouts:
            axis = layouts[id(x)].axis
            return value(x).unsqueeze(axis + 1), axis  # the function still sees a batch, of one
        return value(x), None

    def mapped(**how):
        pairs = [per_sample(x, **how) for x in args]
        named = {k: per_sample(x, **how) for k, x in kwargs.items()}
        try:
            return torch.func.vmap(
                lambda a, k: func(*a, **k), (tuple(d for _, d in pairs), {k: d for k, (_, d) in named.items()}), randomness="different",
            )(tuple(x for x, _ in pairs), {k: x for k, (x, _) in named.items()})  # fmt: skip
        except (RuntimeError, ValueError, IndexError) as error:
            raise CaptureError(
                f"{what}: torch.func.vmap cannot map it over the samples ({error}); freeze its parameters with requires_grad_(False)"
            ) from error

    def joined(out, want):
        return tree_map(lambda y, z: _joined(recorder, what, y, z) if isinstance(y, Tensor) else y, out, want)

    with torch.no_grad():
        plain = _called(func, args, kwargs, _copied)
        if any(map(_narrow, tensors_in(plain))):  # rounding would hide a small mixture
            with torch.autocast(inputs[0].device.type, enabled=False):
                if (exact := _in_float32(func, args, kwargs)) is not None:
                    joined(mapped(copy=lambda x: _widened(x).expand(recorder.n, *x.shape), value=lambda x: tree_map(_widened, x)), exact)
    return joined(mapped(), plain)


def _called(func, args, kwargs, copy):
    """On copies of its tensors: it may write to them."""
    args, kwargs = tree_map(copy, (args, kwargs))
    return func(*args, **kwargs)


def _in_float32(func, args, kwargs):
    """None where it takes 16-bit numbers alone."""
    try:
        return _called(func, args, kwargs, _widened)
    except (RuntimeError, TypeError, ValueError):
        return None


def _copied(x):
    return x.clone() if isinstance(x, Tensor) else x


def _widened(x):
    return x.float() if _narrow(x) else _copied(x)


def _narrow(x) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.dtype.itemsize == 2


def _joined(recorder, what: str, rows: Tensor, want: Tensor) -> Tensor:
    """What a function gives for each sample, (n, …, 1, …), as it gives it for the batch, ``want``; an error if it gives something else."""
    each, whole = tuple(rows.shape[1:]), tuple(want.shape)
    axis = next((d for d, size in enumerate(each) if size == 1 and (*each[:d], recorder.n, *each[d + 1 :]) == whole), None)
    y = rows if axis is None else rows.squeeze(axis + 1).movedim(0, axis)
    if axis is None or y.shape != want.shape or not _near(y, want):
        raise CaptureError(
            f"{what}: it gives other values for the batch than for each sample alone, so that samples share gradients; freeze its "
            "parameters with requires_grad_(False)"
        )
    recorder.places.put(y, Place(axis))
    return y


def _near(y: Tensor, want: Tensor) -> bool:
    """But for rounding; what is infinite or NaN is so in both. Squares of narrower floats end at infinity and at zero too soon."""
    if not y.is_floating_point():
        return True
    off, whole = (x.double().norm() for x in (torch.where((y == want) | y.isnan() & want.isnan(), 0, y - want),
                                             torch.where(want.isfinite(), want, 0)))  # fmt: skip
    return bool(off <= torch.finfo(y.dtype).eps ** 0.5 * whole)


def _borrowed(recorder, func, args, kwargs):
    """The second tensor lends its shape or dtype, not its values."""
    if args[0] in recorder.sources:
        return NotImplemented
    return func(args[0], *(x.detach() if isinstance(x, Tensor) else x for x in args[1:]), **kwargs)


def _compared(recorder, func, args, kwargs):
    """No gradient: the values will do."""
    bare = [recorder.sources[x].cut if isinstance(x, Tensor) and x in recorder.sources else x for x in args]
    return func(*bare, **kwargs)


_NAMES = (
    "add", "sub", "mul", "div", "true_divide", "multiply", "subtract", "divide", "rsub", "pow", "maximum", "minimum",
    "addcmul", "addcdiv", "lerp", "where", "atan2", "arctan2", "fmod", "remainder", "hypot", "clamp", "clip", "clamp_min", "clamp_max",
    "fmax", "fmin", "copysign", "logaddexp", "logaddexp2", "xlogy", "float_power", "ldexp",
)  # fmt: skip
_DUNDERS = ("add", "radd", "iadd", "sub", "rsub", "isub", "mul", "rmul", "imul", "truediv", "rtruediv", "itruediv",
            "pow", "rpow", "ipow", "div", "rdiv", "idiv", "mod", "rmod", "imod")  # fmt: skip
ELEMENTWISE = {getattr(torch, name) for name in _NAMES if hasattr(torch, name)}
ELEMENTWISE |= {getattr(Tensor, name + end) for name in _NAMES for end in ("", "_") if hasattr(Tensor, name + end)}
ELEMENTWISE |= {getattr(Tensor, f"__{name}__") for name in _DUNDERS if hasattr(Tensor, f"__{name}__")}
ELEMENTWISE |= {torch.special.xlogy, torch.special.xlog1py}
_ORDERS = ("eq", "ne", "lt", "le", "gt", "ge")
_COMPARE = {getattr(Tensor, f"__{op}__") for op in _ORDERS}
_COMPARE |= {getattr(at, op) for at in (torch, Tensor)
             for op in (*_ORDERS, "not_equal", "less", "less_equal", "greater", "greater_equal")}  # fmt: skip
_BORROW = {Tensor.to, Tensor.type_as, Tensor.view_as, Tensor.reshape_as, Tensor.expand_as}
RULES = {
    **dict.fromkeys(_COMPARE, _compared),
    **dict.fromkeys(_BORROW, _borrowed),
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys((torch.prelu, Tensor.prelu, F.prelu), rounded(_prelu)),
}
