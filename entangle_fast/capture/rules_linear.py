"""Linear layers in all their spellings: F.linear, matmul, addmm, einsum with a parameter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .errors import CaptureError
from .factors import DenseFactor, LinearFactor
from .layout import Layout, no_view
from .place import Place
from .remake import remaker
from .rules_elementwise import add_parameter


class _Linear(torch.autograd.Function):
    """F.linear whose backward returns the input's gradient only, and records the weight's factors."""

    @staticmethod
    def forward(ctx, x, anchor, weight, bias, layout, weight_use, bias_use, remake):
        ctx.layout, ctx.weight_use, ctx.bias_use, ctx.remake = layout, weight_use, bias_use, remake
        ctx.save_for_backward(x if weight_use and not remake else None, weight if x.requires_grad else None)
        return no_view(F.linear(x, weight, bias))

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        b = ctx.layout.positions(g)
        if ctx.weight_use:
            ctx.weight_use.record(LinearFactor(ctx.layout.positions(ctx.remake() if ctx.remake else x), b))
        if ctx.bias_use:
            ctx.bias_use.record(DenseFactor(b[:, 0] if b.shape[1] == 1 else b.sum(1)))
        dx = g @ weight if ctx.needs_input_grad[0] else None
        return (dx,) + (None,) * 7


def linear_with(recorder, x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout | None = None) -> Tensor:
    """x (…, d_in) with samples, weight (d_out, d_in) and bias (d_out,) of which at least one is watched."""
    recorder.refuse_samples("linear", weight, bias)
    layout = layout or recorder.layout(x, "linear")
    if layout.axis >= x.dim() - 1:
        raise CaptureError(f"linear: input of shape {tuple(x.shape)} has its samples in the last dimension, which is summed over")
    recorder.refuse_dtypes("linear", x, weight, bias)
    dtype = recorder.autocast_dtype(x)
    x = x.to(dtype)
    if bias is not None and (bias.dim() != 1 or len(bias) == 1 != len(weight)):  # one that is broadcast
        y = linear_with(recorder, x, weight, None, layout)
        recorder.places.put(y, Place(layout.axis, layout.outer, layout.inner))
        return add_parameter(recorder, y, bias)
    w, weight_use = recorder.use(weight, dtype)
    b, bias_use = recorder.use(bias, dtype) if bias is not None else (None, None)
    return _Linear.apply(x, recorder.anchor, w, b, layout, weight_use, bias_use, remaker(recorder, x))


def _linear(recorder, func, args, kwargs):
    def bind(input, weight, bias=None):
        if weight.dim() == 1:
            return NotImplemented if bias is not None else _matmul(recorder, torch.matmul, (input, weight), {})
        return linear_with(recorder, input, weight, bias)

    return bind(*args, **kwargs)


def not_cast_on_a_cpu(rule: Callable) -> Callable:
    """The rule of a function that autocast casts on other devices only: ATen's autocast_mode lists them."""

    def served(*args):
        with torch.autocast("cpu", enabled=False):
            return rule(*args)

    return served


def _transposed(recorder, w: Tensor) -> Tensor:
    """A watched (d_in, d_out) matrix as the (d_out, d_in) weight of a linear layer."""
    t = w.mT
    recorder.sources.derive(Tensor.t, [w], t)
    return t


def _matmul(recorder, func, args, kwargs):
    def bind(input, other=None, *, mat2=None, vec=None, out=None):  # matmul's name of the second, mm's and mv's
        return input, next(x for x in (other, mat2, vec) if x is not None)

    if kwargs.get("out") is not None:
        return NotImplemented
    left, right = bind(*args, **kwargs)
    if func in (Tensor.__rmatmul__,):
        left, right = right, left
    if right in recorder.sources and left not in recorder.sources and right.dim() == 2 and left.dim() >= 2:
        return linear_with(recorder, left, _transposed(recorder, right), None)
    if right in recorder.sources and left not in recorder.sources and right.dim() == 1 and left.dim() >= 2:
        row = right.unsqueeze(0)
        recorder.sources.derive(Tensor.unsqueeze, [right], row)
        return linear_with(recorder, left, row, None).squeeze(-1)
    if left in recorder.sources and right not in recorder.sources and left.dim() in (1, 2) and right.dim() >= 2:
        return _weight_first(recorder, left, right)
    return NotImplemented


