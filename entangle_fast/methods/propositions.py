"""The paper's two propositions as measurements on a finished run (arXiv 2603.26569; methods.md §1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import ops, weights
from ..optim import lookahead


def first_order(process, eta: float = 0.02) -> dict:
    """Proposition 4.1 on one batch: a step of size η along −(∇L_adj − P_V ∇L_adj) changes L̃_f and L_rem by O(η²)
    and L_adj by −‖∇L_adj − P_V ∇L_adj‖² η + O(η²).

    The losses are measured at η and η/2, on fixed batches and with fixed W2 weights' reference; the parameters are
    back to the bit afterwards. An observed order near 2 is what the proposition says, near 1 would refute it;
    rounding hides changes below ~1e-7 of a loss.

    eta: the step relative to the parameters' own norm.
    """
    c, data = process.config, process.data
    batches = {
        "adjacent": data.adjacent.take(data.adjacent.rows(0, c.adjacent_batch2)),
        "remote": data.remote.take(data.remote.rows(0, c.remote_batch2)),
        "forget": data.forget.take(rows := data.forget.rows(0, c.forget_batch2)),
    }

    def objective(name: str) -> Tensor:
        x, y = batches[name]
        output = process.model(x)
        losses = process.loss(output, y)
        if name != "forget":
            return losses.double().mean()
        return _forget_objective(process, rows, losses, output)

    process.model.eval()
    grads = {name: process.gradient(objective(name)) for name in batches}
    gram = ops.step_gram([grads["forget"], grads["remote"], grads["adjacent"]])
    coef = weights.project_onto(gram[:2, :2], gram[:2, 2], ridge=c.ridge)
    direction = torch._foreach_sub(grads["adjacent"], [coef[0].to(g.dtype) * g for g in grads["forget"]])
    direction = torch._foreach_sub(direction, [coef[1].to(g.dtype) * g for g in grads["remote"]])
    square = float(sum(d.double().square().sum() for d in direction))
    size = float(sum(p.detach().double().square().sum() for p in process.params))
    if square == 0:
        return {"applies": False, "why": "∇L_adj lies in the span: no step is left to take"}
    step = eta * math.sqrt(size / square)
    with torch.no_grad():
        start = {name: float(objective(name)) for name in batches}
        change = {name: [] for name in batches}
        for h in (step, step / 2):
            with lookahead(process.params, direction, h):
                for name in batches:
                    change[name].append(float(objective(name)) - start[name])
    order = {name: math.log2(abs(one / half)) if half and one else None for name, (one, half) in change.items()}
    return {
        "applies": True, "step": step, "change_forget": change["forget"][1], "change_remote": change["remote"][1],
        "change_adjacent": change["adjacent"][1], "predicted_adjacent": -square * step / 2, "order_forget": order["forget"],
        "order_remote": order["remote"], "order_adjacent": order["adjacent"],
    }  # fmt: skip


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
