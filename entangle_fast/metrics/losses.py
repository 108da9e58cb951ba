"""Per-sample losses and how they are spread."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..methods.training import device_of, in_mode
from ..ops import check


@check.kinds
def sample_losses(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 1024) -> Tensor:
    """Cross-entropy of each sample: (n,), at least float32, on the CPU. x (n, ...), y (n,) int64.

    Equivalent to: ``F.cross_entropy(model(x), y, reduction="none")``

    The model runs in eval mode without gradients and is left as found.
    Raises ValueError when x is empty or y does not match it.
    """
    check.samples("x", x)
    if y.shape != (len(x),) or y.dtype != torch.int64:
        raise ValueError(f"y: got {y.dtype} of shape {tuple(y.shape)} for {len(x)} samples; needs int64 labels ({len(x)},)")
    device, losses = device_of(model), []
    with in_mode(model, False), torch.no_grad():
        for xs, ys in zip(x.split(batch_size), y.split(batch_size)):
            logits = model(xs.to(device))
            logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
            losses.append(F.cross_entropy(logits, ys.to(device), reduction="none").cpu())
    return torch.cat(losses)


@check.kinds
def loss_distribution(losses: Tensor, quantiles=(0.05, 0.25, 0.5, 0.75, 0.95)) -> dict:
    """Mean, extremes and quantiles of losses (n,), as plain floats.

    Returns {"mean", "min", "max", "quantiles": {q: value}}; quantiles interpolate linearly, in float64.
    Raises ValueError when losses are empty or hold a NaN, or a quantile is outside [0, 1].

    >>> import torch, entangle_fast as ef
    >>> ef.metrics.loss_distribution(torch.tensor([0.0, 1.0, 5.0]), quantiles=(0.5,))
    {'mean': 2.0, 'min': 0.0, 'max': 5.0, 'quantiles': {0.5: 1.0}}
    """
    if losses.dim() != 1 or len(losses) == 0 or torch.isnan(losses).any():
        raise ValueError(f"losses: got shape {tuple(losses.shape)} with {int(torch.isnan(losses).sum())} NaN; "
                         "needs (n,), n > 0, without NaN")
    if any(not 0 <= q <= 1 for q in quantiles):
        raise ValueError(f"quantiles: got {tuple(quantiles)}, needs numbers in [0, 1]")
    losses = losses.double()
    return {"mean": losses.mean().item(), "min": losses.min().item(), "max": losses.max().item(),
            "quantiles": {q: _quantile(losses, q) for q in quantiles}}


def _quantile(losses, q):
    # not torch.quantile, which refuses more than 16M values
    order = losses.sort().values
    place = q * (len(order) - 1)
    low = int(place)
    low_value, high_value = order[low].item(), order[min(low + 1, len(order) - 1)].item()
    return low_value if place == low else low_value + (place - low) * (high_value - low_value)
