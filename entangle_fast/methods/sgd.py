"""What methods that take plain SGD steps on minibatches share: options, an early end, retain batches, checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .process import Process


def positive(config, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}: got {value}; needs a finite number > 0")


@dataclass
class SgdOptions:
    """What the SGD baselines share: ``epochs`` passes over the forget set in batches of ``batch``, the gradient's norm at
    most ``max_norm`` (0: unbounded), an early end once at most ``stop_at`` of the last forget samples are right."""

    epochs: float = 6.0
    lr: float = 1e-2
    momentum: float = 0.9
    batch: int = 128
    max_norm: float = 1.0
    stop_at: float | None = None

    def __post_init__(self):
        positive(self, "epochs", "lr", "batch")


class SgdProcess(Process):
    """SGD with momentum and gradient clipping over a number of passes; may stop once the forget set is forgotten."""

    def __init__(self, config, model, data, loss, seed):
        super().__init__(config, model, data, loss, seed)
        self.sgd = torch.optim.SGD(self.params, lr=config.lr, momentum=config.momentum, foreach=True)
        self.recent = torch.ones(2, device=self.params[0].device)  # forget accuracy of the last minibatches
        self._right: list[Tensor] = []  # that of this step's
        self._few = False  # are so few right that the run shall end

    @property
    def stages(self):
        samples, size = self.paced_by()
        return [(self.config.name, math.ceil(self.config.epochs * len(samples) / min(size, len(samples))))]

    def paced_by(self):
        return self.data.forget, self.config.batch

    def objective(self, k: int, row: dict) -> Tensor:
        """The scalar to descend in step k."""
        raise NotImplementedError

    def direction(self, k: int, row: dict) -> list[Tensor]:
        """What step k descends along, tensors like the parameters; the objective's gradient unless a method has its own.

        It changes nothing: what it noted is read before the step is taken."""
        return self.gradient(self.objective(k, row))

    def take_step(self, stage, k):
        row: dict = {}
        self._right.clear()
        try:
            found = self.direction(k, row)
        except Exception:  # an interrupt passes: who takes the step anew would swallow it
            self.settle()  # what is not finite may also be why it raised
            raise
        self.settle()
        for p, g in zip(self.params, found):
            p.grad = g
        if self.config.max_norm:
            torch.nn.utils.clip_grad_norm_(self.params, self.config.max_norm, foreach=True)
        self.sgd.step()
        self.sgd.zero_grad(set_to_none=True)
        self.recent, self.stopped = self._latest(), self._few
        samples, size = self.paced_by()
        return {"epoch": (k + 1) * size / len(samples), **row}

    def batch_losses(self, samples, k, size, row) -> Tensor:
        _, x, y = samples.batch(k, size)
        output = self.model(x)
        losses = self.checked(self.loss(output, y), len(y), samples.name)
        row[f"loss_{samples.name}"] = losses.detach().mean()
        if samples is self.data.forget:
            self.note_right(output, y)
        return losses

    def note_right(self, output: Tensor, y: Tensor) -> None:
        """The accuracy of a forget minibatch, where the output is class logits; it counts once the step is taken."""
        if output.dim() == 2:
            self._right.append((output.argmax(1) == y).float().mean())
            if (limit := self.config.stop_at) is not None:
                self.ask(self._latest().mean() <= limit, self._end)

    def _latest(self) -> Tensor:
        return torch.stack([*self.recent, *self._right])[-2:]

    def _end(self, few: bool) -> None:
        self._few = few

    def retain_losses(self, k, size, row) -> Tensor:
        """A batch of adjacent and remote samples in proportion to the sets' sizes."""
        return torch.cat([self.batch_losses(s, k, b, row) for s, b in self.data.retain_sizes(size)])

    def state(self):
        out = {"recent": self.recent}
        for i, p in enumerate(self.params):
            buffer = self.sgd.state.get(p, {}).get("momentum_buffer")
            if buffer is not None:
                out[f"momentum.{i}"] = buffer
        return out

    def load(self, state):
        self.recent = state["recent"].to(self.params[0].device)
        for i, p in enumerate(self.params):
            if f"momentum.{i}" in state:
                self.sgd.state[p]["momentum_buffer"] = state[f"momentum.{i}"].to(p.device)
