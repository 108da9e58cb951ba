"""ROSU: descend on the retain loss at a nearby point of higher forget loss and, to first order, equal retain loss.

Cai et al., "Retain-Neutral Surrogates for Min–Max Unlearning", arXiv 2605.05871 (methods.md §4). The inner problem is
the abstract's [paper], its solution follows; how the step uses it is known in words only ("transported outer update",
"amplification along the retain-neutral direction"), the form below is [ours]:

    δ = argmax <g_f, δ>  subject to  <g_r, δ> = 0, ‖δ‖ ≤ ρ       δ = ρ g_f⊥/‖g_f⊥‖,  g_f⊥ = g_f − <g_r,g_f>/‖g_r‖² g_r
    θ ← θ − η ( ∇L_r(θ+δ) − κ δ/ρ )

κ is what moves the model itself: with κ = 0 only the point is perturbed, at which the retain gradient is taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .. import ops, weights
from .ahead import AheadProcess
from .process import square
from .sgd import SgdOptions, positive


@dataclass
class Rosu(SgdOptions):
    """Configuration; batch and retain_batch are the samples of g_f and of g_r.

    Args:
        rho: ρ, length of the perturbation over all parameters.
        amplify: κ >= 0, length of the step along the retain-neutral direction, in units of lr.
        clip: forget samples whose loss (nats) has reached it are left alone, as in stage 1 of Entangled [ours].
    """

    name = "rosu"
    lr: float = 0.1
    momentum: float = 0.0
    rho: float = 0.1
    amplify: float = 1.5
    retain_batch: int = 256
    clip: float = 3.0

    def __post_init__(self):
        positive(self, "epochs", "lr", "batch", "retain_batch", "clip", "rho")
        if not (self.amplify >= 0 and math.isfinite(self.amplify)):
            raise ValueError(f"amplify: got {self.amplify}; needs a finite number >= 0")

    def start(self, model, data, loss, seed):
        return _Rosu(self, model, data, loss, seed)


class _Rosu(AheadProcess):
    def direction(self, k, row):
        c = self.config
        forget = self.batch_losses(self.data.forget, k, c.batch, row)
        g_forget = self.gradient((weights.clipped(forget, c.clip) * forget).sum(), "forget")
        g_retain = self.gradient(self.retain_losses(k, c.retain_batch, row).mean(), "retain")
        delta = self.perturbation(g_forget, g_retain)
        with self.ahead(delta, -1.0):
            there = self.gradient(self.retain_losses(k, c.retain_batch, {}).mean(), "retain, seen from θ + δ,")
        return torch._foreach_add(there, delta, alpha=-c.amplify / c.rho)

    def perturbation(self, g_forget, g_retain):
        """δ; zeros where no forget gradient is left outside the retain gradient's line."""
        gram = ops.step_gram([g_retain, g_forget])
        away = weights.project_away(gram[:1, :1], gram[:1, 1])[0]
        free = torch._foreach_add(g_forget, torch._foreach_mul(g_retain, away.to(g_retain[0].dtype)))
        norm = square(free).sqrt().to(free[0].dtype)
        torch._foreach_mul_(free, torch.where(norm > 0, self.config.rho / norm, 0))
        return free
