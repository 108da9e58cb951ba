"""Weights that depend on the losses or the norms of the samples alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..ops import check


@check.kinds
def means(losses: Tensor) -> Tensor:
    """1/n for each sample: the gradient of the mean loss.  losses (n,) → (n,).

    Equivalent to: ``torch.autograd.grad(losses.mean(), losses)[0]``
    """
    check.per_sample(losses=losses)  # floating, too: an integer 1/n is 0
    return torch.full_like(losses, 1 / len(losses)).detach()


@check.kinds
def clipped(losses: Tensor, clip: float, penalty: float = 0.0) -> Tensor:
    """Weights of the mean clipped forget loss of stage 1 (methods.md §1, from the authors' code).

    losses (n,) cross-entropies in nats → (n,): 1/n below ``clip``, 0 from there on; with a small-loss penalty k
    the loss is CE − k/(CE + 1e-3), so that each weight gains a factor 1 + k/(CE + 1e-3)².

    Equivalent to: ``torch.autograd.grad(losses.clamp(max=clip).mean(), losses)[0]`` without the penalty
    """
    losses = losses.detach()
    w = torch.where(losses < clip, means(losses), 0)
    return w * (1 + penalty / (losses + 1e-3) ** 2) if penalty else w


@dataclass
class Lagrangian:
    """One step of stage 1: weights of both batches, the constraint and the new multiplier (all 0-d but the weights)."""

    forget: Tensor
    remote: Tensor
    constraint: Tensor
    multiplier: Tensor


@check.kinds
def lagrangian(
    forget: Tensor, remote: Tensor, remote_start: Tensor | float, multiplier: Tensor, *, mu: float = 10.0,
    gamma: float = 1.0, clip: float = 10.0, penalty: float = 0.0,
) -> Lagrangian:  # fmt: skip
    """The augmented Lagrangian as a reweighting of two batches (methods.md §1, stage 1, from the authors' code).

    L_aug = −γ L_f^clip + λ h + (μ/2) h²,  h = L_rem(θ) − L_rem(θ0):
    its gradient has weights −γ·clipped(forget) and (λ + μ h)/n; then λ ← λ + μ h, never clamped (an equality).

    Args:
        forget: (n_f,) losses.  remote: (n_r,) losses.  remote_start: L_rem(θ0) in nats.
        multiplier: λ, 0-d on the losses' device.

    Returns: a Lagrangian: forget (n_f,), remote (n_r,) weights, constraint h and the next multiplier, 0-d.

    Equivalent to: ``h = remote.mean() - remote_start;
    torch.autograd.grad(-gamma * forget.clamp(max=clip).mean() + multiplier * h + mu / 2 * h**2, (forget, remote))`` for the weights,
    without the penalty
    """
    check.per_sample(forget=forget, remote=remote)
    check.require(getattr(multiplier, "ndim", 0) == 0, f"multiplier: got {multiplier}; needs a 0-d tensor")
    h = remote.detach().mean() - remote_start
    return Lagrangian(
        forget=-gamma * clipped(forget, clip, penalty),
        remote=(multiplier + mu * h) * means(remote),
        constraint=h,
        multiplier=multiplier + mu * h,
    )


W2_KINDS = ("sorted", "moments", "features")


@check.kinds
def w2(values: Tensor, reference: Tensor, kind: str = "sorted") -> tuple[Tensor, Tensor]:
    """W2² to a frozen reference, and its weights: the gradient is Σ_i w_i g_i (methods.md §1, stage 2).

    Args:
        values: (n,) losses for "sorted" (exact, the paper's) and "moments" (Gaussian); (n, d) vectors for "features".
        reference: the same of the frozen model, (m,) or (m, d).

    Returns: value (), weights (n,); for "features" (n, d): the seeds of the feature vectors.

    Equivalent to: ``torch.autograd.grad((values.sort().values - reference.sort().values).square().mean(), values)[0]`` for "sorted",
    n = m

    Raises: ValueError for another kind, and for shapes, devices or dtypes that do not go together.
    """
    if kind not in W2_KINDS:
        raise ValueError(f"kind: got {kind!r}; needs one of {', '.join(W2_KINDS)}")
    if kind != "features":  # or the operation would speak of losses
        check.per_sample(values=values, reference=reference)
    f = {"sorted": ops.w2_sorted, "moments": ops.w2_moments, "features": ops.w2_features}[kind]
    value, weights = f(values.detach(), reference)
    return value, weights


@check.kinds
def clipped_norms(sqnorms: Tensor, bound: float) -> Tensor:
    """min(1, bound/‖g_i‖): the weights of per-sample clipping (DP-SGD; Abadi et al., CCS 2016).  (n,) → (n,).

    Equivalent to: ``(bound / sqnorms.sqrt()).clamp(max=1)``
    """
    if not bound > 0 or math.isnan(bound):
        raise ValueError(f"bound: got {bound}; needs a positive norm")
    check.floating(sqnorms=sqnorms)
    return (bound * sqnorms.clamp(min=0).rsqrt()).clamp(max=1)
