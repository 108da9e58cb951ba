"""What is wrong with a model or with samples, said before the first step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .data import SampleSet
from .process import Loss
from .training import in_mode


def check_parameters(model: nn.Module) -> None:
    """Raise ValueError unless some parameter trains and all of them hold finite values."""
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model: no trainable parameter; set requires_grad_(True) on those that shall be changed")
    for name, p in model.named_parameters():
        if p.is_meta:
            raise ValueError(f"model: parameter {name!r} is on the meta device and has no values; load the weights first")
        if not torch.isfinite(p.detach()).all():
            raise ValueError(f"model: parameter {name!r} holds NaN or infinite values; load weights that are finite")


@torch.no_grad()
def check_samples(model: nn.Module, samples: SampleSet, loss: Loss | None, classes: bool) -> None:
    """Put two samples of a set through the model: shapes go together and labels are in range. Raises ValueError.

    loss: where it is the user's own.  classes: labels must be class indices, for the default loss or for accuracies.
    The labels of tensors are looked at one and all, those of a Dataset as far as they are read.
    """
    name = samples.name
    x, y = samples.take(torch.arange(min(2, len(samples))))
    labels = samples.tensors[1] if samples.tensors else y
    if classes:
        _check_kind(name, labels)
    with in_mode(model, False):
        try:
            output = model(x)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"{name}: the model cannot take {x.dtype} samples of shape {tuple(x.shape[1:])}: {error}; "
                             "give them as it was trained on") from error  # fmt: skip
        if loss is not None and (values := loss(output, y)).shape != (len(x),):
            raise ValueError(f"loss: gave shape {tuple(values.shape)} for {len(x)} samples; needs one per sample, (n,), "
                             "not reduced")  # fmt: skip
    if not classes:
        return
    if not isinstance(output, Tensor) or output.dim() != 2:
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"model: gives {got} for {len(x)} samples; needs logits (n, classes): wrap it in a module that returns them")
    width = output.shape[1]
    if labels.min() < 0 or labels.max() >= width:
        bad = int(labels.max()) if labels.max() >= width else int(labels.min())
        raise ValueError(f"{name}: label {bad} is outside [0, {width}), the classes the model predicts; "
                         "check the labels or the model")  # fmt: skip


def _check_kind(name: str, labels: Tensor) -> None:
    if labels.dim() != 1:
        mend = ".squeeze(1)" if labels.dim() == 2 and labels.shape[1] == 1 else ".argmax(1), if they are one-hot"
        raise ValueError(f"{name}: labels have shape {tuple(labels.shape)}; needs class indices (n,): use {mend}")
    if labels.dtype != torch.int64:
        raise ValueError(f"{name}: labels are {labels.dtype}; needs int64 class indices: use .long()")
