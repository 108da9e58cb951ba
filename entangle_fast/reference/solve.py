"""The small solve with a Gram: what step_project does on the device, and weights.solve with any Gram."""

from __future__ import annotations

import torch
from torch import Tensor


def least_norm(gram: Tensor, rhs: Tensor, ridge: float, rcond: float) -> Tensor:
    """c with (K + ridge·I) c = rhs; without a ridge the solution of least norm for gradients scaled to unit length.

    gram (k, k) float64, positive semi-definite; rhs (k,) or (k, m). Without a ridge, eigenvalues of the unit-diagonal
    Gram that are not above rcond·largest count as zero.
    """
    # gradients of unit length: else a long one (a forget sample at loss 17) hides a short one (the mean of a
    # set that is already fitted) below rcond, and the short direction is not protected at all
    lengths = gram.diagonal().clamp(min=0).sqrt()
    unit = torch.ones_like(lengths) if ridge else torch.where(lengths > 0, 1 / lengths, 0)
    values, vectors = eigh(gram * unit.unsqueeze(1) * unit)
    if ridge:
        inverse = 1 / (values.clamp(min=0) + ridge)
    else:
        inverse = torch.where(values > rcond * values[-1:].clamp(min=0), 1 / values, 0)
    columns = rhs.double() if rhs.dim() == 2 else rhs.double().unsqueeze(1)
    found = unit.unsqueeze(1) * (vectors @ (inverse.unsqueeze(1) * (vectors.mT @ (unit.unsqueeze(1) * columns))))
    return found if rhs.dim() == 2 else found.squeeze(1)


def eigh(k: Tensor) -> tuple[Tensor, Tensor]:
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
