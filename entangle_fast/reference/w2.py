"""Wasserstein-2 distances to a frozen reference, each with its per-sample weights (the gradient).

methods.md §1; "sorted" is the paper's 1-D closed form, "moments" and "features" are Gaussian (Bures) forms.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .per_sample import accumulate_dtype


def w2_sorted(losses: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Exact 1-D W2² between two empirical distributions.

    losses (n,), reference (m,) → value (), weights (n,) = ∂value/∂losses.
    n = m: value = mean((sort(ℓ) − sort(ℓ̄))²) and w_i = (2/n)(ℓ_i − ℓ̄_rank(i)).
    n ≠ m: the same with quantile functions, integrated exactly over the merged breakpoints.
    """
    dtype = accumulate_dtype(losses)
    x, order = losses.to(dtype).sort(stable=True)
    y = reference.to(dtype).sort().values
    n, m = len(x), len(y)
    if n == m:
        gap = x - y
        value, slope = gap.square().mean(), gap * (2 / n)
    else:
        # breakpoints of both step functions in units of 1/(n·m): integers, so no rounding
        cuts = torch.cat([torch.arange(1, n + 1, device=x.device) * m, torch.arange(1, m + 1, device=x.device) * n])
        cuts = cuts.sort().values
        left = torch.cat([cuts.new_zeros(1), cuts[:-1]])
        mass = (cuts - left).to(dtype) / (n * m)
        i = (left // m).clamp(max=n - 1)
        gap = x[i] - y[(left // n).clamp(max=m - 1)]
        value = (mass * gap.square()).sum()
        slope = torch.zeros_like(x).index_add_(0, i, 2 * mass * gap)
    return value, torch.empty_like(slope).scatter_(0, order, slope)


def w2_moments(losses: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """W2² between the Gaussians of the two samples' moments: (μ − μ̄)² + (σ − σ̄)², population σ.

    losses (n,), reference (m,) → value (), weights (n,). Where σ = 0 its gradient is taken as 0.
    """
    dtype = accumulate_dtype(losses)
    x, y = losses.to(dtype), reference.to(dtype)
    mean, far = (z[:1] + (z - z[:1]).mean() for z in (x, y))  # from the first on: exact where all are equal
    shift = (mean - far).squeeze()
    centred = x - mean
    sigma = centred.square().mean().sqrt()
    stretch = sigma - (y - far).square().mean().sqrt()
    unit = torch.where(sigma > 0, centred / torch.where(sigma > 0, sigma, 1), 0)
    return shift.square() + stretch.square(), (2 / len(x)) * (shift + stretch * unit)


def w2_features(features: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """W2² between Gaussians fitted to feature vectors (Bures).

    features X (n, d), reference Y (m, d) → value (), weights (n, d) = ∂value/∂X:
    ‖μ−μ̄‖² + tr Σ + tr Σ̄ − 2‖X_c Y_cᵀ‖_*/√(nm); the nuclear norm's gradient is the polar factor of X_c Y_cᵀ.
    """
    dtype = accumulate_dtype(features)
    x, y = features.to(dtype), reference.to(dtype)
    n, m = len(x), len(y)
    shift = x.mean(0) - y.mean(0)
    xc, yc = x - x.mean(0), y - y.mean(0)
    u, s, vh = torch.linalg.svd(xc @ yc.mT, full_matrices=False)
    # directions below rounding have no defined polar factor: they get none
    u = u * (s > s[:1] * max(n, m) * torch.finfo(dtype).eps)
    scale = 2 / math.sqrt(n * m)
    value = shift.square().sum() + xc.square().sum() / n + yc.square().sum() / m - scale * s.sum()
    return value.clamp(min=0), (2 / n) * (shift + xc) - scale * (u @ (vh @ yc))
