"""Weights that remove, keep or damp the span of some gradients: small solves with a Gram, in float64, on its device."""

from __future__ import annotations

import torch
from torch import Tensor


def _square(k: Tensor, name: str) -> Tensor:
    if k.dim() != 2 or k.shape[0] != k.shape[1]:
        raise ValueError(f"{name}: shape {tuple(k.shape)}; needs a square Gram (k, k)")
    return k.double()


def solve(gram: Tensor, rhs: Tensor, *, ridge: float = 0.0, rcond: float | None = None) -> Tensor:
    """c with (K + ridge·I) c = rhs, float64; a rank-deficient K without a ridge gets a solution of least norm.

    The norm, and what counts as rank-deficient, are those of the gradients scaled to unit length: the projection
    Σ c_i g_i is the same for every solution.

    Args:
        gram: (k, k) positive semi-definite.  rhs: (k,) or (k, m).
        ridge: added to the diagonal, in the Gram's own units.
        rcond: without a ridge, eigenvalues of the unit-diagonal Gram below rcond·largest count as zero; default k·eps
            of the Gram's dtype.

    Raises: ValueError for shapes; never returns NaN for finite input: a zero Gram gives zeros.
    """
    k = _square(gram, "gram")
    if rhs.shape[:1] != k.shape[:1]:
        raise ValueError(f"rhs: shape {tuple(rhs.shape)}; needs {k.shape[0]} rows")
    if ridge < 0:
        raise ValueError(f"ridge: got {ridge}; needs a number >= 0")
    if rcond is None:
        rcond = max(1, len(k)) * torch.finfo(gram.dtype).eps
    # gradients of unit length: else a long one (a forget sample at loss 17) hides a short one (the mean of a
    # set that is already fitted) below rcond, and the short direction is not protected at all
    lengths = k.diagonal().clamp(min=0).sqrt()
    unit = torch.ones_like(lengths) if ridge else torch.where(lengths > 0, 1 / lengths, 0)
    values, vectors = _eigh(k * unit.unsqueeze(1) * unit)
    if ridge:
        inverse = 1 / (values.clamp(min=0) + ridge)
    else:
        inverse = torch.where(values > rcond * values[-1:].clamp(min=0), 1 / values, 0)
    columns = rhs.double() if rhs.dim() == 2 else rhs.double().unsqueeze(1)
    found = unit.unsqueeze(1) * (vectors @ (inverse.unsqueeze(1) * (vectors.mT @ (unit.unsqueeze(1) * columns))))
    return found if rhs.dim() == 2 else found.squeeze(1)


def _eigh(k: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors; in closed form up to 2×2, where a solver would make the host wait."""
    if len(k) == 0:
        return k.new_zeros(0), k
    if len(k) == 1:
        return k[0], torch.ones_like(k)
    if len(k) > 2:
        return torch.linalg.eigh(k)
    a, b, c = k[0, 0], (k[0, 1] + k[1, 0]) / 2, k[1, 1]
    angle = torch.atan2(2 * b, a - c) / 2
    cos, sin = angle.cos(), angle.sin()
    high = a * cos * cos + 2 * b * cos * sin + c * sin * sin
    low = a * sin * sin - 2 * b * cos * sin + c * cos * cos
    return torch.stack([low, high]), torch.stack([torch.stack([-sin, cos]), torch.stack([cos, sin])], 1)


def _moments(cross: Tensor, u: Tensor | None) -> Tensor:
    """<g_r, v> for v = Σ_i u_i g_i."""
    if u is None:
        return cross
    if cross.dim() != 2 or cross.shape[1:] != u.shape[:1]:
        raise ValueError(f"u: shape {tuple(u.shape)}; needs one weight for each column of the cross-Gram {tuple(cross.shape)}")
    return cross.double() @ u.double()


def project_onto(
    gram: Tensor, cross: Tensor, u: Tensor | None = None, *, ridge: float = 0.0, rcond: float | None = None
) -> Tensor:
    """Weights c on the k spanning gradients such that Σ_r c_r g_r = P_V v, the projection of v onto their span.

    Args:
        gram: (k, k) Gram of the spanning gradients: two means (the paper's stage 2) or k samples (OrthoGrad).
        cross: (k, n) cross-Gram with the samples of v = Σ_i u_i g_i; or with u=None the (k,) inner products <g_r, v>.
        u: (n,).  ridge, rcond: as in solve.

    Returns: (k,) float64.
    """
    return solve(gram, _moments(cross, u), ridge=ridge, rcond=rcond)


def project_away(
    gram: Tensor, cross: Tensor, u: Tensor | None = None, *, ridge: float = 0.0, rcond: float | None = None
) -> Tensor:
    """Weights on the k spanning gradients that, added to v, remove its part in their span: v − P_V v.

    The negative of project_onto; same arguments.
    """
    return -project_onto(gram, cross, u, ridge=ridge, rcond=rcond)


def damped(gram: Tensor, cross: Tensor, u: Tensor | None = None, *, damping: float) -> tuple[float, Tensor]:
    """The damped Newton direction (λI + GᵀG/n)⁻¹ v by Woodbury (methods.md §4).

    = v/λ − Gᵀ (nλI + GGᵀ)⁻¹ G v / λ, with G the n spanning gradients.

    Args: gram (n, n), cross and u as in project_onto, damping λ > 0.
    Returns: the weight of v, and the weights (n,) of the spanning gradients.
    """
    if not damping > 0:
        raise ValueError(f"damping: got {damping}; needs a number > 0")
    n = len(_square(gram, "gram"))
    return 1 / damping, -solve(gram, _moments(cross, u), ridge=n * damping) / damping
