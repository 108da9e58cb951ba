"""sample_loss: cross-entropy per sample, with per-sample weights in its backward."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..dispatch import call, registered
from . import check

LINEAR_SAMPLE_LOSS = registered("linear_sample_loss")  # what a torch function mode sees of a call


def _validate(shape: tuple[int, ...], target: Tensor, clip, penalty, label_smoothing, reduction, name: str) -> None:
    if target.dim() not in (1, 2) or shape[:-1] != target.shape:
        turned = name == "logits" and len(shape) == 3 and (shape[0], shape[2]) == target.shape  # (n, C, t), as F.cross_entropy takes it
        mend = ": give logits.transpose(1, 2), the classes last" if turned else ""
        raise ValueError(f"target: shape {tuple(target.shape)} does not go with {name} {shape}; need one class index per sample (n,) or "
                         f"per position (n,t){mend}")  # fmt: skip
    check.require(target.dtype == torch.int64, f"target: dtype {target.dtype}; needs int64 class indices: use .long()")
    check.require(not math.isnan(clip), "clip: got nan; needs a cross-entropy in nats, or inf for none")
    check.require(penalty >= 0, f"penalty: got {penalty}; needs a number >= 0")
    check.require(0 <= label_smoothing <= 1, f"label_smoothing: got {label_smoothing}; needs a number in [0, 1]")
    check.choice("reduction", reduction, ("mean", "sum"))


@check.kinds
def sample_loss(
    logits: Tensor, target: Tensor, *, clip: float = math.inf, penalty: float = 0.0, ignore_index: int = -100,
    label_smoothing: float = 0.0, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Cross-entropy of each sample in nats, never reduced over samples; differentiable in logits.

    Args:
        logits: (n, C), or (n, t, C) for sequences.  target: (n,) or (n, t) int64.
        clip: c of stage 1 (methods.md §1): the gradient is zero once CE ≥ c, the value is kept; inf: nothing is, not even
            where CE is infinite (a label whose logit is −inf).
        penalty: k of the small-loss penalty: the loss is CE − k / (CE + 1e-3).
        ignore_index: positions with this target do not count.
        reduction: over the positions of one sample: "mean" or "sum".

    Returns: (n,); float32 for float32, bfloat16 and float16 logits, float64 for float64.

    Equivalent to: ``F.cross_entropy(logits, target, reduction="none")`` for (n, C) and no clip or penalty.

    Raises: ValueError for mismatching shapes or dtypes; RuntimeError for a label out of range.
    """
    check.require(logits.dim() == target.dim() + 1,
                  f"logits: shape {tuple(logits.shape)} for target {tuple(target.shape)}; needs one more dimension, the "
                  "classes")  # fmt: skip
    check.floating(logits=logits)
    check.same_device(logits=logits, target=target)
    _validate(tuple(logits.shape), target, clip, penalty, label_smoothing, reduction, "logits")
    return call("sample_loss", logits, target, clip, penalty, ignore_index, label_smoothing, reduction)[0]


@check.kinds
def linear_sample_loss(
    h: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, *, clip: float = math.inf,
    penalty: float = 0.0, ignore_index: int = -100, label_smoothing: float = 0.0, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """sample_loss(h @ weight.T + bias, target), holding only a chunk of the logits; differentiable in h, weight, bias.

    Args:
        h: (n, d) or (n, t, d) features.  weight: (C, d).  bias: (C,) or None.  The rest as in sample_loss.

    Returns: (n,).

    Equivalent to: ``sample_loss(F.linear(h, weight, bias), target)``, with the same options
    """
    check.require(h.dim() == target.dim() + 1 and h.dim() > 1,
                  f"h: shape {tuple(h.shape)} for target {tuple(target.shape)}; needs one more dimension, the features")  # fmt: skip
    check.require(weight.dim() == 2 and h.shape[-1] == weight.shape[1],
                  f"weight: shape {tuple(weight.shape)} does not go with h {tuple(h.shape)}; needs (C, {h.shape[-1]})")  # fmt: skip
    check.require(bias is None or bias.shape == weight.shape[:1], f"bias: needs shape ({weight.shape[0]},) or None")
    check.same_device(h=h, weight=weight, bias=bias, target=target)
    check.same_dtype(h=h, weight=weight, bias=bias)
    check.floating(h=h)
    _validate(tuple(h.shape), target, clip, penalty, label_smoothing, reduction, "h")
    out = call("linear_sample_loss", h, weight, bias, target, clip, penalty, ignore_index, label_smoothing, reduction)
    return out[0]
