"""GU: the forget gradient without its part in the span of retain gradients, in the metric of Adam's preconditioner.

Zhou et al., "Geometric-disentanglement Unlearning", arXiv 2511.17100. From the authors' README [code]:

    g_f⊥ = (I − U (UᵀHU)⁻¹ UᵀH) g_f ,   H the optimiser's preconditioner, U = [u_1 … u_k] retain gradients

so that the update H g_f⊥ changes no retain loss to first order: <u_j, H g_f⊥> = 0. Here H = diag(1/(√v̂ + ε)) with
Adam's bias-corrected second moment v̂. [ours]: v averages the squares of the raw gradient α mean_r g − (1−α) g_f, this
step's included, so that the H that projects is the H that steps; there is no first moment, which would carry old
directions across the new span; the step is

    θ ← θ − η H (α mean_r g − (1−α) g_f⊥)

A per-sample span needs <g_i, H g_j>, which the factors of two samples do not give without forming one of the gradients
(H does not factor over a layer's in- and outputs). So U holds the means of ``groups`` parts of the retain batch, the
adjacent samples first: with the forget gradient groups + 1 weighted sums of one captured backward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import ops
from .orthograd import JointBatch, share_in_unit_interval, two_at_least
from .sgd import SgdOptions, positive
from .training import refuse_zero_eps


@dataclass
class Geometric(SgdOptions):
    """Configuration; see OrthoGrad for alpha, retain_batch and clip.

    Args:
        groups: k, directions that are protected; each holds as many numbers as the model.
        beta2, eps: Adam's.
    """

    name = "geometric"
    lr: float = 1e-3
    momentum: float = 0.0
    max_norm: float = 0.0
    alpha: float = 0.5
    retain_batch: int = 256
    groups: int = 8
    clip: float = 3.0
    beta2: float = 0.99
    eps: float = 1e-8

    def __post_init__(self):
        positive(self, "epochs", "lr", "batch", "clip", "eps")
        share_in_unit_interval(self.alpha)
        two_at_least(self.retain_batch)
        if not 1 <= self.groups <= self.retain_batch:
            raise ValueError(f"groups: got {self.groups}; needs an integer from 1 to retain_batch = {self.retain_batch}")
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"beta2: got {self.beta2}; needs a number in [0, 1)")

    def start(self, model, data, loss, seed):
        return _Geometric(self, model, data, loss, seed)


class _Geometric(JointBatch):
    def __init__(self, config, model, data, loss, seed):
        super().__init__(config, model, data, loss, seed)
        refuse_zero_eps(self.params, config.eps)
        self.second = [torch.zeros_like(p, requires_grad=False) for p in self.params]  # Adam's v

    def direction(self, k, row):
        c = self.config
        tape, losses, retain = self.captured(k, row)
        w = self.objective_weights(losses, retain)
        parts = torch.arange(retain, device=w.device).tensor_split(min(c.groups, retain))
        rows = w.new_zeros(len(parts) + 2, len(w))
        rows[0, :retain], rows[1, retain:] = w[:retain], w[retain:]
        for j, part in enumerate(parts):
            rows[2 + j, part] = 1 / len(part)
        mean, forget, *span = tape.combine(rows)
        raw = torch._foreach_add(mean, forget)
        self.must_be_finite([*raw, *(g for u in span for g in u)], "retain or the forget", "gradient")
        second = torch._foreach_lerp(self.second, torch._foreach_mul(raw, raw), 1 - c.beta2)
        metric = self.metric(second, k + 1)
        root = torch._foreach_sqrt(metric)
        *directions, g = (torch._foreach_mul(u, root) for u in (*span, forget))
        _, coef = ops.step_project(directions, None, g, rcond=len(span) * torch.finfo(torch.float64).eps)
        for c_u, u in zip(coef.to(w.dtype), span):
            torch._foreach_sub_(raw, torch._foreach_mul(u, c_u))
        self.second = second  # last: what is broken off before, as for want of memory, is no step
        return torch._foreach_mul(raw, metric)

    def metric(self, second: list[torch.Tensor], steps: int) -> list[torch.Tensor]:
        """H of the v after a number of steps: tensors like the parameters."""
        root = torch._foreach_sqrt(torch._foreach_div(second, 1 - self.config.beta2**steps))
        return torch._foreach_reciprocal(torch._foreach_add(root, self.config.eps))

    def state(self):
        return super().state() | {f"second.{i}": v for i, v in enumerate(self.second)}

    def load(self, state):
        super().load(state)
        for i, v in enumerate(self.second):
            v.copy_(state[f"second.{i}"])
