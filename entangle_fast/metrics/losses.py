"""Per-sample losses and how they are spread."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..methods.data import Samples, SampleSet, answers
from ..methods.training import device_of
from ..ops import check
from .outputs import check_labels, check_logits


@check.kinds
def sample_losses(model: nn.Module, data: Samples, batch_size: int = 1024) -> Tensor:
    """Cross-entropy of each sample, in nats: (n,), at least float32, on the CPU.

    data  (x, y) tensors, x (n, ...), y (n,) int64, or a map-style Dataset of such pairs, read in batches.

    Equivalent to: ``F.cross_entropy(model(data[0]), data[1], reduction="none")``

    The model runs in eval mode without gradients and is left as found. Raises ValueError for data that is empty or cannot be
    read, a model whose output is not (n, C), C >= 2, and labels that are none of its classes.
    """
    samples = SampleSet("data", data, device_of(model))

    def take(out, y):
        check_logits(out, len(y))
        check_labels(out, y, samples.name)
        return F.cross_entropy(out.float() if out.dtype in (torch.float16, torch.bfloat16) else out, y, reduction="none")

    return answers(model, samples, take, batch_size)


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
