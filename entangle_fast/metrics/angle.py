"""The angle between what forgetting and what keeping ask for."""
from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import ops
from ..methods.process import sample_cross_entropy
from ..methods.training import device_of, in_mode
from ..ops import check


@check.kinds
def gradient_angle(
    model: nn.Module, forget: tuple[Tensor, Tensor], retain: tuple[Tensor, Tensor], *, loss=sample_cross_entropy, batch_size: int = 1024
) -> float:
    """Angle in degrees, [0, 180], between the mean-loss gradients of two sets over all trainable parameters at once.

    forget, retain  (x, y); x (n, ...). Gradients are added up over batches, inner products taken in float64.
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
    sides = {"forget": forget, "retain": retain}
    with in_mode(model, False):
        gradients = [_mean_gradient(model, params, name, *s, loss, batch_size) for name, s in sides.items()]
    gram = ops.step_gram(gradients)
    for i, name in enumerate(sides):
        if not torch.isfinite(gram[i, i]):
            raise FloatingPointError(f"{name}: its gradient is not finite; look for NaN or infinite values in it and in the model")
    scale = gram[0, 0].sqrt() * gram[1, 1].sqrt()
    return math.degrees(math.acos((gram[0, 1] / scale).clamp(-1, 1))) if scale > 0 else math.nan


def _mean_gradient(model, params, name, x, y, loss, batch_size):
    if len(x) == 0 or len(y) != len(x):
        raise ValueError(f"{name}: got {len(x)} samples and {len(y)} labels; needs at least one sample and a label for each")
    device, total = device_of(model), [torch.zeros_like(p, dtype=_wide(p)) for p in params]
    for xs, ys in zip(x.split(batch_size), y.split(batch_size)):
        losses = loss(model(xs.to(device)), ys.to(device))
        if losses.shape != (len(xs),):
            raise ValueError(f"loss: gave shape {tuple(losses.shape)} for {len(xs)} samples; needs ({len(xs)},), not reduced")
        found = torch.autograd.grad(losses.sum() / len(x), params, allow_unused=True)
        for t, g in zip(total, found):
            if g is not None:
                t.add_(g)
    return total


def _wide(p):
    return torch.float32 if p.element_size() < 4 else p.dtype
