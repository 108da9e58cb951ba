"""The angle between what forgetting and what keeping ask for."""
from __future__ import annotations

import math

import torch
from torch import nn

from .. import ops
from ..methods.data import Samples, SampleSet
from ..methods.process import per_sample, sample_cross_entropy
from ..methods.training import device_of, in_mode
from ..ops import check


@check.kinds
def gradient_angle(
    model: nn.Module, forget: Samples, retain: Samples, *, loss=sample_cross_entropy, batch_size: int = 1024
) -> float:
    """Angle in degrees, [0, 180], between the mean-loss gradients of two sets over all trainable parameters at once.

    forget, retain  (x, y) tensors, x (n, ...), or map-style Datasets of such pairs, read in batches. Gradients are added up over
                    batches, inner products taken in float64.
    loss            (output, y) → per-sample losses (n,).

    0: what harms the one harms the other; 90: independent to first order. nan where a gradient is zero: no angle is defined.
    The model runs in eval mode and is left as found, .grad too. Raises ValueError for empty sets, a reduced loss or a model
    without trainable parameters; FloatingPointError when a gradient is not finite.

    Equivalent to: ``p, q = (torch.cat([g.flatten() for g in torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))])
    for x, y in (forget, retain)); torch.rad2deg(torch.acos(F.cosine_similarity(p, q, dim=0))).item()``
    """
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ValueError("model: no trainable parameter; set requires_grad_(True) on those that count")
    sides = [SampleSet(name, data, device_of(model)) for name, data in (("forget", forget), ("retain", retain))]
    with in_mode(model, False):
        gradients = [_mean_gradient(model, params, samples, loss, batch_size) for samples in sides]
    gram = ops.step_gram(gradients)
    for i, samples in enumerate(sides):
        if not torch.isfinite(gram[i, i]):
            raise FloatingPointError(f"{samples.name}: its gradient is not finite; look for NaN or infinite values in it and in the model")
    scale = gram[0, 0].sqrt() * gram[1, 1].sqrt()
    return math.degrees(math.acos((gram[0, 1] / scale).clamp(-1, 1))) if scale > 0 else math.nan


def _mean_gradient(model, params, samples, loss, batch_size):
    total = [torch.zeros_like(p, dtype=_wide(p)) for p in params]
    for _, x, y in samples.chunks(batch_size):
        output = model(x)
        losses = per_sample(loss(output, y), len(x), output)
        found = torch.autograd.grad(losses.sum() / len(samples), params, allow_unused=True)
        for t, g in zip(total, found):
            if g is not None:
                t.add_(g)
    return total


def _wide(p):
    return torch.float32 if p.element_size() < 4 else p.dtype
