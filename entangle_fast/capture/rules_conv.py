"""Convolutions: F.conv1d, conv2d, conv3d with stride, padding, dilation, groups."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .errors import CaptureError
from .factors import ConvFactor, DenseFactor
from .remake import remaker


class _Conv(torch.autograd.Function):
    """A convolution whose backward returns the input's gradient only, and records the weight's factors."""

    @staticmethod
    def forward(ctx, x, anchor, weight, bias, shape, groups, layout, weight_use, bias_use, remake):
        ctx.shape, ctx.groups, ctx.layout, ctx.remake = shape, groups, layout, remake
        ctx.weight_use, ctx.bias_use, ctx.kernel_size = weight_use, bias_use, tuple(weight.shape[2:])
        ctx.input_size = x.shape
        ctx.save_for_backward(x if weight_use and not remake else None, weight if x.requires_grad else None)
        return (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3](x, weight, bias, *shape, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        if ctx.weight_use:
            ctx.weight_use.record(_factor(ctx, ctx.remake() if ctx.remake else x, g))
        if ctx.bias_use:
            per_image = g.flatten(2).sum(2)
            ctx.bias_use.record(DenseFactor(ctx.layout.positions(per_image).sum(1) if ctx.layout.flat else per_image))
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.ops.aten.convolution_backward(
                g, g.new_empty(()).expand(ctx.input_size), weight, None, *ctx.shape, False, [0] * len(ctx.kernel_size),
                ctx.groups, [True, False, False],
            )[0]  # fmt: skip
        return (dx,) + (None,) * 9


def _factor(ctx, x, g):
    if not ctx.layout.flat:
        return ConvFactor(x, g, ctx.kernel_size, *ctx.shape, ctx.groups)
    # several images per sample (frames folded into the batch): one more spatial size, with a kernel of 1
    x, g = (ctx.layout.leading(z).transpose(1, 2) for z in (x, g))
    stride, padding, dilation = ((first, *rest) for first, rest in zip((1, 0, 1), ctx.shape))
    return ConvFactor(x, g, (1, *ctx.kernel_size), stride, padding, dilation, ctx.groups)


def _conv(recorder, func, args, kwargs):
    def bind(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        return input, weight, bias, stride, padding, dilation, groups

    x, weight, bias, stride, padding, dilation, groups = bind(*args, **kwargs)
    nd = weight.dim() - 2
    recorder.refuse_samples("convolution", weight, bias)
    if x.dim() != nd + 2:
        raise CaptureError(f"convolution: input of shape {tuple(x.shape)} has no batch dimension; needs (n, C, *size)")
    layout = recorder.layout(x, "convolution")
    if layout.axis or (layout.flat and nd == 3):
        raise CaptureError(
            f"convolution: input of shape {tuple(x.shape)} has {'several images' if layout.flat else 'channels'} where the samples "
            "should be; give it one image per sample in dimension 0, or freeze the layer"
        )
    stride, dilation = _spread(stride, nd), _spread(dilation, nd)
    if isinstance(padding, str):
        x, padding = _named_padding(x, padding, weight.shape[2:], dilation)
    recorder.refuse_dtypes("convolution", x, weight, bias)
    dtype = recorder.autocast_dtype(x)
    x = x.to(dtype)
    w, weight_use = recorder.use(weight, dtype)
    b, bias_use = recorder.use(bias, dtype) if bias is not None else (None, None)
    shape = (stride, _spread(padding, nd), dilation)
    return _Conv.apply(x, recorder.anchor, w, b, shape, groups, layout, weight_use, bias_use, remaker(recorder, x))


def _spread(value, nd: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * nd
    return tuple(value) * (nd if len(value) == 1 else 1)


def _named_padding(x, padding: str, kernel_size, dilation):
    if padding == "valid":
        return x, 0
    total = [d * (k - 1) for k, d in zip(kernel_size, dilation)]
    if all(p % 2 == 0 for p in total):
        return x, tuple(p // 2 for p in total)
    pad = [side for p in reversed(total) for side in (p // 2, p - p // 2)]  # torch puts the odd one on the right
    return F.pad(x, pad), 0


RULES = {torch.conv1d: _conv, torch.conv2d: _conv, torch.conv3d: _conv, F.conv1d: _conv, F.conv2d: _conv, F.conv3d: _conv}
