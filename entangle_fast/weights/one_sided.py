"""Aggregations that resolve conflicts between objectives one-sidedly, from their Gram alone."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import check


@check.kinds
def pcgrad(gram: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """PCGrad (Yu et al., NeurIPS 2020): each gradient gives up its component along those it conflicts with.

    gram: (m, m) of the objectives' gradients → weights (m,) float64 of the sum of the projected gradients; NaN where the
        Gram is not finite.
    generator: draws the order in which the others are visited; None visits them in index order. On any device, whatever the
        Gram's: a generator draws the same orders for a Gram on the CPU and on a GPU.

    Raises: ValueError for a Gram that is not square, TypeError for what is no torch.Generator.

    >>> import torch, entangle_fast as ef
    >>> g = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])            # two objectives in conflict
    >>> ef.weights.pcgrad(g @ g.T) @ g.double()
    tensor([0.5000, 1.5000], dtype=torch.float64)
    """
    k = _gram(gram)
    m = len(k)
    total = k.new_zeros(m)
    for i in range(m):
        w = torch.zeros_like(total)
        w[i] = 1
        order = range(m) if generator is None else torch.randperm(m, generator=generator, device=generator.device).tolist()
        for j in order:
            if j != i:
                dot = k[j] @ w  # <g_j, current>
                w[j] -= torch.where((dot < 0) & (k[j, j] > 0), dot / k[j, j].clamp(min=1e-300), 0)
        total += w
    return _loud(k, total)


@check.kinds
def upgrad(gram: Tensor, *, preference: Tensor | None = None, ridge: float = 1e-10, sweeps: int = 1000) -> Tensor:
    """UPGrad (Quinton & Rey, arXiv 2406.16232): each gradient projected onto the dual cone of all, then averaged.

    For each i the weights solve  min ½ vᵀKv  subject to  v ≥ preference_i e_i.

    Args:
        gram: (m, m).  preference: (m,) weights of the objectives; default 1/m.
        ridge: relative to the largest diagonal entry, makes the programme strictly convex; finite, >= 0.
        sweeps: upper limit of coordinate-descent sweeps; stops at relative changes below 1e-12, for which the host reads each.

    Returns: weights (m,) float64; the combined direction conflicts with no objective. NaN where the Gram is not finite.

    >>> import torch, entangle_fast as ef
    >>> g = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])            # two objectives in conflict
    >>> direction = ef.weights.upgrad(g @ g.T) @ g.double()
    >>> bool((g.double() @ direction >= 0).all())
    True
    """
    given = k = _gram(gram)
    m = len(k)
    check.ridge(ridge)
    if preference is not None and preference.shape != (m,):
        raise ValueError(f"preference: shape {tuple(preference.shape)}; needs ({m},), one weight for each objective")
    check.real(preference=preference)
    scale = k.diagonal().max().clamp(min=1e-300) if m else 1.0
    k = k / scale + ridge * torch.eye(m, dtype=k.dtype, device=k.device)
    preference = torch.full((m,), 1 / max(1, m), dtype=k.dtype, device=k.device) if preference is None else preference.double()
    floor = torch.diag(preference)
    v = floor.clone()  # column i: the programme of objective i
    for _ in range(sweeps):
        before = v.clone()
        for j in range(m):  # exact minimisation in one coordinate, for all programmes at once
            v[j] = torch.maximum(floor[j], v[j] - (k[j] @ v) / k[j, j].clamp(min=1e-300))
        if not torch.linalg.vector_norm(v - before) > 1e-12 * torch.linalg.vector_norm(v):
            break
    return _loud(given, v.sum(1))


def _loud(gram: Tensor, w: Tensor) -> Tensor:
    """w, or NaN: a comparison with NaN is no conflict, and would drop the objective in silence."""
    return torch.where(gram.isfinite().all(), w, torch.nan)


def _gram(gram: Tensor) -> Tensor:
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"gram: shape {tuple(gram.shape)}; needs (m, m), one row per objective")
    check.floating(gram=gram)
    return gram.double()
