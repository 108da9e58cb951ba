"""Damped Newton steps by Woodbury's identity, after WIN-U.

Zhao, Mohammadi Amiri, Magdon-Ismail, "WIN-U: Woodbury-Informed Newton-Unlearning …", arXiv 2604.13438 (methods.md §4).
By its abstract the paper takes one Newton step that needs no retain data: the curvature of all data was kept, and
Woodbury's identity takes the generalised Gauss–Newton matrix of the forget set out of it. What stands here shares the
identity only and is [ours]: the curvature is the empirical Fisher of a retain batch (G, its n per-sample gradients; not
a Gauss–Newton matrix, which needs the outputs' Jacobian), and steps are repeated:

    v = α mean_i g_i − (1−α) g_f ,   θ ← θ − η (λI + GᵀG/n)⁻¹ v ,   (λI + GᵀG/n)⁻¹ v = v/λ − Gᵀ (nλI + GGᵀ)⁻¹ G v / λ

GGᵀ and Gv are blocks of one Gram: the same step as OrthoGrad's with a ridge instead of a pseudo-inverse. As λ → 0 the
forget gradient loses its part in the retain span; a large λ leaves plain gradient difference.
"""

from __future__ import annotations

from dataclasses import dataclass

from .. import weights
from .orthograd import JointBatch, share_in_unit_interval, two_at_least
from .sgd import SgdOptions, positive


@dataclass
class Woodbury(SgdOptions):
    """Configuration; see OrthoGrad for alpha, retain_batch and clip.

    Args:
        damping: λ > 0, in units of the Fisher's eigenvalues (squared gradient norms, nats² per squared parameter).

    The direction's length goes with 1/λ: ``max_norm`` bounds it.
    """

    name = "woodbury"
    lr: float = 1.2e-2
    momentum: float = 0.0
    alpha: float = 0.8
    damping: float = 1e-3
    retain_batch: int = 256
    clip: float = 3.0

    def __post_init__(self):
        positive(self, "epochs", "lr", "batch", "clip", "damping")
        share_in_unit_interval(self.alpha)
        two_at_least(self.retain_batch)

    def start(self, model, data, loss, seed):
        return _Woodbury(self, model, data, loss, seed)


class _Woodbury(JointBatch):
    def direction(self, k, row):
        tape, losses, retain = self.captured(k, row)
        gram = self.gram(tape)
        u = self.objective_weights(losses, retain)
        own, spanning = weights.damped(gram[:retain, :retain], gram[:retain], u, damping=self.config.damping)
        w = own * u
        w[:retain] += spanning.to(w.dtype)
        return tape.combine(w)
