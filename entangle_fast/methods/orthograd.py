"""OrthoGrad: the forget gradient without its part in the span of the per-sample retain gradients.

Shamsian, Shaar, Navon, Chechik, Fetaya, "Go Beyond Your Means: Unlearning with Per-Sample Gradient Orthogonalization",
arXiv 2503.02312 (methods.md §4; the formula [third], from a re-implementation that quotes the paper):

    G_r = QR,  g_f⊥ = g_f − QQᵀg_f,  θ ← θ − η (α mean_i g_i − (1−α) g_f⊥)

QR of the k retain gradients holds k×P numbers. Here retain and forget samples stand in one batch, so that the k×k Gram
and the cross-Gram are blocks of one matrix, and the step is one vector of weights over all samples: one forward, one
backward that forms no weight gradient, one Gram, one solve, one combined gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import weights
from ..capture import Tape, capture
from .sgd import SgdOptions, SgdProcess, positive


@dataclass
class OrthoGrad(SgdOptions):
    """Configuration; the paper's are alpha and the span, clip, ridge and the bound on the norm are [ours].

    Args:
        alpha: weight of the mean retain gradient, 1 − alpha that of the projected forget gradient, in [0, 1].
        retain_batch: k, retain samples a step, adjacent and remote in proportion to their sets: the span's dimension.
        clip: forget samples whose loss (nats) has reached it are left alone, as in stage 1 of Entangled.
        ridge: added to the k×k Gram, in its own units; 0: directions below rounding count as none.

    A span of many samples takes most of the forget gradient away (a trained model's is short as it is): hence the large lr,
    which ``max_norm`` bounds. A momentum > 0 carries directions on that were orthogonal to the retain gradients of earlier steps only.
    """

    name = "orthograd"
    lr: float = 1.0
    momentum: float = 0.0
    max_norm: float = 0.3
    alpha: float = 0.75
    retain_batch: int = 64
    clip: float = 10.0
    ridge: float = 0.0

    def __post_init__(self):
        positive(self, "epochs", "lr", "batch", "clip")
        share_in_unit_interval(self.alpha)
        two_at_least(self.retain_batch)
        if not (self.ridge >= 0 and math.isfinite(self.ridge)):
            raise ValueError(f"ridge: got {self.ridge}; needs a finite number >= 0")

    def start(self, model, data, loss, seed):
        return _OrthoGrad(self, model, data, loss, seed)


def share_in_unit_interval(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: got {alpha}; needs a number in [0, 1]")


def two_at_least(retain_batch: int) -> None:
    if retain_batch < 2:
        raise ValueError(f"retain_batch: got {retain_batch}; needs an integer >= 2: one adjacent and one remote sample")


class JointBatch(SgdProcess):
    """Steps whose direction is one weighted sum over the retain and the forget samples of one captured batch."""

    def captured(self, k: int, row: dict) -> tuple[Tape, Tensor, int]:
        """The tape of step k after its backward, the losses (n,), and how many retain samples come first."""
        sets = [*self.data.retain_sizes(self.config.retain_batch), (self.data.forget, self.config.batch)]
        batches = [samples.batch(k, size) for samples, size in sets]
        x, y = (torch.cat([b[i] for b in batches]) for i in (1, 2))
        with capture(self.model) as tape:
            output = self.model(x)
            losses = self.loss(output, y)
            sizes = [len(b[2]) for b in batches]
            self.checked(losses, len(y), "retain or the forget")
            for (samples, _), part in zip(sets, losses.detach().split(sizes)):
                row[f"loss_{samples.name}"] = part.mean()
            tape.backward(losses)
        retain = sizes[0] + sizes[1]
        self.note_right(output[retain:], y[retain:])
        return tape, losses.detach(), retain

    def gram(self, tape: Tape) -> Tensor:
        """The (n, n) Gram, checked: finite losses can have gradients that are not."""
        gram = tape.gram()
        self.must_be_finite(gram.diagonal(), "retain or the forget", "gradient")
        return gram

    def objective_weights(self, losses: Tensor, retain: int) -> Tensor:
        """Weights (n,) of α mean_r g − (1−α) g_f, the forget losses clipped."""
        c = self.config
        return torch.cat([c.alpha * weights.means(losses[:retain]), (c.alpha - 1) * weights.clipped(losses[retain:], c.clip)])


class _OrthoGrad(JointBatch):
    def direction(self, k, row):
        tape, losses, retain = self.captured(k, row)
        gram = self.gram(tape)
        w = self.objective_weights(losses, retain)
        # the sums over samples are as exact as the losses, whatever dtype they stand in
        rcond = len(gram) * torch.finfo(losses.dtype).eps
        away = weights.project_away(gram[:retain, :retain], gram[:retain, retain:], w[retain:], ridge=self.config.ridge, rcond=rcond)
        w[:retain] += away.to(w.dtype)
        return tape.combine(w)
