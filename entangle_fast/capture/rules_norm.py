"""Normalisation layers: LayerNorm, GroupNorm, InstanceNorm, RMSNorm, and BatchNorm with frozen statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .errors import CaptureError
from .factors import DenseFactor
from .remake import remade
from .rules_elementwise import add_parameter, like, multiply_parameter

_CACHE = 1 << 20  # bytes of one operand at a time: all of them together stay in L2 or L3

_NEEDS_EVAL = (
    "BatchNorm in train mode: its statistics mix the samples, so that no per-sample gradient exists; "
    "call model.eval() first, or replace it (GroupNorm)"
)
_NO_STATISTICS = (
    "BatchNorm without running statistics takes those of the batch, in eval mode too: they mix the samples, so that no per-sample "
    "gradient exists; use GroupNorm, or a BatchNorm with track_running_stats=True"
)


def mixed_samples(running: bool) -> CaptureError:
    """Of a BatchNorm that is about to take the batch's statistics, with running ones or without."""
    return CaptureError(_NEEDS_EVAL if running else _NO_STATISTICS)


def refuse_batch_statistics(func, args, kwargs):
    def bind(input, running_mean=None, running_var=None, weight=None, bias=None, training=False, *_, **__):
        return running_mean, training

    def bind_torchs(input, weight, bias, running_mean, running_var, training, *_, **__):
        return running_mean, training

    mean, training = (bind_torchs if func is torch.batch_norm else bind)(*args, **kwargs)
    if training:
        raise mixed_samples(mean is not None)


@remade
class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, anchor, weight, bias, shape, eps, layout, weight_use, bias_use):
        y, mean, rstd = torch.ops.aten.native_layer_norm(x, shape, weight, bias, eps)
        ctx.shape, ctx.eps, ctx.layout, ctx.weight_use, ctx.bias_use = shape, eps, layout, weight_use, bias_use
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        return y

    @staticmethod
    def again(ctx):
        """The output, once more (remake.py)."""
        x, _, _, weight, bias = ctx.saved_tensors
        return torch.ops.aten.native_layer_norm(x, ctx.shape, weight, bias, ctx.eps)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, mean, rstd, weight, bias = ctx.saved_tensors
        if ctx.weight_use:
            parts = [ctx.layout.leading(z) for z in (g, x, mean, rstd)]
            found = (_over_positions((x - m).mul_(r).mul_(g), len(ctx.shape)) for g, x, m, r in _some_samples(*parts))
            ctx.weight_use.record(DenseFactor(_joined(found)))
        if ctx.bias_use:
            _record(ctx.bias_use, ctx.layout, g, len(ctx.shape))
        dx = None
        if ctx.needs_input_grad[0]:
            mask = [True, False, False]
            dx = torch.ops.aten.native_layer_norm_backward(g, x, ctx.shape, mean, rstd, weight, bias, mask)[0]
        return (dx,) + (None,) * 8


def _record(use, layout, grads, dims: int) -> None:
    use.record(DenseFactor(_over_positions(layout.leading(grads), dims)))


