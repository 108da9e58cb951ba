"""Raw parameters in elementwise code: positional embeddings, class tokens, layer scale, gates, HF's norms.

The parameter is given a row for each sample; the gradient of that copy is the per-sample gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .errors import CaptureError
from .factors import DenseFactor
from .sources import function_name


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


def per_sample_copy(tape, p: Tensor) -> Tensor:
    """A watched tensor as (n, *shape), one row for each sample."""
    cut, use = tape.use(p, p.dtype)
    return _PerSample.apply(tape.anchor, cut, tape.n, use)


def _aligned(tape, p: Tensor, shape: torch.Size, where: str) -> Tensor:
    """A watched tensor, one copy a sample, broadcastable to an activation of this shape."""
    layout = tape.layout_of(shape, where)
    missing = len(shape) - p.dim()
    if missing == 0:  # it has the batch's own dimension: that must be 1
        if p.shape[0 if layout.flat else layout.axis] != 1:
            raise CaptureError(
                f"{tape.describe(p)}: shape {tuple(p.shape)} meets an activation {tuple(shape)} position by position along "
                "the batch; a parameter that indexes the samples has no per-sample gradient"
            )
        rows = per_sample_copy(tape, p)
        inner = rows.squeeze(1 + (0 if layout.flat else layout.axis))
    else:
        inner = per_sample_copy(tape, p)
    if layout.axis == 1 and not layout.flat and inner.dim() - 1 > len(shape) - 2:
        # positions stand before the samples: (n, t, …) as (t, n, …)
        return inner.transpose(0, 1)
    return layout.spread(inner, shape)


def elementwise(tape, func, args, kwargs):
    """Any broadcasting function of activations and watched tensors."""
    inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    shape = torch.broadcast_shapes(*(x.shape for x in inputs))

    def swap(x):
        return _aligned(tape, x, shape, function_name(func)) if isinstance(x, Tensor) and x in tape.sources else x

    return func(*(swap(x) for x in args), **{k: swap(x) for k, x in kwargs.items()})


def add_parameter(tape, x: Tensor, p: Tensor) -> Tensor:
    return elementwise(tape, torch.add, (x, p), {})


def multiply_parameter(tape, x: Tensor, p: Tensor) -> Tensor:
    return elementwise(tape, torch.mul, (x, p), {})


def _prelu(tape, func, args, kwargs):
    def bind(input, weight):
        return input, weight

    x, weight = bind(*args, **kwargs)
    slope = weight.view(-1, *(1,) * (x.dim() - 2)) if x.dim() > 2 and weight.numel() > 1 else weight
    tape.sources.derive(Tensor.view, [weight], slope)
    return F.relu(x) - multiply_parameter(tape, F.relu(-x), slope)


_GROWING = {"expand", "expand_as", "repeat", "broadcast_to", "tile", "repeat_interleave"}


def repeat_over_batch(tape, func, args, kwargs):
    """A class token or query expanded to the batch by the model itself: from here on it has a row for each sample."""
    p = args[0] if args else None
    if function_name(func) not in _GROWING or tape.n is None or not isinstance(p, Tensor) or p not in tape.sources:
        return NotImplemented
    out = func(*args, **kwargs)
    axis = tape.batch_dim or 0
    axis = axis if axis < out.dim() else 0
    if out.dim() == 0 or out.shape[axis] != tape.n or tape.n == 1:
        return NotImplemented
    lead = out.dim() - p.dim()  # new dimensions in front
    if lead == 0 and p.shape[axis] != 1 or lead > 0 and axis >= lead:
        return NotImplemented
    rows = per_sample_copy(tape, p)  # (n, *p.shape)
    if lead == 0:
        rows = rows.squeeze(1 + axis)
        shape = [s for d, s in enumerate(out.shape) if d != axis]
    else:
        shape = [s for d, s in enumerate(out.shape) if d != axis]
    if function_name(func) in ("repeat", "tile", "repeat_interleave") and list(rows.shape[1:]) != shape[-(rows.dim() - 1) :]:
        return NotImplemented  # repeated along other dimensions too
    rows = rows.reshape(tape.n, *(1,) * (len(shape) - rows.dim() + 1), *rows.shape[1:]).expand(tape.n, *shape)
    return rows.movedim(0, axis)


def through_vmap(tape, func, args, kwargs):
    """The general path (strict=False): the function of one sample, mapped over the batch and a copy of the parameter."""
    axis = tape.batch_dim or 0

    def per_sample(x):
        if not isinstance(x, Tensor):
            return x, None
        if x in tape.sources:
            return per_sample_copy(tape, x), 0
        if tape.carries_samples(x):
            return x.unsqueeze(axis + 1), axis  # the function still sees a batch, of one
        return x, None

    pairs = [per_sample(x) for x in args]
    named = {k: per_sample(x) for k, x in kwargs.items()}
    try:
        out = torch.func.vmap(
            lambda a, k: func(*a, **k), (tuple(d for _, d in pairs), {k: d for k, (_, d) in named.items()}), axis,
            randomness="different",
        )(tuple(x for x, _ in pairs), {k: x for k, (x, _) in named.items()})  # fmt: skip
    except (RuntimeError, ValueError) as error:
        raise CaptureError(
            f"{function_name(func)}: torch.func.vmap cannot map it over the samples ({error}); freeze its parameters with "
            "requires_grad_(False)"
        ) from error
    return torch.utils._pytree.tree_map(lambda y: y.squeeze(axis + 1) if isinstance(y, Tensor) else y, out)


_NAMES = (
    "add", "sub", "mul", "div", "true_divide", "multiply", "subtract", "divide", "rsub", "pow", "maximum", "minimum",
    "addcmul", "addcdiv", "lerp", "where", "atan2", "fmod", "remainder", "hypot",
)  # fmt: skip
_DUNDERS = ("add", "radd", "iadd", "sub", "rsub", "isub", "mul", "rmul", "imul", "truediv", "rtruediv", "itruediv",
            "pow", "rpow", "div", "rdiv", "idiv")  # fmt: skip
ELEMENTWISE = {getattr(torch, name) for name in _NAMES if hasattr(torch, name)}
ELEMENTWISE |= {getattr(Tensor, name + end) for name in _NAMES for end in ("", "_") if hasattr(Tensor, name + end)}
ELEMENTWISE |= {getattr(Tensor, f"__{name}__") for name in _DUNDERS if hasattr(Tensor, f"__{name}__")}
RULES = {**{f: elementwise for f in ELEMENTWISE}, torch.prelu: _prelu, F.prelu: _prelu}
