"""SSD: dampen the parameters that matter much more to the forget set than to the data as a whole.

Foster, Schoepf, Brintrup, "Fast Machine Unlearning without Retraining through Selective Synaptic Dampening", AAAI 2024, arXiv
2308.07707 [paper]:

    Z_S = mean over i in S of g_i²            elementwise: the diagonal of the empirical Fisher
    where Z_f > α Z_D:  θ ← β θ,  β = min(λ Z_D / Z_f, 1)

D is the whole training set, or the retain set with ``against="retain"`` [ours]. No step of descent is taken, no gradient
followed. Squares are those of true per-sample gradients (capture/squares.py), not of a batch's mean gradient, whose square is
smaller by up to the batch's size where the samples of a batch disagree, and differently so in each set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..capture import capture
from ..capture.squares import square_sums
from .data import NAMES
from .process import Process
from .sgd import positive


@dataclass
class Ssd:
    """Configuration; defaults [ours]: near the best of some hundred (α, λ) that left the demo's class at most 5 % accuracy.

    Z_f > α Z_D needs α < (samples in D)/(forget samples) where D includes the forget set: the paper's α = 10, λ = 1, meant for
    forget sets that are a small part of the data, changes nothing where the forget set is a tenth of it.

    Args:
        alpha: α, how many times as important to the forget set a parameter has to be to be dampened; smaller forgets more.
        lam: λ, how far it is dampened; smaller forgets more.
        against: what Z_D is over: "all", forget and retain samples (the paper's), or "retain" [ours].
        batch: samples of a forward and backward; no influence on the result but rounding.
    """

    name = "ssd"
    alpha: float = 0.1
    lam: float = 0.08
    against: Literal["all", "retain"] = "all"
    batch: int = 256

    def __post_init__(self):
        positive(self, "alpha", "lam")
        if not isinstance(self.batch, int) or self.batch < 1:
            raise ValueError(f"batch: got {self.batch!r}; needs a whole number >= 1")
        if self.against not in ("all", "retain"):
            raise ValueError(f"against: got {self.against!r}; needs 'all' or 'retain'")

    def start(self, model, data, loss, seed):
        return _Ssd(self, model, data, loss, seed)


class _Ssd(Process):
    def __init__(self, config, model, data, loss, seed):
        super().__init__(config, model, data, loss, seed)
        self.chunks = [(name, rows) for name in NAMES for rows in torch.arange(len(getattr(data, name))).split(config.batch)]
        zeros = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32), requires_grad=False) for p in self.params]
        self.squares = {"forget": zeros, "retain": [z.clone() for z in zeros]}

    @property
    def stages(self):
        return [("importance", len(self.chunks)), ("dampen", 1)]

    def take_step(self, stage, k):
        if stage == "dampen":
            return {"dampened": self._dampen()}
        name, rows = self.chunks[k]
        x, y = getattr(self.data, name).take(rows)
        with capture(self.model) as tape:
            losses = self.checked(self.loss(self.model(x), y), len(y), name)
            tape.backward(losses)
        found = square_sums(tape)
        self.must_be_finite(found, name, "squared gradient")
        torch._foreach_add_(self.squares["forget" if name == "forget" else "retain"], found)
        return {"epoch": (k + 1) / len(self.chunks), f"loss_{name}": losses.detach().mean()}

    @torch.no_grad()
    def _dampen(self) -> Tensor:
        """The share of parameters that were dampened, 0-d."""
        c, count = self.config, 0
        n, m = len(self.data.forget), sum(len(s) for s in self.data.retain)
        for p, forget, retain in zip(self.params, self.squares["forget"], self.squares["retain"]):
            mine = forget / n
            whole = (forget + retain) / (n + m) if c.against == "all" else retain / m
            chosen = mine > c.alpha * whole
            beta = (c.lam * whole / mine).clamp(max=1)  # 0/0 is never chosen
            p.copy_(torch.where(chosen, p * beta, p))
            count = count + chosen.sum()
        return count.double() / sum(p.numel() for p in self.params)

    def state(self):
        return {f"squares.{side}.{i}": z for side, found in self.squares.items() for i, z in enumerate(found)}

    def load(self, state):
        for side, found in self.squares.items():
            for i, z in enumerate(found):
                z.copy_(state[f"squares.{side}.{i}"])
