"""The fused last layer, linear_sample_loss, with a captured weight."""

import torch

from .. import ops
from ..ops.sample_loss import LINEAR_SAMPLE_LOSS
from .rules_linear import linear_with


def _linear_sample_loss(recorder, func, args, kwargs):
    """The weight's factors are the gradients of all logits: so the logits are formed, and nothing is saved by chunks."""
    h, weight, bias, target, clip, penalty, ignore_index, label_smoothing, reduction = args
    with torch.autocast(h.device.type, enabled=False):  # as outside a capture, where the operation knows no autocast
        logits = linear_with(recorder, h, weight, bias)
    options = dict(clip=clip, penalty=penalty, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction)
    return (ops.sample_loss(logits, target, **options),)


RULES = {LINEAR_SAMPLE_LOSS: _linear_sample_loss, LINEAR_SAMPLE_LOSS.default: _linear_sample_loss}
