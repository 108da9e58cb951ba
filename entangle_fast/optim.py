"""Optimiser steps over many tensors: projected momentum, decay and noise, look-ahead with an exact undo.

Everything that a step decides stays on the device: the k×k solve too, so a step never makes the host wait.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import ops, weights

Tensors = Sequence[Tensor]


class ProjectedMomentum:
    """SGD whose momentum buffer is kept orthogonal to given directions (methods.md §1, stage 2).

        v ← m v + g ;  v ← v − P_V v ;  θ ← θ − lr v

    Args:
        params: the parameters, changed in place.
        lr, momentum, weight_decay: as in torch.optim.SGD, the decay decoupled.
        ridge: added to the k×k Gram, in its own units; the authors add 1e-8 once per parameter tensor.
        project: "momentum" (above, the authors'), or "gradient": v ← m v + (g − P_V g).

    An Adam-type preconditioner after the projection would turn the update back into the span; there is none here.
    """

    def __init__(
        self, params: Tensors, *, lr: float, momentum: float = 0.9, weight_decay: float = 0.0, ridge: float = 0.0,
        project: str = "momentum",
    ):  # fmt: skip
        if project not in ("momentum", "gradient"):
            raise ValueError(f"project: got {project!r}; needs 'momentum' or 'gradient'")
        self.params = list(params)
        self.lr, self.momentum, self.weight_decay, self.ridge = lr, momentum, weight_decay, ridge
        self.carried = momentum if project == "momentum" else 0.0  # the share of the old v that is projected again
        self.buffers = [torch.zeros_like(p, requires_grad=False) for p in self.params]

    @torch.no_grad()
    def step(self, grads: Tensors, directions: Sequence[Tensors], coef: Tensor | None = None) -> dict[str, Tensor]:
        """One step with gradient ``grads``, away from span(``directions``), over all parameters at once.

        grads: tensors like params.  directions: k such lists.  coef: (k,) of P_V where the caller has solved for it.
        Returns 0-d tensors: cosine of the first two directions (k ≥ 2), norm of v, and removed, the share of ‖v‖
        that the projection took away.
        """
        k = len(directions)
        gram = ops.step_gram([*directions, self.buffers, grads])
        inner = self.carried * gram[:k, k] + gram[:k, k + 1]  # <d_j, m v + g>
        if coef is None:
            coef = weights.project_onto(gram[:k, :k], inner, ridge=self.ridge)
        coef = coef.double()
        ops.step_update(
            self.params, self.buffers, grads, directions, coef, lr=self.lr, beta=self.momentum,
            weight_decay=self.weight_decay,
        )  # fmt: skip
        total = self.carried**2 * gram[k, k] + 2 * self.carried * gram[k, k + 1] + gram[k + 1, k + 1]
        kept = total - 2 * coef @ inner + coef @ gram[:k, :k] @ coef
        found = {
            "step_norm": self.lr * kept.clamp(min=0).sqrt(),
            "removed": (1 - kept / total.clamp(min=1e-300)).clamp(0, 1).sqrt(),
        }
        if k >= 2:
            found["cosine"] = gram[0, 1] / (gram[0, 0] * gram[1, 1]).clamp(min=1e-300).sqrt()
        return found

    def state(self) -> dict[str, Tensor]:
        return {f"momentum.{i}": v for i, v in enumerate(self.buffers)}

    def load(self, state: dict[str, Tensor]) -> None:
        for i, v in enumerate(self.buffers):
            v.copy_(state[f"momentum.{i}"])


@torch.no_grad()
def decay_noise_step(
    params: Tensors, grads: Tensors, *, lr: float, weight_decay: float = 0.0, noise: float = 0.0, seed: int = 0,
    offset: int = 0,
) -> None:  # fmt: skip
    """θ ← (1 − lr·weight_decay) θ − lr g + noise ξ, ξ ~ N(0, 1) from Philox stream (seed, offset): one pass."""
    none = torch.zeros(0, dtype=torch.float64, device=params[0].device)
    ops.step_update(params, None, grads, [], none, lr=lr, weight_decay=weight_decay, noise=noise, seed=seed, offset=offset)


@contextlib.contextmanager
def lookahead(params: Tensors, grads: Tensors, alpha: float) -> Iterator[None]:
    """Inside the ``with`` the parameters stand at θ − alpha·g; afterwards at the very bits they had before.

    One byte a parameter is held, not a copy of the model. grads must not change in between.
    """
    with torch.no_grad():
        residue = ops.step_lookahead(params, grads, alpha)
    try:
        yield
    finally:
        with torch.no_grad():
            ops.step_lookahead_undo(params, grads, residue, alpha)
