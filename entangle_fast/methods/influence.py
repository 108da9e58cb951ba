"""IEU: degrade the forget set under weight decay and noise while the retain set repairs, so that relearning takes long.

Tran & Woo, "Efficient Unlearning through Maximizing Relearning Convergence Delay", arXiv 2604.09391 (methods.md §3).
[paper]: the four ingredients (degrade the forget set, decay the weights, put noise on them, keep the retain set). The paper's
formulas could not be had: the equations, the three forms and every default here are [ours].

    joint      θ ← (1 − ηω) θ − η ∇L_r + ηγ ∇L_f^clip + √η σ ξ,   ξ ~ N(0, 1)
    alternate  k times θ ← (1 − ηω) θ + ηγ ∇L_f^clip + √η σ ξ, then r times θ ← θ − η ∇L_r, and again
    one_shot   once θ ← shrink·θ + perturb·ξ (Ash & Adams, NeurIPS 2020), then θ ← θ − η ∇L_r + ηγ ∇L_f^clip

∇L_r − γ ∇L_f^clip is a reweighting, so both gradients are one forward and backward of both batches: no second backward, and no
second gradient to write and to read again in the update (which ops.step_update would take as a direction). Decay, gradient and
noise are one fused pass. ξ is a Philox stream numbered by the step: the same seed gives the same bits, resumed or not.

What the delay is made of [ours]: SGD on D_f from θ_u follows dL/dt ≈ −K·(1 − e^−L)², where K is the squared norm of the
forget samples' logit gradients; hence ≈ (L_f(θ_u) + 1/ε)/(ηK) steps to L_f ≤ ε. ``clip`` sets L_f(θ_u), but ascending further
also raises K; decay shrinks K, which goes with a power of the weights' norm, whereas accuracy only needs the order of the
logits. It is a guide, not a bound: one step of a large η can overshoot the whole way.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .. import weights
from ..optim import decay_noise_step
from .data import Data
from .process import Loss, Process, sample_cross_entropy, shorten
from .sgd import positive

FORMS = ("joint", "alternate", "one_shot")


@dataclass
class Influence:
    """Configuration; the forms and all defaults are [ours].

    Args:
        form: "joint", "alternate" or "one_shot", see above.
        epochs: passes over the retain set.  batch, forget_batch: retain and forget samples a step.
        lr: η.  schedule: "constant", or "linear": η falls to 0 over the run, and the noise, being √η σ, with it.
        omega: ω, decay a unit of η; needs lr·omega < 1.
        gamma: γ, weight of the forget set's ascent.  clip: its samples stop to count at this cross-entropy, in nats.
        sigma: σ, noise a unit of √η.
        noise: "relative": σ and perturb are in units of each tensor's rms at the start; "absolute": in the weights' own.
        on: what decays and gets noise: "all", or "weights", parameters of two or more dimensions, sparing biases and norms'
            scales. With frozen statistics a norm's scale feeds K as a weight does: K was 917 with "all" and 1735 with
            "weights" on the demo's model (seed 0, 2 epochs, lr .05, omega .1, gamma .03).
        eliminate, repair: k and r of the alternate form.  shrink, perturb: of the one-shot form.
        max_norm: bound on the norm of the step's gradient, inf for none.
    """

    name = "influence"
    form: Literal["joint", "alternate", "one_shot"] = "joint"
    epochs: float = 4.0
    batch: int = 256
    forget_batch: int = 64
    lr: float = 0.05
    schedule: Literal["constant", "linear"] = "linear"
    omega: float = 0.06
    gamma: float = 0.1
    clip: float = 10.0
    sigma: float = 0.01
    noise: Literal["relative", "absolute"] = "relative"
    on: Literal["weights", "all"] = "all"
    eliminate: int = 2
    repair: int = 8
    shrink: float = 0.6
    perturb: float = 0.1
    max_norm: float = math.inf

    def __post_init__(self):
        positive(self, "epochs", "lr", "batch", "forget_batch", "eliminate", "repair")
        for name in ("omega", "gamma", "sigma", "perturb"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name}: got {getattr(self, name)}; needs a finite number >= 0")
        for name in ("clip", "max_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}; needs a number > 0, or inf for none")
        if not 0 < self.shrink <= 1:
            raise ValueError(f"shrink: got {self.shrink}; needs a number in (0, 1]")
        if self.lr * self.omega >= 1:
            raise ValueError(f"omega: got {self.omega} with lr {self.lr}; needs lr·omega < 1, or a step turns the weights' signs")
        for name, known in (("form", FORMS), ("schedule", ("constant", "linear")), ("noise", ("relative", "absolute")),
                            ("on", ("weights", "all"))):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: got {getattr(self, name)!r}; needs one of {', '.join(map(repr, known))}")

    def start(self, model, data, loss, seed: int) -> InfluenceProcess:
        return InfluenceProcess(self, model, data, loss, seed)


class InfluenceProcess(Process):
    """scales: (p,) float64, the noise's unit for each parameter, 0 where there is none."""

    def __init__(self, config, model, data, loss, seed):
        super().__init__(config, model, data, loss, seed)
        self.decays = [config.on == "all" or p.dim() >= 2 for p in self.params]
        unit = [p.detach().double().square().mean().sqrt() if config.noise == "relative" else torch.ones(()) for p in self.params]
        self.share_noise(torch.stack([u.cpu() * d for u, d in zip(unit, self.decays)]).double())

    def share_noise(self, scales: Tensor) -> None:
        """Take ``scales`` as the noise's units: a resumed run takes its own start's, a coupled one its twin's."""
        self.scales = scales
        groups: dict[tuple, list[int]] = {}
        for i, key in enumerate(zip(self.decays, scales.tolist())):
            groups.setdefault(key, []).append(i)
        self.groups = [(decays, scale, members) for (decays, scale), members in groups.items()]

    # ---- where a step is ----

    @property
    def stages(self):
        c, retained = self.config, len(self.data.adjacent) + len(self.data.remote)
        steps = math.ceil(c.epochs * retained / min(c.batch, retained))
        if c.form == "alternate":
            steps = math.ceil(steps / c.repair) * (c.eliminate + c.repair)
        return [("shrink", 1), ("repair", steps)] if c.form == "one_shot" else [(c.form, steps)]

    def rate(self, k: int) -> float:
        """η of step k of the last stage."""
        c = self.config
        return c.lr * (1 - k / self.stages[-1][1]) if c.schedule == "linear" else c.lr

    def take_step(self, stage, k):
        c, row = self.config, {"epoch": 0.0}
        if stage == "shrink":
            self._update([torch.zeros_like(p) for p in self.params], lr=1.0, decay=1 - c.shrink, noise=c.perturb)
            return row
        forget = retain = k
        eliminates = repairs = True
        if stage == "alternate":
            cycle, at = divmod(k, c.eliminate + c.repair)
            eliminates, repairs = at < c.eliminate, at >= c.eliminate
            forget, retain = cycle * c.eliminate + at, cycle * c.repair + max(0, at - c.eliminate)
        grads = self._gradient(forget if eliminates else None, retain if repairs else None, row)
        lr, drifts = self.rate(k), eliminates and stage != "repair"
        self._update(grads, lr=lr, decay=c.omega * drifts, noise=math.sqrt(lr) * c.sigma * drifts)
        row["epoch"] = (retain + repairs) * c.batch / (len(self.data.adjacent) + len(self.data.remote))
        return row

    # ---- what it does ----

    def _gradient(self, forget: int | None, retain: int | None, row: dict) -> list[Tensor]:
        """∇(L_r − γ L_f^clip) on the batches of those numbers, None leaving a term out: one forward and backward."""
        c, d = self.config, self.data
        parts = [] if forget is None else [(d.forget, forget, c.forget_batch)]
        if retain is not None:
            parts += [(samples, retain, size) for samples, size in d.retain_sizes(c.batch)]
        drawn = [samples.batch(number, size) for samples, number, size in parts]
        x, y = (torch.cat([b[i] for b in drawn]) for i in (1, 2))
        losses, sizes = self.loss(self.model(x), y), [len(b[2]) for b in drawn]
        retained, w = sum(n for n, (s, _, _) in zip(sizes, parts) if s is not d.forget), []
        for (samples, _, _), part in zip(parts, losses.detach().split(sizes)):
            row[f"loss_{samples.name}"] = self.checked(part, len(part), samples.name).mean()
            w.append(-c.gamma * weights.clipped(part, c.clip) if samples is d.forget else torch.full_like(part, 1 / retained))
        grads = self.gradient((torch.cat(w) * losses).sum())
        self.settle()
        if math.isfinite(c.max_norm):
            shorten(grads, c.max_norm)
        return grads

    def _update(self, grads, *, lr: float, decay: float, noise: float) -> None:
        """One pass over each group of parameters that share a noise scale; every group of every step has its own stream."""
        first = self.done * len(self.groups)
        for j, (decays, scale, members) in enumerate(self.groups):
            decay_noise_step([self.params[i] for i in members], [grads[i] for i in members], lr=lr, weight_decay=decay * decays,
                             noise=noise * scale, seed=self.seed, offset=first + j)  # fmt: skip

    def state(self):
        return {"scales": self.scales}

    def load(self, state):
        self.share_noise(state["scales"].cpu())


