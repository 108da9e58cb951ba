"""The paper's two propositions as measurements on a finished run (arXiv 2603.26569; methods.md §1)."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from .. import ops, weights
from ..optim import lookahead
from .training import in_mode


def first_order(process, share: float = 0.01, limit: float = 1e-3) -> dict:
    """Proposition 4.1 on one batch: a step of size η along −(∇L_adj − P_V ∇L_adj) changes L̃_f and L_rem by O(η²)
    and L_adj by −‖∇L_adj − P_V ∇L_adj‖² η + O(η²).

    Measured at η and η/2 on a float64 copy of the model, so that rounding does not hide the small changes; the W2
    reference stays fixed. An observed order near 2 is what the proposition says, near 1 would refute it; at kinks
    (ReLU, max-pooling) and where both changes are below 1e-12 of the loss the order says nothing.

    share: η is such that L_adj is predicted to fall by this share.
    limit: most that the step may be long, relative to the parameters' own norm.
    """
    c, data = process.config, process.data
    rows = data.forget.rows(0, c.forget_batch2)
    model = copy.deepcopy(process.model).double()
    params = [p for p in model.parameters() if p.requires_grad]

    def batch(samples, rows):
        x, y = samples.take(rows)
        return (x.double() if x.is_floating_point() else x), y

    batches = {
        "forget": batch(data.forget, rows),
        "remote": batch(data.remote, data.remote.rows(0, c.remote_batch2)),
        "adjacent": batch(data.adjacent, data.adjacent.rows(0, c.adjacent_batch2)),
    }

    def objective(name: str) -> Tensor:
        x, y = batches[name]
        output = model(x)
        losses = process.loss(output, y).double()
        return _forget_objective(process, rows, losses, output) if name == "forget" else losses.mean()

    with in_mode(model, False):
        grads = []
        for name in batches:
            found = torch.autograd.grad(objective(name), params, allow_unused=True)
            grads.append([torch.zeros_like(p) if g is None else g for p, g in zip(params, found)])
        gram = ops.step_gram(grads)
        coef = weights.project_onto(gram[:2, :2], gram[:2, 2], ridge=c.ridge)
        direction = [a - coef[0] * f - coef[1] * r for f, r, a in zip(*grads)]
        square = float(sum(d.square().sum() for d in direction))
        if square <= 1e-20 * float(gram[2, 2]):
            return {"applies": False, "why": "∇L_adj lies in the span: no step is left to take"}
        size = float(sum(p.detach().square().sum() for p in params))
        with torch.no_grad():
            start = {name: float(objective(name)) for name in batches}
            step = min(share * start["adjacent"] / square, limit * math.sqrt(size / square))
            change = {name: [] for name in batches}
            for h in (step, step / 2):
                with lookahead(params, direction, h):
                    for name in batches:
                        change[name].append(float(objective(name)) - start[name])
    found = {"applies": True, "step": step, "predicted_adjacent": -square * step}
    for name, (one, half) in change.items():
        measurable = min(abs(one), abs(half)) > 1e-12 * abs(start[name])
        found[f"change_{name}"] = one
        found[f"order_{name}"] = math.log2(abs(one / half)) if measurable else None
    return found


def _forget_objective(process, rows, losses, output) -> Tensor:
    """L̃_f of a batch as a differentiable number."""
    c = process.config
    sign = 1.0 if c.forget_sign == "paper" else -1.0
    op = {"sorted": ops.w2_sorted, "moments": ops.w2_moments, "features": ops.w2_features}[c.w2]
    values = output if c.w2 == "features" else losses
    distance = op(values.double(), process.reference[rows.to(values.device)].double())[0]
    return sign * (1 - c.alpha) * losses.double().mean() + c.alpha * distance


def forget_bound(process, classes: int) -> dict:
    """Proposition 4.2: if every forget sample has ℓ_i(θ̄) ≥ m > log n and |L̃_f(θ) − L̃_f(θ̄)| < ε, the forget accuracy
    is at most ((1−α)/α + √(ε/α))² / (m − log n)², for n classes.

    Stage 1 does not guarantee m, so it is reported as measured on the forget training set: its minimum (the
    proposition's own) and quantiles, with the bound for each; a bound above 1 says nothing and is given as it is.
    """
    c = process.config
    before, after = process.bound["start"].double(), process.all_losses(process.data.forget).double()
    sign = 1.0 if c.forget_sign == "paper" else -1.0
    distance = float(weights.w2(after, before, "moments" if c.w2 == "moments" else "sorted")[0])
    epsilon = abs(sign * (1 - c.alpha) * float(after.mean() - before.mean()) + c.alpha * distance)
    log_n = math.log(classes)

    def bound(m: float):
        if c.alpha == 0 or m <= log_n:
            return None
        return ((1 - c.alpha) / c.alpha + math.sqrt(epsilon / c.alpha)) ** 2 / (m - log_n) ** 2

    ms = {"min": float(before.min()), **{f"q{int(100 * q):02d}": float(before.quantile(q)) for q in (0.01, 0.05, 0.25, 0.5)}}
    return {
        "classes": classes, "epsilon": epsilon, "log_n": log_n, "m": ms, "bound": {k: bound(m) for k, m in ms.items()},
        "holds_for_all_samples": ms["min"] > log_n,
    }
