"""Per-sample cross-entropy with the clip and the small-loss penalty of entangled unlearning (methods.md §1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .per_sample import accumulate_dtype

LOGIT_BYTES = 8 << 20  # logits held at a time, in cache
LEAST_CLASSES = 512  # of them: dh is read and written once for each such range
PENALTY_EPS = 1e-3  # the constant in k / (CE + 1e-3), from the authors' code


def sample_loss(
    logits: Tensor, target: Tensor, clip: float = math.inf, penalty: float = 0.0, ignore_index: int = -100,
    label_smoothing: float = 0.0, reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Per-sample losses, never reduced over samples.

    logits (n, C) with target (n,), or (n, t, C) with (n, t). Positions equal to ignore_index do not count;
    reduction ("mean" or "sum") is over the positions of one sample.
    Returns loss (n,) = CE − penalty / (CE + 1e-3), ce (n,), and lse (2, n) or (2, n, t): each row's maximum, and the log of its sum of
    exp(x − maximum). Their sum is the log-sum-exp; it is not formed, since float32 would round it by 2⁻²⁴ of the maximum.
    clip changes only the gradient: it is zero once CE ≥ clip; nothing is clipped by inf, not even an infinite CE.
    """
    x = logits.to(accumulate_dtype(logits))
    log_p = x.log_softmax(-1)  # differences with the maximum: exact where logits are large and the loss is small
    ce = _reduce(_position_loss(log_p, target, ignore_index, label_smoothing), target, ignore_index, reduction)
    return _clipped(ce, clip, penalty), ce, torch.stack((x.amax(-1), -log_p.amax(-1)))


def _clipped(ce, clip, penalty):
    loss = ce - penalty / (ce + PENALTY_EPS) if penalty else ce.clone()
    if math.isfinite(clip):  # value kept, gradient cut
        loss = torch.where(ce.detach() < clip, loss, loss.detach())
    return loss


def _position_loss(log_p, target, ignore_index, label_smoothing):
    kept = target != ignore_index
    loss = (label_smoothing - 1) * log_p.gather(-1, torch.where(kept, target, 0).unsqueeze(-1)).squeeze(-1)
    if label_smoothing:
        loss = loss - label_smoothing * log_p.mean(-1)
    return torch.where(kept, loss, 0)


def _reduce(loss, target, ignore_index, reduction):
    if target.dim() == 1:
        return loss
    total = loss.sum(1)
    return total / (target != ignore_index).sum(1).clamp(min=1) if reduction == "mean" else total


def _position_scale(grad, target, ce, clip, penalty, ignore_index, reduction):
    """∂/∂(position loss) of Σ grad_i loss_i, shaped like target."""
    scale = grad.to(ce.dtype) if clip == math.inf else torch.where(ce < clip, grad.to(ce.dtype), 0)
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
    out = (x - lse[0].unsqueeze(-1)).sub_(lse[1].unsqueeze(-1)).exp_() * scale
    if label_smoothing:
        out = out - (label_smoothing / x.shape[-1]) * scale
    index = torch.where(target != ignore_index, target, 0).unsqueeze(-1)
    return out.scatter_add(-1, index, -(1 - label_smoothing) * scale).to(logits.dtype)


def linear_sample_loss(
    h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, clip: float = math.inf, penalty: float = 0.0,
    ignore_index: int = -100, label_smoothing: float = 0.0, reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """sample_loss(h @ weight.T + bias, target, …) without holding all logits: those of some classes at a time.

    h (n, d) or (n, t, d), weight (C, d), bias (C,) or None → loss (n,), ce (n,), lse (2, *target.shape).
    """
    dtype = accumulate_dtype(h, weight)
    rows, ids = h.flatten(0, -2), target.flatten()
    kept = ids != ignore_index
    inside = (ids >= 0) & (ids < len(weight))
    torch._assert_async((~kept | inside).all(), f"target: a label outside [0, {len(weight)}) that is not ignore_index")
    top = rows.new_full(ids.shape, -math.inf, dtype=torch.float64)  # of classes so far: many roundings, few elements
    mass, picked, total = (torch.zeros_like(top) for _ in range(3))
    for lo, hi, x in _logits(rows, weight, bias):
        x = x.to(dtype)
        inside = kept & (ids >= lo) & (ids < hi)
        picked += torch.where(inside, x.gather(1, torch.where(inside, ids - lo, 0).unsqueeze(1)).squeeze(1), 0)
        peak = x.amax(1)
        base = torch.where(peak == -math.inf, 0, peak)
        below = x.sub_(base.unsqueeze(1))
        if label_smoothing:
            total += below.sum(1) + base.double() * (hi - lo)
        before, top = top, torch.maximum(top, peak)
        level = torch.where(top == -math.inf, 0, top)
        mass = mass * (before - level).exp() + below.exp_().sum(1) * (peak - level).exp()
    rest = mass.log()
    position = rest + (1 - label_smoothing) * (top - picked)
    if label_smoothing:
        position += label_smoothing * (top - total / len(weight))
    ce = _reduce(torch.where(kept, position, 0).to(dtype).view(target.shape), target, ignore_index, reduction)
    return _clipped(ce, clip, penalty), ce, torch.stack((top, rest)).to(dtype).view(2, *target.shape)


def linear_sample_loss_backward(
    grad: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ce: Tensor, lse: Tensor,
    clip: float = math.inf, penalty: float = 0.0, ignore_index: int = -100, label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of Σ_i grad_i loss_i: dh like h, dweight like weight, dbias (C,) (empty without a bias)."""
    dtype = accumulate_dtype(h, weight)
    rows, ids = h.flatten(0, -2), target.flatten()
    top, rest = lse.reshape(2, -1, 1)
    scale = _position_scale(grad, target, ce, clip, penalty, ignore_index, reduction).reshape(-1, 1)
    kept = ids != ignore_index
    dh, dweight = torch.zeros_like(rows, dtype=dtype), torch.empty_like(weight)
    dbias = weight.new_empty(len(weight) if bias is not None else 0)
    for lo, hi, x in _logits(rows, weight, bias):
        d = x.to(dtype).sub_(top).sub_(rest).exp_().mul_(scale)
        if label_smoothing:
            d.sub_(label_smoothing / len(weight) * scale)
        inside = kept & (ids >= lo) & (ids < hi)
        d.scatter_add_(1, torch.where(inside, ids - lo, 0).unsqueeze(1), torch.where(inside.unsqueeze(1), (label_smoothing - 1) * scale, 0))
        d = d.to(weight.dtype)
        dh += d @ weight[lo:hi]
        torch.mm(d.T, rows, out=dweight[lo:hi])
        if bias is not None:
            dbias[lo:hi] = d.sum(0, dtype=dtype)
    return dh.to(h.dtype).view(h.shape), dweight, dbias


def _logits(rows: Tensor, weight: Tensor, bias: Tensor | None):
    """Ranges of classes [lo, hi) and their logits, (len(rows), hi − lo), written over by the next ones."""
    width = min(len(weight), max(LEAST_CLASSES, LOGIT_BYTES // max(1, len(rows) * rows.element_size())))
    room = rows.new_empty(len(rows) * width)
    for lo in range(0, len(weight), max(1, width)):
        hi = min(lo + width, len(weight))
        x = torch.mm(rows, weight[lo:hi].T, out=room[: len(rows) * (hi - lo)].view(len(rows), hi - lo))
        yield lo, hi, x if bias is None else x.add_(bias[lo:hi])
