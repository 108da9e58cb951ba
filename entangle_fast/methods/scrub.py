"""SCRUB: a student that disobeys its teacher on the forget set and obeys it on the retain set.

Kurmanji, Triantafillou, Hayes, Triantafillou, "Towards Unbounded Machine Unlearning", NeurIPS 2023, arXiv 2302.09880 [paper]:

    d(x; θ) = KL( p(f(x; θ0)) ‖ p(f(x; θ)) ),  p = softmax(·/T), times T² (Hinton et al., arXiv 1503.02531)
    max-steps: descend on −mean d over a forget batch
    min-steps: descend on mean (α d + γ ℓ) over a retain batch

An epoch is one pass of max-steps over the forget set, in the first ``max_epochs`` only, then one of min-steps over the retain
set. The teacher θ0 is the model itself run with the parameters it had at the start: a copy of the trainable ones is held.
The paper's rewinding (SCRUB+R), for privacy, is not here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from .sgd import SgdProcess, positive


@dataclass
class Scrub:
    """Configuration; defaults [ours], from a dozen trials on the demo's class, whose label its neighbours share.

    There min-steps bring the forget set back together with its neighbours within some ten steps, so that the result hangs on
    where the run ends, and small changes of any option flip it: look at the history before you compare with it.

    Args:
        epochs: passes over the retain set.  max_epochs: passes over the forget set, one before each of the first ones.
        lr, momentum: of SGD; both kinds of steps share the momentum.  max_norm: bound on the gradient's norm, 0 for none.
        batch, forget_batch: retain and forget samples a step.
        alpha, gamma: weights of the distillation and of the loss in the min-steps.  temperature: T.
    """

    name = "scrub"
    stop_at = None  # no option: an end between max-steps and min-steps would leave the damage
    epochs: int = 2
    max_epochs: int = 2
    lr: float = 2e-2
    momentum: float = 0.9
    batch: int = 1024
    forget_batch: int = 128
    alpha: float = 1.0
    gamma: float = 1.0
    temperature: float = 2.0
    max_norm: float = 1.0

    def __post_init__(self):
        positive(self, "lr", "temperature")
        for name in ("epochs", "max_epochs", "batch", "forget_batch"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)!r}; needs a whole number >= 1")
        if self.max_epochs > self.epochs:
            raise ValueError(f"max_epochs: got {self.max_epochs}; needs at most epochs, {self.epochs}: what is undone is repaired after")
        for name in ("alpha", "gamma", "max_norm"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name}: got {getattr(self, name)}; needs a finite number >= 0")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: got {self.momentum}; needs a number in [0, 1)")

    def start(self, model, data, loss, seed):
        return _Scrub(self, model, data, loss, seed)


class _Scrub(SgdProcess):
    def __init__(self, config, model, data, loss, seed):
        super().__init__(config, model, data, loss, seed)
        self.names = {id(p): n for n, p in reversed([*model.named_parameters()])}
        self.teacher: list[Tensor] = []
        retained = len(data.adjacent) + len(data.remote)
        self.max_steps = math.ceil(len(data.forget) / min(config.forget_batch, len(data.forget)))  # of an epoch
        self.min_steps = math.ceil(retained / min(config.batch, retained))

    @property
    def stages(self):
        c = self.config
        return [("scrub", c.max_epochs * self.max_steps + c.epochs * self.min_steps)]

    def enter(self, stage):
        self.teacher = [p.detach().clone() for p in self.params]

    def place(self, k: int) -> tuple[bool, int]:
        """(is it a max-step, number among those of its kind)."""
        epoch, j = divmod(k, self.max_steps + self.min_steps)
        if epoch >= self.config.max_epochs:
            return False, k - self.config.max_epochs * self.max_steps
        return (True, epoch * self.max_steps + j) if j < self.max_steps else (False, epoch * self.min_steps + j - self.max_steps)

    def objective(self, k, row):
        c = self.config
        forgetting, number = self.place(k)
        done = number if not forgetting else number // self.max_steps * self.min_steps
        row["epoch"] = (done + (not forgetting)) / self.min_steps
        if forgetting:
            return self.batch_losses(self.data.forget, number, c.forget_batch, row).mean()
        return self.retain_losses(number, c.batch, row).mean()

    def batch_losses(self, samples, k, size, row):
        c = self.config
        _, x, y = samples.batch(k, size)
        output = self.model(x)
        losses = self.checked(self.loss(output, y), len(y), samples.name)
        row[f"loss_{samples.name}"] = losses.detach().mean()
        away = self.distance(x, output)
        return -away if samples is self.data.forget else c.alpha * away + c.gamma * losses

    def distance(self, x: Tensor, output: Tensor) -> Tensor:
        """d of each sample, (n,)."""
        if output.dim() != 2:
            raise ValueError(f"model: gave an output of shape {tuple(output.shape)}; scrub needs class logits (n, C)")
        with torch.no_grad():
            kept = functional_call(self.model, {self.names[id(p)]: t for p, t in zip(self.params, self.teacher)}, (x,))
        t = self.config.temperature
        log_p, log_q = (kept / t).log_softmax(1), (output / t).log_softmax(1)
        return t * t * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)

    def state(self):
        return super().state() | {f"teacher.{i}": t for i, t in enumerate(self.teacher)}

    def load(self, state):
        super().load(state)
        self.teacher = [state[f"teacher.{i}"].to(p.device) for i, p in enumerate(self.params) if f"teacher.{i}" in state]
