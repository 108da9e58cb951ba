"""The small solve with a Gram: what step_project does on the device, and weights.solve with any Gram.

The rule, which csrc/cpu/step_project.cpp, csrc/cuda/solve.cuh and kernels/step_project.py follow: a direction whose square is
not above LEAST is left out, with coefficient 0, as if it had not been given; a ridge below LEAST is none; a Gram or a right
side that is not finite gives NaN for every coefficient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEAST = 1e-60  # float32 may not hold the coefficient of a direction shorter than 1e-30, as a saturated softmax gives


def least_norm(gram: Tensor, rhs: Tensor, ridge: float, rcond: float) -> Tensor:
    """c with (K + ridge·I) c = rhs; without a ridge the solution of least norm for gradients scaled to unit length.

    gram (k, k) float64, positive semi-definite; rhs (k,) or (k, m). Without a ridge, eigenvalues of the unit-diagonal
    Gram that are not above rcond·largest count as zero.
    """
    # gradients of unit length: else a long one (a forget sample at loss 17) hides a short one (the mean of a
    # set that is already fitted) below rcond, and the short direction is not protected at all
    square, ridged = gram.diagonal(), ridge >= LEAST
    unit = torch.where(square > LEAST, torch.ones_like(square) if ridged else 1 / square.sqrt(), 0)
    scaled = gram * unit.unsqueeze(1) * unit
    finite = scaled.isfinite().all()
    values, vectors = eigh(torch.where(finite, scaled, 0))  # LAPACK refuses NaN
    if ridged:
        inverse = 1 / (values.clamp(min=0) + ridge)
    else:
        inverse = torch.where(values > rcond * values[-1:].clamp(min=0), 1 / values, 0)
    columns = rhs.double() if rhs.dim() == 2 else rhs.double().unsqueeze(1)
    found = unit.unsqueeze(1) * (vectors @ (inverse.unsqueeze(1) * (vectors.mT @ (unit.unsqueeze(1) * columns))))
    found = torch.where(finite & columns.isfinite().all(0), found, math.nan)
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
