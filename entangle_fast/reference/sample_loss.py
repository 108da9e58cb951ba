"""Per-sample cross-entropy with the clip and the small-loss penalty of entangled unlearning (methods.md §1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .per_sample import accumulate_dtype, chunks

PENALTY_EPS = 1e-3  # the constant in k / (CE + 1e-3), from the authors' code


def sample_loss(
    logits: Tensor, target: Tensor, clip: float = math.inf, penalty: float = 0.0, ignore_index: int = -100,
    label_smoothing: float = 0.0, reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Per-sample losses, never reduced over samples.

    logits (n, C) with target (n,), or (n, t, C) with (n, t). Positions equal to ignore_index do not count;
    reduction ("mean" or "sum") is over the positions of one sample.
    Returns loss (n,) = CE − penalty / (CE + 1e-3), ce (n,), and lse (n,) or (n, t), the log-sum-exp.
    clip changes only the gradient: it is zero once CE ≥ clip.
    """
    x = logits.to(accumulate_dtype(logits))
    lse = x.logsumexp(-1)
    ce = _reduce(_position_loss(x, target, lse, ignore_index, label_smoothing), target, ignore_index, reduction)
    return _clipped(ce, clip, penalty), ce, lse


def _clipped(ce, clip, penalty):
    loss = ce - penalty / (ce + PENALTY_EPS) if penalty else ce.clone()
    if math.isfinite(clip):  # value kept, gradient cut
        loss = torch.where(ce.detach() < clip, loss, loss.detach())
    return loss


def _position_loss(x, target, lse, ignore_index, label_smoothing):
    kept = target != ignore_index
    picked = x.gather(-1, torch.where(kept, target, 0).unsqueeze(-1)).squeeze(-1)
    loss = lse - (1 - label_smoothing) * picked
    if label_smoothing:
        loss = loss - label_smoothing * x.mean(-1)
    return torch.where(kept, loss, 0)


def _reduce(loss, target, ignore_index, reduction):
    if target.dim() == 1:
        return loss
    total = loss.sum(1)
    return total / (target != ignore_index).sum(1).clamp(min=1) if reduction == "mean" else total


def _position_scale(grad, target, ce, clip, penalty, ignore_index, reduction):
    """∂/∂(position loss) of Σ grad_i loss_i, shaped like target."""
    scale = torch.where(ce < clip, grad.to(ce.dtype), 0)
    if penalty:
        scale = scale * (1 + penalty / (ce + PENALTY_EPS) ** 2)
    if target.dim() == 2:
        if reduction == "mean":
            scale = scale / (target != ignore_index).sum(1).clamp(min=1)
        scale = scale.unsqueeze(1)
    return torch.where(target != ignore_index, scale, 0)


def sample_loss_backward(
    grad: Tensor, logits: Tensor, target: Tensor, ce: Tensor, lse: Tensor, clip: float = math.inf,
    penalty: float = 0.0, ignore_index: int = -100, label_smoothing: float = 0.0, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Gradient of Σ_i grad_i loss_i with respect to logits; grad (n,) are per-sample weights."""
    x = logits.to(accumulate_dtype(logits))
    scale = _position_scale(grad, target, ce, clip, penalty, ignore_index, reduction).unsqueeze(-1)
    out = (x - lse.unsqueeze(-1)).exp() * scale
    if label_smoothing:
        out = out - (label_smoothing / x.shape[-1]) * scale
    index = torch.where(target != ignore_index, target, 0).unsqueeze(-1)
    return out.scatter_add(-1, index, -(1 - label_smoothing) * scale).to(logits.dtype)


def linear_sample_loss(
    h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, clip: float = math.inf, penalty: float = 0.0,
    ignore_index: int = -100, label_smoothing: float = 0.0, reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """sample_loss(h @ weight.T + bias, target, …) without holding all logits.

    h (n, d) or (n, t, d), weight (C, d), bias (C,) or None → loss (n,), ce (n,), lse like target.
    """
    dtype = accumulate_dtype(h, weight)
    rows, ids = h.reshape(-1, h.shape[-1]), target.reshape(-1)
    lse, position = rows.new_empty(len(rows), dtype=dtype), rows.new_empty(len(rows), dtype=dtype)
    for lo, hi in chunks(len(rows), 2 * len(weight) * lse.element_size()):
        x = torch.nn.functional.linear(rows[lo:hi], weight, bias).to(dtype)
        lse[lo:hi] = x.logsumexp(-1)
        position[lo:hi] = _position_loss(x, ids[lo:hi], lse[lo:hi], ignore_index, label_smoothing)
    ce = _reduce(position.view(target.shape), target, ignore_index, reduction)
    return _clipped(ce, clip, penalty), ce, lse.view(target.shape)


def linear_sample_loss_backward(
    grad: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ce: Tensor, lse: Tensor,
    clip: float = math.inf, penalty: float = 0.0, ignore_index: int = -100, label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of Σ_i grad_i loss_i: dh like h, dweight like weight, dbias (C,) (empty without a bias)."""
    dtype = accumulate_dtype(h, weight)
    rows, ids, logz = h.reshape(-1, h.shape[-1]), target.reshape(-1), lse.reshape(-1)
    scale = _position_scale(grad, target, ce, clip, penalty, ignore_index, reduction).reshape(-1)
    dh = torch.empty_like(rows)
    dweight = torch.zeros_like(weight, dtype=dtype)
    dbias = weight.new_zeros(len(weight) if bias is not None else 0, dtype=dtype)
    for lo, hi in chunks(len(rows), 2 * len(weight) * dweight.element_size()):
        x = torch.nn.functional.linear(rows[lo:hi], weight, bias)
        # one position per sample here, its weight already in `scale`
        d = sample_loss_backward(
            scale[lo:hi], x, ids[lo:hi], torch.zeros_like(scale[lo:hi]), logz[lo:hi],
            ignore_index=ignore_index, label_smoothing=label_smoothing,
        )  # fmt: skip
        dh[lo:hi] = d @ weight
        dweight += (d.T @ rows[lo:hi]).to(dtype)
        if bias is not None:
            dbias += d.sum(0, dtype=dtype)
    return dh.view(h.shape), dweight.to(weight.dtype), dbias.to(weight.dtype)
