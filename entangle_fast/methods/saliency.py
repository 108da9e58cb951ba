"""SalUn: random labels, but only the parameters that matter to the forget set may move.

Fan, Liu, Zhang, Wong, Wei, Liu, "SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency", ICLR 2024, arXiv
2310.12508 [paper]:

    mask = 1( |∇L_f(θ0)| ≥ γ ),  γ the median of |∇L_f(θ0)| over all parameters
    θ ← θ0 + mask ⊙ Δθ,  Δθ descending on the retain set and on the forget set with random wrong labels

Parameters whose forget gradient is exactly zero are never salient, also where γ is 0 [ours].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .baselines import RandomLabels, _RandomLabels


@dataclass
class SalUn(RandomLabels):
    """Configuration: that of RandomLabels, and ``keep``, the share of parameters that may move (0.5: the median)."""

    name = "salun"
    lr: float = 5e-2
    keep: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep: got {self.keep}; needs a share of the parameters in (0, 1]")

    def start(self, model, data, loss, seed):
        return _SalUn(self, model, data, loss, seed)


class _SalUn(_RandomLabels):
    mask: list[Tensor] = []

    def enter(self, stage):
        forget, total = self.data.forget, [torch.zeros_like(p) for p in self.params]
        for _, x, y in forget.chunks():
            torch._foreach_add_(total, self.gradient(self.losses(x, y, "forget").sum() / len(forget), "forget"))
        self.settle()
        self.mask = saliency(total, self.config.keep)

    def direction(self, k, row):
        return torch._foreach_mul(super().direction(k, row), self.mask)

    def state(self):
        return super().state() | {f"mask.{i}": m for i, m in enumerate(self.mask)}

    def load(self, state):
        super().load(state)
        self.mask = [state[f"mask.{i}"].to(p.device) for i, p in enumerate(self.params) if f"mask.{i}" in state]


def saliency(gradients: list[Tensor], keep: float) -> list[Tensor]:
    """Bool tensors like ``gradients``: the ``keep`` largest in magnitude, ties with the last one included, zeros left out."""
    sizes = torch.cat([g.abs().flatten() for g in gradients])
    threshold = sizes.kthvalue(len(sizes) - math.ceil(keep * len(sizes)) + 1).values
    return [(g.abs() >= threshold) & (g != 0) for g in gradients]