def contraction(config: Influence, model, other, data: Data, loss: Loss = sample_cross_entropy, seed: int = 0,
                steps: int | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Two runs coupled by the same batches and the same noise: how fast does it matter less where they started?

    Args:
        model, other: two models of one architecture, left as they are; ``model`` sets the noise's units for both.
        steps: how many; default the whole run.

    Returns: distances ‖θ_t − θ'_t‖ over the trainable parameters and the bound Π_s (1 − η_s ω) ‖θ_0 − θ'_0‖, each (steps + 1,)
    float64. With on="all" the bound is met exactly where the losses' gradients vanish, and is an upper bound where
    L_r − γ L_f^clip is convex and β-smooth with η ≤ 2/(β + 2ω) [ours]; otherwise it is what to compare with.

    Raises: ValueError for models that differ in their trainable parameters' shapes.
    """
    runs = [config.start(copy.deepcopy(m), data, loss, seed) for m in (model, other)]
    shapes = [[tuple(p.shape) for p in run.params] for run in runs]
    if shapes[0] != shapes[1]:
        raise ValueError(f"other: trainable parameters of shapes {shapes[1]}, model's are {shapes[0]}; need one architecture")
    runs[1].share_noise(runs[0].scales)
    distances, bound = [_distance(*runs)], [1.0]
    for _ in range(runs[0].total if steps is None else min(steps, runs[0].total)):
        stage, k = runs[0].where()
        bound.append(bound[-1] * _factor(config, runs[0], stage, k))
        for run in runs:
            run.step()
        distances.append(_distance(*runs))
    return torch.stack(distances), torch.tensor(bound, dtype=torch.float64) * distances[0]


def _factor(config, run, stage: str, k: int) -> float:
    if stage == "shrink":
        return config.shrink
    decays = stage == "joint" or stage == "alternate" and k % (config.eliminate + config.repair) < config.eliminate
    return 1 - run.rate(k) * config.omega * decays


def _distance(a: Process, b: Process) -> Tensor:
    gaps = [(p.detach().double() - q.detach().double()).norm().cpu() for p, q in zip(a.params, b.params)]
    return torch.stack(gaps).norm()
