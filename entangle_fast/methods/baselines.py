"""Baselines: fine-tuning, with and without an ℓ1 penalty, gradient ascent, NegGrad+, random labels, and retraining (the gold standard).

Each takes plain SGD or Adam steps on minibatches, all in one forward and backward of Σ w_i ℓ_i.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .. import weights
from .process import Process
from .sgd import SgdOptions, SgdProcess, positive
from .training import fit, sent


@dataclass
class FineTune(SgdOptions):
    """Descend on the retain set alone, adjacent and remote, for ``epochs`` passes."""

    name = "finetune"
    epochs: float = 2.0
    max_norm: float = 0.0

    def start(self, model, data, loss, seed):
        return _FineTune(self, model, data, loss, seed)


class _FineTune(SgdProcess):
    @property
    def stages(self):
        n = len(self.data.adjacent) + len(self.data.remote)
        return [(self.config.name, math.ceil(self.config.epochs * n / self.config.batch))]

    def objective(self, k, row):
        return self.retain_losses(k, self.config.batch, row).mean()


@dataclass
class L1Sparse(FineTune):
    """ℓ1-sparse unlearning (Jia et al., "Model Sparsity Can Simplify Machine Unlearning", NeurIPS 2023, arXiv 2304.04934):
    descend on L_r + γ_k ‖θ‖₁ over all trainable parameters, without looking at the forget set.

    γ_k = gamma·(1 − k/steps): falling linearly is the paper's best schedule [paper]; by step rather than by epoch [ours].
    Pruning before fine-tuning, the paper's other way to sparsity, is not here.
    """

    name = "l1_sparse"
    gamma: float = 5e-4

    def __post_init__(self):
        positive(self, "epochs", "lr", "batch", "gamma")

    def start(self, model, data, loss, seed):
        return _L1Sparse(self, model, data, loss, seed)


class _L1Sparse(_FineTune):
    @torch.no_grad()
    def _penalty(self, k):
        return torch._foreach_mul(torch._foreach_sign(self.params), self.config.gamma * (1 - k / self.total))

    def direction(self, k, row):
        return torch._foreach_add(super().direction(k, row), self._penalty(k))


@dataclass
class GradientAscent(SgdOptions):
    """Ascend on the forget set alone, the gradient clipped, until ``stop_at`` of its training samples are right."""

    name = "gradient_ascent"
    epochs: float = 20.0
    lr: float = 5e-3
    momentum: float = 0.0
    stop_at: float | None = 0.06

    def start(self, model, data, loss, seed):
        return _Ascent(self, model, data, loss, seed)


class _Ascent(SgdProcess):
    def objective(self, k, row):
        return -self.batch_losses(self.data.forget, k, self.config.batch, row).mean()


@dataclass
class NegGradPlus(SgdOptions):
    """NegGrad+ (Kurmanji et al., NeurIPS 2023): β L_r − (1−β) L_f, the forget loss clipped as in stage 1."""

    name = "neggrad"
    beta: float = 0.7
    clip: float = 3.0
    retain_batch: int = 256

    def __post_init__(self):
        positive(self, "epochs", "lr", "batch", "retain_batch")

    def start(self, model, data, loss, seed):
        return _NegGrad(self, model, data, loss, seed)


class _NegGrad(SgdProcess):
    def objective(self, k, row):
        c = self.config
        retain = self.retain_losses(k, c.retain_batch, row)
        forget = self.batch_losses(self.data.forget, k, c.batch, row)
        return c.beta * retain.mean() - (1 - c.beta) * (weights.clipped(forget, c.clip) * forget).sum()


@dataclass
class RandomLabels(SgdOptions):
    """Random labels (Golatkar et al., CVPR 2020): descend on the retain set and on the forget set with wrong labels.

    Wrong labels are drawn among the other classes, once for each sample, from the seed.
    """

    name = "random_label"
    lr: float = 5e-3
    retain_batch: int = 256

    def __post_init__(self):
        positive(self, "epochs", "lr", "batch", "retain_batch")

    def start(self, model, data, loss, seed):
        return _RandomLabels(self, model, data, loss, seed)


class _RandomLabels(SgdProcess):
    def objective(self, k, row):
        c, forget = self.config, self.data.forget
        retain = self.retain_losses(k, c.retain_batch, row)
        rows, x, y = forget.batch(k, c.batch)
        output = self.model(x)
        classes = output.shape[1]
        if not hasattr(self, "shift"):
            self.shift = torch.randint(1, classes, (len(forget),), generator=torch.Generator().manual_seed(self.seed))
        wrong = (y + sent(self.shift[rows], y.device)) % classes
        losses = self.checked(self.loss(output, wrong), len(y), "forget")
        row["loss_forget"] = losses.detach().mean()
        self.note_right(output, y)
        return retain.mean() + losses.mean()


@dataclass
class Retrain:
    """Train anew on the retain set only: what forgetting would be if training were free (the gold standard).

    Every module is reset by its own ``reset_parameters``; a model with parameters of its own that have none is refused.
    """

    name = "retrain"
    epochs: int = 3
    lr: float = 3e-3
    batch: int = 128
    weight_decay: float = 0.0

    def __post_init__(self):
        positive(self, "epochs", "lr", "batch")

    def start(self, model, data, loss, seed):
        return _Retrain(self, model, data, loss, seed)


class _Retrain(Process):
    @property
    def stages(self):
        return [("retrain", 1)]

    def take_step(self, stage, k):
        sets = [s.take(torch.arange(len(s))) for s in self.data.retain]
        x, y = (torch.cat([s[i] for s in sets]) for i in (0, 1))
        c = self.config
        before = {k: v.clone() for k, v in self.model.state_dict().items()}
        try:
            reset(self.model, self.seed)
            history = self._fit(x, y, c)
        except BaseException:  # a training that fails or is stopped gives the trained model back
            self.model.load_state_dict(before)
            raise
        return {"epoch": c.epochs, "loss_remote": history[-1]}

    def _fit(self, x, y, c):
        return fit(
            self.model, x, y, epochs=c.epochs, lr=c.lr, batch_size=c.batch, seed=self.seed, weight_decay=c.weight_decay,
            augment=self.data.remote.augment,
        )  # fmt: skip


def reset(model: torch.nn.Module, seed: int) -> None:
    """Fresh parameters for every module, from the seed."""
    for name, module in model.named_modules():
        own = [n for n, _ in module.named_parameters(recurse=False)]
        if own and not hasattr(module, "reset_parameters"):
            raise ValueError(f"model: module {name!r} ({type(module).__name__}) has parameters {own} but no reset_parameters; "
                             "give it one, or retrain outside")  # fmt: skip
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
