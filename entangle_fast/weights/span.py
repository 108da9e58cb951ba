"""Weights that remove, keep or damp the span of some gradients: small solves with a Gram, in float64, on its device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops import check
from ..reference.solve import least_norm


def _square(k: Tensor, name: str) -> Tensor:
    if k.dim() != 2 or k.shape[0] != k.shape[1]:
        raise ValueError(f"{name}: shape {tuple(k.shape)}; needs a square Gram (k, k)")
    check.floating(**{name: k})
    return k.double()


@check.kinds
def solve(gram: Tensor, rhs: Tensor, *, ridge: float = 0.0, rcond: float | None = None) -> Tensor:
    """c with (K + ridge·I) c = rhs, float64; a rank-deficient K without a ridge gets a solution of least norm.

    The norm, and what counts as rank-deficient, are those of the gradients scaled to unit length: the projection
    Σ c_i g_i is the same for every solution.

    Args:
        gram: (k, k) positive semi-definite.  rhs: (k,) or (k, m).
        ridge: added to the diagonal, in the Gram's own units; below 1e-60 it is none.
        rcond: without a ridge, eigenvalues of the unit-diagonal Gram below rcond·largest count as zero; default k·eps
            of the Gram's dtype.

    Equivalent to: ``torch.linalg.solve(gram + ridge * torch.eye(len(gram)), rhs)`` for a regular Gram

    A gradient not longer than 1e-30 is left out, with c = 0: a zero Gram gives zeros. NaN or inf in the Gram, or in a column
    of rhs, gives NaN for every c (of that column), and nothing else does.

    On a GPU the host waits where there are more than two gradients: torch.linalg.eigh looks whether it converged.
    ops.step_project solves for up to 32 directions without.

    Raises: ValueError for shapes, dtypes that are not real, a ridge or rcond out of range.
    """
    k = _square(gram, "gram")
    if rhs.shape[:1] != k.shape[:1]:
        raise ValueError(f"rhs: shape {tuple(rhs.shape)}; needs {k.shape[0]} rows")
    check.real(rhs=rhs)
    check.ridge(ridge)
    if rcond is None:
        rcond = max(1, len(k)) * torch.finfo(gram.dtype).eps
    elif not rcond >= 0:
        raise ValueError(f"rcond: got {rcond}; needs a number >= 0")
    return least_norm(k, rhs, ridge, rcond)


def _moments(cross: Tensor, u: Tensor | None) -> Tensor:
    """<g_r, v> for v = Σ_i u_i g_i."""
    check.real(cross=cross, u=u)
    if u is None:
        return cross
    if cross.dim() != 2 or cross.shape[1:] != u.shape[:1]:
        raise ValueError(f"u: shape {tuple(u.shape)}; needs one weight for each column of the cross-Gram {tuple(cross.shape)}")
    return cross.double() @ u.double()


@check.kinds
def project_onto(
    gram: Tensor, cross: Tensor, u: Tensor | None = None, *, ridge: float = 0.0, rcond: float | None = None
) -> Tensor:
    """Weights c on the k spanning gradients such that Σ_r c_r g_r = P_V v, the projection of v onto their span.

    Args:
        gram: (k, k) Gram of the spanning gradients: two means (the paper's stage 2) or k samples (OrthoGrad).
        cross: (k, n) cross-Gram with the samples of v = Σ_i u_i g_i; or with u=None the (k,) inner products <g_r, v>.
        u: (n,).  ridge, rcond: as in solve.

    Returns: (k,) float64.

    Equivalent to: ``torch.linalg.lstsq(S.T, v).solution`` with the spanning gradients S (k, P) and v (P,) formed
    """
    return solve(gram, _moments(cross, u), ridge=ridge, rcond=rcond)


@check.kinds
def project_away(
    gram: Tensor, cross: Tensor, u: Tensor | None = None, *, ridge: float = 0.0, rcond: float | None = None
) -> Tensor:
    """Weights on the k spanning gradients that, added to v, remove its part in their span: v − P_V v.

    The negative of project_onto; same arguments.

    >>> import torch, entangle_fast as ef
    >>> G = torch.randn(5, 40, dtype=torch.float64)            # rows: gradients; the first three span, the others make up v
    >>> K, u = G @ G.T, torch.tensor([0.5, 0.5])
    >>> c = ef.weights.project_away(K[:3, :3], K[:3, 3:], u)
    >>> left = torch.cat([c, u]) @ G
    >>> bool((G[:3] @ left).abs().max() < 1e-9)
    True
    """
    return -project_onto(gram, cross, u, ridge=ridge, rcond=rcond)


@check.kinds
def damped(gram: Tensor, cross: Tensor, u: Tensor | None = None, *, damping: float) -> tuple[float, Tensor]:
    """The damped Newton direction (λI + GᵀG/n)⁻¹ v by Woodbury (methods.md §4).

    = v/λ − Gᵀ (nλI + GGᵀ)⁻¹ G v / λ, with G the n spanning gradients.

    Args: gram (n, n), cross and u as in project_onto, damping λ > 0.
    Returns: the weight of v, and the weights (n,) of the spanning gradients.

    Equivalent to: ``torch.linalg.solve(damping * torch.eye(S.shape[1]) + S.T @ S / len(S), v)`` for the direction, with the spanning
    gradients S (n, P) and v (P,) formed
    """
    if not 0 < damping < math.inf or math.isinf(1 / damping):
        raise ValueError(f"damping: got {damping}; needs a finite number > 0, and of a finite inverse")
    n = len(_square(gram, "gram"))
    return 1 / damping, -solve(gram, _moments(cross, u), ridge=n * damping) / damping