def _over_positions(rows: Tensor, dims: int) -> Tensor:
    """Sum over the positions of each sample: (n, …, *normalised shape) → (n, *normalised shape)."""
    shape = rows.shape[-dims:]
    rows = rows.reshape(len(rows), rows.shape[1:].numel() // max(1, shape.numel()), *shape)
    return rows[:, 0] if rows.shape[1] == 1 else rows.sum(1)


def _some_samples(*rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same samples of each, as many as fit a CPU's cache: what is computed from them never goes to fresh memory."""
    each = rows[0][:1].numel() * rows[0].element_size()
    step = max(1, _CACHE // max(1, each)) if rows[0].device.type == "cpu" else len(rows[0])
    return zip(*(x.split(step) for x in rows)) if step < len(rows[0]) else iter((rows,))


def _joined(parts: Iterable[Tensor]) -> Tensor:
    first, *rest = parts
    return torch.cat([first, *rest]) if rest else first


def _layer_norm(recorder, func, args, kwargs):
    def bind(input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
        return input, list(normalized_shape), weight, bias, eps

    x, shape, weight, bias, eps = bind(*args, **kwargs)
    if _mixed(recorder, x, weight, bias):
        return _affine(recorder, x, F.layer_norm(x, shape, None, None, eps), weight, bias)
    recorder.refuse_samples("layer_norm", weight, bias)
    layout = recorder.layout(x, "layer_norm")
    if layout.axis >= x.dim() - len(shape):
        raise CaptureError(f"layer_norm: it normalises {tuple(x.shape)} over the samples")
    w, weight_use = recorder.use(weight, x.dtype) if weight is not None else (None, None)
    b, bias_use = recorder.use(bias, x.dtype) if bias is not None else (None, None)
    return _LayerNorm.apply(x, recorder.anchor, w, b, shape, eps, layout, weight_use, bias_use)


def _mixed(recorder, x, *params) -> bool:
    """Autocast or mixed dtypes: normalise natively, then scale and shift by elementwise rules."""
    recorder.refuse_dtypes("normalisation", x, *params, wider=True)
    return recorder.autocast_on(x) or any(p is not None and p.dtype != x.dtype for p in params)


def _affine(recorder, x, y, weight, bias):
    """y, normalised x, scaled and shifted."""
    like(recorder, x, y)
    dtype = y.dtype  # float32 weights do not widen a norm's result
    if weight is not None:
        y = like(recorder, x, multiply_parameter(recorder, y, weight) if weight in recorder.sources else y * weight)
    if bias is not None:
        y = add_parameter(recorder, y, bias) if bias in recorder.sources else y + bias
    return y.to(dtype)


class _ChannelNorm(torch.autograd.Function):
    """GroupNorm and frozen BatchNorm: y = xhat · w_c + b_c, per-sample gradients summed over positions."""

    @staticmethod
    def forward(ctx, x, anchor, weight, bias, statistics, layout, weight_use, bias_use):
        ctx.layout = layout
        ctx.weight_use, ctx.bias_use, ctx.statistics = weight_use, bias_use, statistics
        y, saved = statistics.forward(x, weight, bias)
        ctx.save_for_backward(x, weight, *saved)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, weight, *saved = ctx.saved_tensors
        n, channels = x.shape[:2]
        if ctx.weight_use or ctx.bias_use:
            total = g.reshape(n, channels, -1).sum(2)
            if ctx.weight_use:
                moment = _joined((a * b).reshape(len(a), channels, -1).sum(2) for a, b in _some_samples(g, x))
                mean, rstd = ctx.statistics.per_channel(x, saved)
                _record(ctx.weight_use, ctx.layout, (moment - mean * total) * rstd, 1)
            if ctx.bias_use:
                _record(ctx.bias_use, ctx.layout, total, 1)
        dx = ctx.statistics.backward(g, x, weight, saved) if ctx.needs_input_grad[0] else None
        return (dx,) + (None,) * 7


class _Group:
    def __init__(self, groups: int, eps: float):
        self.groups, self.eps = groups, eps

    def _sizes(self, x):
        return x.shape[0], x.shape[1], x[0, 0].numel() if x.shape[0] else 0, self.groups

    def forward(self, x, weight, bias):
        y, mean, rstd = torch.ops.aten.native_group_norm(x.contiguous(), weight, bias, *self._sizes(x), self.eps)
        return y, (mean, rstd)

    def per_channel(self, x, saved):
        return [s.repeat_interleave(x.shape[1] // self.groups, 1) for s in saved]

    def backward(self, g, x, weight, saved):
        mean, rstd = saved
        mask = [True, False, False]
        return torch.ops.aten.native_group_norm_backward(
            g.contiguous(), x.contiguous(), mean, rstd, weight, *self._sizes(x), mask
        )[0]


class _Frozen:
    def __init__(self, mean, var, eps: float):
        self.mean, self.rstd, self.var, self.eps = mean, (var + eps).rsqrt(), var, eps

    def forward(self, x, weight, bias):
        return F.batch_norm(x, self.mean, self.var, weight, bias, False, 0.0, self.eps), ()

    def per_channel(self, x, saved):
        return self.mean, self.rstd

    def backward(self, g, x, weight, saved):
        scale = self.rstd if weight is None else self.rstd * weight
        return g * scale.view(1, -1, *(1,) * (g.dim() - 2)).to(g.dtype)


def _channel_norm(recorder, x, weight, bias, statistics, where):
    recorder.refuse_samples(where, weight, bias)
    layout = recorder.layout(x, where)
    if layout.axis:
        raise CaptureError(f"{where}: input of shape {tuple(x.shape)} has its samples in dimension {layout.axis}, not in 0")
    w, weight_use = recorder.use(weight, x.dtype) if weight is not None else (None, None)
    b, bias_use = recorder.use(bias, x.dtype) if bias is not None else (None, None)
    return _ChannelNorm.apply(x, recorder.anchor, w, b, statistics, layout, weight_use, bias_use)


def _by_channel(recorder, x, y, weight, bias):
    """Scale and shift (n, C, *size) by watched (C,) vectors."""
    shape = (-1,) + (1,) * (y.dim() - 2)
    views = []
    for p in (weight, bias):
        v = None if p is None else p.view(shape)
        if p is not None and p in recorder.sources:
            recorder.sources.derive(torch.Tensor.view, [p], v)
        views.append(v)
    return _affine(recorder, x, y, *views)


def _group_norm(recorder, func, args, kwargs):
    def bind(input, num_groups, weight=None, bias=None, eps=1e-5, cudnn_enabled=True):
        return input, num_groups, weight, bias, eps

    x, groups, weight, bias, eps = bind(*args, **kwargs)
    if _mixed(recorder, x, weight, bias):
        return _by_channel(recorder, x, F.group_norm(x, groups, None, None, eps), weight, bias)
    return _channel_norm(recorder, x, weight, bias, _Group(groups, eps), "group_norm")


def instance_norm(recorder, func, args, kwargs):
    def bind(input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1,
             eps=1e-5, cudnn_enabled=True):  # fmt: skip
        return input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps

    x, mean, var, weight, bias, own, momentum, eps = bind(*args, **kwargs)
    if not own:
        return _channel_norm(recorder, x, weight, bias, _Frozen(mean, var, eps), "instance_norm")
    return _by_channel(recorder, x, F.instance_norm(x, mean, var, None, None, own, momentum, eps), weight, bias)


def batch_norm(recorder, func, args, kwargs):
    def bind(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5, *_):
        return input, running_mean, running_var, weight, bias, eps

    x, mean, var, weight, bias, eps = bind(*args, **kwargs)
    if _mixed(recorder, x, weight, bias) or mean.dtype != x.dtype:
        return _by_channel(recorder, x, F.batch_norm(x, mean, var, None, None, False, 0.0, eps), weight, bias)
    return _channel_norm(recorder, x, weight, bias, _Frozen(mean, var, eps), "batch_norm")


def _rms_norm(recorder, func, args, kwargs):
    def bind(input, normalized_shape, weight=None, eps=None):
        return input, list(normalized_shape), weight, eps

    x, shape, weight, eps = bind(*args, **kwargs)
    return _affine(recorder, x, F.rms_norm(x, shape, None, eps), weight, None)


RULES = {
    F.layer_norm: _layer_norm, torch.layer_norm: _layer_norm,
    F.group_norm: _group_norm, torch.group_norm: _group_norm,
    F.instance_norm: instance_norm,
    F.batch_norm: batch_norm,
    F.rms_norm: _rms_norm, torch.rms_norm: _rms_norm,
}