def _weight_first(recorder, w: Tensor, x: Tensor) -> Tensor:
    """w @ x: (d_out, d_in) or (d_in,) watched, x (…, d_in, m) with the samples in any dimension but d_in's."""
    contracted = x.dim() - 2
    layout = recorder.layout(x, "matmul", axis=0 if contracted else 1)
    if layout.axis == contracted:
        raise CaptureError(
            f"{recorder.describe(w)}: torch's matmul(…) adds up over the samples of an activation of shape {tuple(x.shape)}, which stand "
            f"in dimension {contracted}; give it weight @ x.T, or x @ weight.T"
        )
    axis = contracted if layout.axis > contracted else layout.axis
    if w.dim() == 1:
        row = w.unsqueeze(0)
        recorder.sources.derive(Tensor.unsqueeze, [w], row)
        return linear_with(recorder, x.mT, row, None, replace(layout, axis=axis)).squeeze(-1)
    return linear_with(recorder, x.mT, w, None, replace(layout, axis=axis)).mT.contiguous()  # as matmul's own, of which views are taken


def addmm(recorder, func, args, kwargs):
    def bind(input, mat1, mat2, *, beta=1, alpha=1):
        return input, mat1, mat2, beta, alpha

    bias, x, w, beta, alpha = bind(*args, **kwargs)
    if beta != 1 or alpha != 1 or x in recorder.sources or w not in recorder.sources:
        return NotImplemented
    return linear_with(recorder, x, _transposed(recorder, w), bias) if bias in recorder.sources or bias.dim() == 1 else (
        linear_with(recorder, x, _transposed(recorder, w), None) + bias  # activations
    )  # fmt: skip


def _einsum(recorder, func, args, kwargs):
    """einsum of one activation with one watched weight, no label shared by input, weight and output at once."""
    if kwargs or len(args) < 2 or not isinstance(args[0], str):
        return NotImplemented
    operands = list(args[1]) if len(args) == 2 and isinstance(args[1], (tuple, list)) else list(args[1:])
    equation = args[0].replace(" ", "")
    if "->" not in equation or "." in equation or len(operands) != 2:
        return NotImplemented
    labels, out = equation.split("->")
    first, second = labels.split(",")
    if operands[0] in recorder.sources:
        operands.reverse()
        first, second = second, first
    x, w = operands
    if x in recorder.sources or set(first) & set(second) & set(out) or len(set(first)) < len(first):
        return NotImplemented
    contracted = [c for c in second if c in first]
    produced = [c for c in second if c in out]
    kept = [c for c in first if c in out]
    if len(contracted) + len(produced) != len(second) or len(contracted) + len(kept) != len(first):
        return NotImplemented
    sizes = dict(zip(second, w.shape))
    moved = w.permute([second.index(c) for c in produced + contracted])
    recorder.sources.derive(Tensor.permute, [w], moved)
    weight = moved.reshape(_volume(sizes, produced), _volume(sizes, contracted))
    recorder.sources.derive(Tensor.reshape, [moved], weight)
    inputs = x.permute([first.index(c) for c in kept + contracted])
    layout = recorder.layout(x, "einsum")
    if first[layout.axis] not in kept:
        raise CaptureError(f"einsum: {equation!r} sums over the samples of an activation of shape {tuple(x.shape)}")
    layout = replace(layout, axis=kept.index(first[layout.axis]))
    multiplied = linear_with
    if weight.shape[1] == 1:  # nothing is added up: torch's mul, not bmm, which promotes instead
        multiplied, inputs = not_cast_on_a_cpu(linear_with), inputs.to(torch.promote_types(x.dtype, w.dtype))
    y = multiplied(recorder, inputs.flatten(len(kept)) if contracted else inputs.unsqueeze(-1), weight, None, layout)
    y = y.unflatten(-1, [sizes[c] for c in produced]) if produced else y.squeeze(-1)
    order = kept + produced
    return y.permute([order.index(c) for c in out])


def _volume(sizes, labels) -> int:
    total = 1
    for c in labels:
        total *= sizes[c]
    return total


RULES = {
    F.linear: _linear,
    torch.matmul: _matmul, Tensor.matmul: _matmul, Tensor.__matmul__: _matmul, Tensor.__rmatmul__: _matmul,
    torch.mm: _matmul, Tensor.mm: _matmul, torch.linalg.matmul: _matmul,
    **dict.fromkeys((torch.mv, Tensor.mv), not_cast_on_a_cpu(_matmul)),
    torch.einsum: _einsum,
}  # fmt: skip
