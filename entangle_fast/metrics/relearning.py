"""How long an unlearned model takes to relearn what it forgot: the relearning convergence delay (RCD).

The idea, a delay that sees the weights and the predictions, is Tran & Woo's (arXiv 2604.09391); their formulas could not
be had, so every one here is [ours] (methods.md §3):

    RCD(θ_u; ε) = first step t of an attacker that starts at θ_u with L_f(θ_t) ≤ L_f(θ0) + ε;  ∞, shown as ">T", if none
    weight part      ‖θ_u − θ0‖  and  Σ_{t=1..T} ‖θ_t − θ_u‖
    prediction part  L_f(θ_u) − L_f(θ0)
    estimate         log((L_f(θ_u) − L_f(θ0)) / ε) / (η μ̂),  μ̂ = ‖∇L_f(θ_u)‖² / (2 (L_f(θ_u) − L_f(θ0)))

L_f is the mean cross-entropy over (a fixed part of) the forget set, θ0 the model before unlearning.

Everything runs in eval mode: BatchNorm statistics stay the unlearned model's, dropout is off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ..methods.data import Samples, SampleSet
from ..methods.training import batch_order, in_mode
from ..ops import check
from ..progress import shown
from .accuracy import accuracy
from .losses import sample_losses
from .relearning_attackers import LEARNING_RATES, ROWS, attack
from .relearning_checks import check_options, checked_sets, positive

RECIPE = ("attacker", "lr", "momentum", "batch", "share", "shots", "tolerance")  # what must agree for delays to be compared


@dataclass
class Relearning:
    """What one attacker found, over seeds. Tensors are float64 on the CPU unless said otherwise; losses in nats.

    Attributes:
        attacker, lr, momentum, batch, share, shots, tolerance: what was run.  seeds: the seeds.
        batched: "vmap" or "loop", how the seeds were run.
        steps: (evals,) int64, the steps at which the curves were measured; the first is 0, the last the number of steps T.
        curve: (seeds, evals) L_f(θ_t).  accuracy: (seeds, evals) on the same samples, in %.
        test_curve: (seeds, evals) the loss on ``test``, or None.
        original_loss, original_accuracy: L_f(θ0) and the accuracy there, in %.
        delays: (seeds,) RCD; inf where T steps did not suffice. Measured at ``steps`` only: with eval_every = k it may
            be up to k − 1 late.
        area: (seeds,) ∫_0^T max(0, L_f(θ_t) − L_f(θ0)) dt by trapezoids, in nats · steps.
        weight_gap: ‖θ_u − θ0‖ over all parameters.
        weight_path: (seeds,) Σ_{t=1..T} ‖θ_t − θ_u‖ over the parameters that the attacker moves.
        prediction_gap: L_f(θ_u) − L_f(θ0).
        mu: μ̂, the local Polyak–Łojasiewicz constant at θ_u with L_f(θ0) as the minimum; NaN without a positive gap.
        estimate: the closed form, in steps, for attacker "sgd" with η = lr / (1 − momentum); NaN for the others, 0 when
            the gap is at most ``tolerance``. It bounds the delay of full-batch gradient descent from above where μ̂ holds
            along the whole path and η is at most 1 / smoothness; μ̂ is taken at one point, so it is a guess, not a bound:
            with the defaults, on three of the demo's models, it was 0.5, 2.1 and 2.4 times the delay measured.
    """

    attacker: str
    lr: float
    momentum: float
    batch: int
    share: float
    shots: int
    tolerance: float
    seeds: tuple[int, ...]
    batched: str
    steps: Tensor = field(repr=False)
    curve: Tensor = field(repr=False)
    accuracy: Tensor = field(repr=False)
    test_curve: Tensor | None = field(repr=False)
    original_loss: float
    original_accuracy: float
    weight_gap: float
    weight_path: Tensor = field(repr=False)
    mu: float
    delays: Tensor = field(init=False, repr=False)
    area: Tensor = field(init=False, repr=False)
    prediction_gap: float = field(init=False)
    estimate: float = field(init=False)

    def __post_init__(self):
        excess = self.curve - self.original_loss
        self.delays = _first(self.steps, excess <= self.tolerance)
        self.area = torch.trapezoid(excess.clamp(min=0), self.steps.double(), dim=1)
        self.prediction_gap = excess[0, 0].item()
        self.estimate = math.nan
        if self.attacker == "sgd":
            gap = self.prediction_gap / self.tolerance
            self.estimate = 0.0 if gap <= 1 else math.log(gap) * (1 - self.momentum) / (self.lr * self.mu)

    @property
    def median(self) -> float:
        """Median delay over the seeds; inf when half of them or more did not recover."""
        return float(np.median(self.delays.numpy()))

    def at(self, tolerance: float) -> Relearning:
        """The same measurement read at another tolerance (nats)."""
        positive("tolerance", tolerance)
        given = {name: getattr(self, name) for name, f in self.__dataclass_fields__.items() if f.init}
        return Relearning(**{**given, "tolerance": tolerance})

    def summary(self) -> dict:
        """Plain numbers, strings and lists, for JSON: the delays' spread, both parts, the estimate and the curve's quartiles.

        A delay that is inf stays inf here (storage.save_json writes null): read null as "> T", T = "steps".
        """
        q25, q75 = np.quantile(self.delays.numpy(), (0.25, 0.75), method="nearest")
        low, middle, high = np.quantile(self.curve.numpy(), (0.25, 0.5, 0.75), axis=0)
        return {
            **{name: getattr(self, name) for name in RECIPE}, "seeds": len(self.seeds), "steps": int(self.steps[-1]),
            "batched": self.batched, "median": self.median, "q25": float(q25), "q75": float(q75),
            "delays": self.delays.tolist(), "not_recovered": int(self.delays.isinf().sum()),
            "estimate": self.estimate, "mu": self.mu, "area": self.area.mean().item(), "weight_gap": self.weight_gap,
            "weight_path": self.weight_path.mean().item(), "prediction_gap": self.prediction_gap,
            "original_loss": self.original_loss, "original_accuracy": self.original_accuracy,
            "curve": {"steps": self.steps.tolist(), "low": low.tolist(), "median": middle.tolist(), "high": high.tolist()},
        }  # fmt: skip

    def __str__(self) -> str:
        """As in "sgd: 34 steps (29-41, 10 seeds)", or "sgd: > 200 steps (...)"."""
        last = int(self.steps[-1])
        s = self.summary()
        middle, low, high = (f"> {last}" if math.isinf(s[k]) else f"{s[k]:g}" for k in ("median", "q25", "q75"))
        return f"{self.attacker}: {middle} steps ({low} to {high}, {len(self.seeds)} seeds)"


@check.kinds
def relearn(
    model: nn.Module, original: nn.Module, forget: Samples, *, test: Samples | None = None, retain: Samples | None = None,
    attacker: str = "sgd",
    share: float = 1.0, lr: float | None = None, momentum: float = 0.0, batch: int = 64, steps: int = 200,
    seeds: int | Sequence[int] = 10, tolerance: float = 0.05, eval_every: int = 1, eval_samples: int | None = 256,
    shots: int = 5, head: str | None = None, batched: str = "auto", progress: bool = True,
) -> Relearning:  # fmt: skip
    """Attack an unlearned classifier and measure how many steps bring its forgotten samples back ([ours], methods.md §3).

    Args:
        model: the unlearned model θ_u.  original: θ0, of the same parameters. Both are left as found.
        forget: (x, y) tensors, x (n, ...), y (n,) int64, or a map-style Dataset of such pairs, of which each step reads its batches.
            The loss is the mean cross-entropy of the logits (n, classes).
        test: held-out forget samples, given likewise; their loss goes into test_curve.
        retain: retain samples, given likewise; needed by attacker "retain" only.
        attacker: each trains the parameters that require a gradient, from θ_u:
            "sgd", "adam": on forget samples.
            "retain": SGD on retain samples alone (the setting of arXiv 2505.22310).
            "prototype": no training: each step adds lr · ‖w_c‖ p_c / ‖p_c‖ to the classifier head's row of each forget
                class c, p_c the mean feature of ``shots`` samples (after the idea of arXiv 2506.01318).
        share: of the attacker's samples, drawn for each seed, in (0, 1]; not used by "prototype".
        lr: default 2e-4 for "sgd", 1e-4 for "adam", 1e-3 for "retain", 0.02 (of a row's norm) for "prototype": tens of steps
            on most of the demo's models, where SGD at 0.01 undoes any of them in one or two.
        momentum: of "sgd" and "retain", in [0, 1).  batch: samples a step.  steps: T, all of them are taken.
        seeds: how many (0, 1, …), or which; a seed fixes the subset and the order of the batches.
        tolerance: ε, nats.
        eval_every: steps between measurements of the curve.
        eval_samples: L_f is taken on this many forget samples at most, the same for every seed and model (of a Dataset they are read
            once and held); None: on all (a Dataset is read anew each time).
        head: the name of the classifier's nn.Linear for "prototype"; default: the last one registered.
        batched: "vmap" runs all seeds in one vmapped call, "loop" one after the other, the same to rounding; "auto"
            takes vmap unless the model has a convolution and is on the CPU (there the vmapped form is slower), or
            cannot be vmapped.
        progress: show a progress bar.

    Returns: a Relearning.

    Raises:
        ValueError: arguments out of range, sets that do not fit the model, an original of other parameters.
        FloatingPointError: a loss is not finite. An attack that diverges says nothing about the model, so it is never
            counted as "not recovered": lower lr.

    >>> import torch, entangle_fast as ef
    >>> x, y, model = torch.randn(20, 4), torch.arange(20) % 2, torch.nn.Linear(4, 2)
    >>> ef.metrics.relearn(model, model, (x, y), steps=3, seeds=2, progress=False).delays  # nothing was unlearned
    tensor([0., 0.], dtype=torch.float64)
    """
    seeds = tuple(range(seeds)) if check.whole(seeds) else tuple(seeds)
    lr = LEARNING_RATES.get(attacker) if lr is None else lr
    recipe = dict(attacker=attacker, lr=lr, momentum=momentum, batch=batch, share=share, shots=shots, tolerance=tolerance)
    check_options(seeds=seeds, steps=steps, eval_every=eval_every, eval_samples=eval_samples, batched=batched, **recipe)
    given = checked_sets(model, forget=forget, test=test, retain=retain)
    if attacker == "retain" and retain is None:
        raise ValueError("retain: got None; attacker 'retain' needs retain samples")
    gap = _weight_gap(model, original)

    measured = _some(given["forget"], eval_samples)
    held_out = _some(given["test"], eval_samples) if "test" in given else None
    original_loss = _finite(sample_losses(original, measured, ROWS).double().mean().item(), "the original model's loss on forget")
    rows = []
    with in_mode(model, False), shown(progress, f"relearning, {attacker}", steps) as advance:
        mu = _pl_constant(model, measured, original_loss)
        attackers, step = attack(model, given["retain" if attacker == "retain" else "forget"], seeds, batched, head, recipe)
        weight_path = torch.zeros(len(seeds), dtype=torch.float64)
        for t in range(steps + 1):
            if t:
                _all_finite(step(t - 1), seeds, t, attacker, lr, "batch")
                weight_path += attackers.distances()
            if t % eval_every == 0 or t == steps:
                loss, right = attackers.evaluate(measured)
                _all_finite(loss, seeds, t, attacker, lr, "forget set")
                rows.append((t, loss, right, attackers.evaluate(held_out)[0] if held_out else None))
            advance(t, "")
    at, curve, right, test_curve = zip(*rows)
    return Relearning(
        **recipe, seeds=seeds, batched="vmap" if attackers.vmapped else "loop", steps=torch.tensor(at),
        curve=torch.stack(curve, 1), accuracy=torch.stack(right, 1),
        test_curve=torch.stack(test_curve, 1) if held_out else None, original_loss=original_loss,
        original_accuracy=accuracy(original, measured, ROWS), weight_gap=gap, weight_path=weight_path, mu=mu,
    )  # fmt: skip


@check.kinds
def anamnesis(unlearned: Relearning, retrained: Relearning, tau: float = 0.05, by: str = "accuracy") -> float:
    """Anamnesis Index (Chundawat et al., arXiv 2201.05629): relearning steps of the unlearned over those of a retrained model.

    by: "accuracy", steps until the forget accuracy is at least (1 − tau) of the original's, as the index is defined
    (that "within tau" is relative, and the medians over seeds, are [ours]); "loss", the RCD (tau is not used).
    Near 1: as forgotten as if never seen. Below 1: it comes back sooner. inf: only the retrained model recovered, or it
    had nothing to relearn (0 steps). 0: only the unlearned one recovered, or at once. NaN: both 0, or neither recovered.

    Raises ValueError for attackers, steps or originals that differ, tau not in (0, 1).
    """
    if by not in ("accuracy", "loss") or not 0 < tau < 1:
        raise ValueError(f"by, tau: got {by!r}, {tau}; needs 'accuracy' or 'loss', and a share in (0, 1)")
    for name in (*RECIPE, "original_loss", "original_accuracy"):
        if getattr(unlearned, name) != getattr(retrained, name):
            raise ValueError(f"{name}: got {getattr(unlearned, name)} for the unlearned and {getattr(retrained, name)} for the "
                             "retrained model; needs one: attack both in the same way, with the same original")  # fmt: skip
    if not torch.equal(unlearned.steps, retrained.steps):
        raise ValueError("steps: the two were measured at different steps; give both the same steps and eval_every")
    if by == "loss":
        a, b = unlearned.median, retrained.median
    else:
        a, b = (float(np.median(_first(r.steps, r.accuracy >= (1 - tau) * r.original_accuracy).numpy())) for r in (unlearned, retrained))
    if a == b and (a == 0 or math.isinf(a)):
        return math.nan
    return a / b if b else math.inf


def _pl_constant(model: nn.Module, samples: SampleSet, least: float) -> float:
    """‖∇L‖² / (2 (L − least)) of the mean loss L of a set, by the parameters that require a gradient; NaN when L ≤ least."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = 0.0
    gradient = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    for _, xs, ys in samples.chunks(ROWS):
        loss = nn.functional.cross_entropy(model(xs), ys, reduction="sum") / len(samples)
        found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        gradient = [a + g.double() for a, g in zip(gradient, found)]
        total += loss.item()
    gap = _finite(total, "the unlearned model's loss on forget") - least
    return sum(g.square().sum().item() for g in gradient) / (2 * gap) if gap > 0 else math.nan


def _weight_gap(model: nn.Module, original: nn.Module) -> float:
    """‖θ_u − θ0‖ over all parameters. Raises ValueError when they are not the same parameters."""
    mine, theirs = dict(model.named_parameters()), dict(original.named_parameters())
    odd = sorted(n for n in mine.keys() | theirs.keys() if n not in mine or n not in theirs or mine[n].shape != theirs[n].shape)
    if odd:
        raise ValueError(f"original: parameter {odd[0]!r} is not in both models with one shape; give the model before unlearning")
    if not any(p.requires_grad for p in mine.values()):
        raise ValueError("model: no parameter requires a gradient, so there is nothing to relearn; call requires_grad_(True)")
    return math.sqrt(sum((p.detach().double().cpu() - theirs[n].detach().double().cpu()).square().sum().item() for n, p in mine.items()))


def _first(steps: Tensor, reached: Tensor) -> Tensor:
    """Of each row of reached (seeds, evals) bool the first step at which it is true; inf if none."""
    at = steps.double().expand(reached.shape).masked_fill(~reached, math.inf)
    return at.amin(1)


def _some(samples: SampleSet, most: int | None) -> SampleSet:
    """At most so many samples, the same at every call; those of a Dataset are read here, once."""
    if most is None or (samples.tensors and len(samples) <= most):
        return samples
    rows = batch_order(len(samples), 0, 0)[:most].sort().values
    return SampleSet(samples.name, samples.take(rows), samples.device)


def _finite(value: float, what: str) -> float:
    if not math.isfinite(value):
        raise FloatingPointError(f"{what} is {value}; look for non-finite weights or inputs")
    return value


def _all_finite(losses: Tensor, seeds, t: int, attacker: str, lr: float, where: str) -> None:
    bad = ~torch.isfinite(losses)
    if bad.any():
        i = int(bad.nonzero()[0])
        raise FloatingPointError(f"attacker {attacker!r}, seed {seeds[i]}: the loss on the {where} is {losses[i].item()} at step {t} "
                                 f"(lr {lr}); an attack that diverges measures nothing: lower lr")  # fmt: skip
