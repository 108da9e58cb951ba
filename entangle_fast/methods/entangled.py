"""Unlearning under retain–forget entanglement: an augmented Lagrangian, then W2-guided projected gradients.

Cheng, Liu, Li, Zhang, "Machine Unlearning under Retain-Forget Entanglement", ICLR 2026, arXiv 2603.26569
(methods.md §1). Formulas marked [code] follow the authors' released code, [paper] the paper's own statement.

Both stages are reweightings. Stage 1 is one backward of Σ w_i ℓ_i over the forget and the remote batch. Stage 2 needs
three weighted gradients a step (forget, remote, adjacent), whose weights depend on the losses alone and are therefore
known before the backward: it costs what a plain forward and backward of the same samples costs, and one fused pass
over the parameters for momentum, projection and update.

Choosing α: 0 leaves the forget set free to recover while the adjacent loss falls (data.md: 39 % against 5 %); 0.5 is
the authors' value; near 1 holds the distribution of forget losses harder and lets the adjacent loss fall more slowly.
When to stop: while the adjacent accuracy still rises and the forget accuracy stays below its target; smaller steps for
longer move the whole frontier outwards, so spend time on a smaller ``lr2`` before a larger α. ``removed`` near 1 in
history.csv says that the adjacent gradient lies in the span: more steps will not help.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .. import ops, weights
from ..capture import capture
from ..optim import ProjectedMomentum
from .process import Process, shorten
from .propositions import first_order, forget_bound
from .training import in_mode, refuse_zero_eps, sent


@dataclass
class Entangled:
    """Configuration; defaults are the authors' CIFAR-100 setting where it has one (methods.md §1, [code]).

    Args:
        alpha: weight of W2 in L̃_f = (1−α) L_f + α W2², in [0, 1].
        forget_sign: "paper" uses +L_f; "code" uses −L_f as the authors' code does: not the same span for 0 < α < 1.
        w2: "sorted" (the paper's), "moments" (Gaussian) or "features" (Bures, on the model's outputs).
        w2_set: "batch" ranks within the minibatch (the authors'); "whole" within the whole forget set, using each
            sample's latest loss, so that small batches do not bias it.
        away_from: "means", the span of the two mean gradients (the paper's); "samples", of every per-sample gradient
            of the step's forget and remote samples; "forget_samples", of every forget sample's and the remote mean [ours].
        project: "momentum" projects the buffer and keeps it projected (the authors'); "gradient" the gradient only.
        ridge: added to the Gram; the authors add 1e-8 once per parameter tensor.
        epochs1, lr1: stage 1, Adam, in passes over the remote set.  mu, gamma, clip, penalty: see weights.lagrangian.
        epochs2, lr2, momentum: stage 2, SGD, in passes over the adjacent set.
        max_norm2: the adjacent gradient is scaled down to this norm [ours]: after stage 1 it is huge, and what a step
            undoes of the forgetting grows with the square of its length.
        schedule2: "constant" (the authors'), or "linear": lr2 falls to 0 over stage 2 [ours].
        *_batch1, *_batch2: samples a step; stage 2 sums up to batch_limit minibatches of forget and remote.
    """

    name = "entangled"
    alpha: float = 0.5
    forget_sign: Literal["paper", "code"] = "paper"
    w2: Literal["sorted", "moments", "features"] = "sorted"
    w2_set: Literal["batch", "whole"] = "batch"
    away_from: Literal["means", "samples", "forget_samples"] = "means"
    project: Literal["momentum", "gradient"] = "momentum"
    ridge: float = 0.0
    epochs1: float = 1.0
    lr1: float = 1e-4
    mu: float = 10.0
    gamma: float = 1.0
    clip: float = 10.0
    penalty: float = 0.0
    remote_batch1: int = 128
    forget_batch1: int = 16
    epochs2: float = 2.0
    lr2: float = 1e-3
    momentum: float = 0.9
    max_norm2: float = math.inf
    schedule2: Literal["constant", "linear"] = "constant"
    adjacent_batch2: int = 128
    forget_batch2: int = 128
    remote_batch2: int = 512
    batch_limit: int = 2

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha: got {self.alpha}; needs a number in [0, 1]")
        for name in ("epochs1", "epochs2", "lr1", "lr2", "ridge", "penalty", "gamma", "mu"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name}: got {getattr(self, name)}; needs a finite number >= 0")
        for name in ("clip", "max_norm2"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}; needs a number > 0, or inf for none")
        for name in ("remote_batch1", "forget_batch1", "adjacent_batch2", "forget_batch2", "remote_batch2", "batch_limit"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; needs an integer >= 1")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: got {self.momentum}; needs a number in [0, 1)")
        for name, known in (("forget_sign", ("paper", "code")), ("w2", ("sorted", "moments", "features")),
                            ("w2_set", ("batch", "whole")), ("away_from", ("means", "samples", "forget_samples")),
                            ("project", ("momentum", "gradient")), ("schedule2", ("constant", "linear"))):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: got {getattr(self, name)!r}; needs one of {', '.join(map(repr, known))}")

    def start(self, model, data, loss, seed: int) -> EntangledProcess:
        return EntangledProcess(self, model, data, loss, seed)


class EntangledProcess(Process):
    def __init__(self, config, model, data, loss, seed):
        super().__init__(config, model, data, loss, seed)
        if config.epochs1:
            refuse_zero_eps(self.params)
        self.multiplier = torch.zeros((), device=self.params[0].device)
        self.adam = torch.optim.Adam(self.params, lr=config.lr1, foreach=True)
        self.sgd: ProjectedMomentum | None = None
        self.remote_start: Tensor | None = None  # L_rem(θ0)
        self.reference: Tensor | None = None  # ℓ(θ̄) of every forget sample, or its outputs for w2="features"
        self.latest: Tensor | None = None  # the same at the last time each sample was seen
        self._seen: Tensor | None = None  # the same, with those of the step that is being taken
        self.bound: dict = {}

    @property
    def stages(self):
        c = self.config
        steps1 = math.ceil(c.epochs1 * len(self.data.remote) / min(c.remote_batch1, len(self.data.remote)))
        steps2 = math.ceil(c.epochs2 * len(self.data.adjacent) / min(c.adjacent_batch2, len(self.data.adjacent)))
        return [("stage1", steps1), ("stage2", steps2)]

    def enter(self, stage):
        if stage == "stage1":
            self.remote_start = self.all_losses(self.data.remote).mean()
        if stage == "stage2":
            c = self.config
            self.sgd = self._optimizer()
            self.reference = self._reference()
            self.latest = self.reference.clone()
            losses = self.all_losses(self.data.forget) if c.w2 == "features" else self.reference
            self.bound = {"start": losses}

    def take_step(self, stage, k):
        return self._stage1(k) if stage == "stage1" else self._stage2(k)

    # ---- stage 1: augmented Lagrangian ----

    def _stage1(self, k):
        c = self.config
        _, xf, yf = self.data.forget.batch(k, c.forget_batch1)
        _, xr, yr = self.data.remote.batch(k, c.remote_batch1)
        both = self.loss(self.model(torch.cat([xf, xr])), torch.cat([yf, yr]))
        forget = self.checked(both[: len(yf)], len(yf), "forget")
        remote = self.checked(both[len(yf) :], len(yr), "remote")
        w = weights.lagrangian(
            forget, remote, self.remote_start, self.multiplier, mu=c.mu, gamma=c.gamma, clip=c.clip, penalty=c.penalty
        )
        grads = self.gradient((torch.cat([w.forget, w.remote]) * both).sum(), "forget or the remote")
        self.settle()
        for p, g in zip(self.params, grads):
            p.grad = g
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        self.multiplier = w.multiplier
        return {
            "epoch": (k + 1) * c.remote_batch1 / len(self.data.remote), "loss_forget": forget.detach().mean(),
            "loss_remote": remote.detach().mean(), "constraint": w.constraint, "multiplier": w.multiplier,
        }  # fmt: skip

    # ---- stage 2: W2-guided projected gradient descent ----

    @torch.no_grad()
    def _reference(self) -> Tensor:
        if self.config.w2 != "features":
            return self.all_losses(self.data.forget)
        return torch.cat([self.model(x) for _, x, _ in self.data.forget.chunks()])

    def _optimizer(self) -> ProjectedMomentum:
        c = self.config
        return ProjectedMomentum(self.params, lr=c.lr2, momentum=c.momentum, ridge=c.ridge, project=c.project)

    def _stage2(self, k):
        c = self.config
        if c.schedule2 == "linear":
            self.sgd.param_groups[0]["lr"] = c.lr2 * (1 - k / self.stages[1][1])
        self._seen = self.latest
        _, xa, ya = self.data.adjacent.batch(k, c.adjacent_batch2)
        adjacent = self.losses(xa, ya, "adjacent")
        g_adjacent = self.gradient(adjacent.mean(), None if c.away_from == "means" else "adjacent")
        row = {"epoch": (k + 1) * c.adjacent_batch2 / len(self.data.adjacent), "loss_adjacent": adjacent.detach().mean()}
        if math.isfinite(c.max_norm2):
            shorten(g_adjacent, c.max_norm2)
        if c.away_from == "means":
            directions = [self._sum_of_minibatches(self._forget, k, row), self._sum_of_minibatches(self._remote, k, row)]
            row.update(self.sgd.step(g_adjacent, directions, check=self._means_are_finite))
        else:
            row.update(self._away_from_samples(k, g_adjacent, row))
        self.latest = self._seen
        return row

    def _means_are_finite(self, gram: Tensor) -> None:
        """The step's Gram has read all three gradients: its diagonal tells of each, at no pass of its own."""
        for k, name in ((0, "forget"), (1, "remote"), (-1, "adjacent")):
            self.note_finite(gram[k, k], name, "gradient")
        self.settle()

    def _sum_of_minibatches(self, one, k, row) -> list[Tensor]:
        """Gradients of up to batch_limit minibatches added up, never more than the set holds."""
        total, seen = None, []
        for j in range(self._minibatches(one)):
            value, found = one(k * self._minibatches(one) + j)
            grads = self.gradient(value, None)
            total = grads if total is None else torch._foreach_add(total, grads)
            seen.append(found)
        for key in seen[0]:
            row[key] = torch.stack([s[key] for s in seen]).mean()
        return total

    def _minibatches(self, one) -> int:
        samples, size = ((self.data.forget, self.config.forget_batch2) if one == self._forget
                         else (self.data.remote, self.config.remote_batch2))  # fmt: skip
        return min(self.config.batch_limit, math.ceil(len(samples) / size))

    def _remote(self, batch: int):
        _, x, y = self.data.remote.batch(batch, self.config.remote_batch2)
        losses = self.losses(x, y, "remote")
        return losses.mean(), {"loss_remote": losses.detach().mean()}

    def _forget(self, batch: int):
        """L̃_f = (1−α) (±L_f) + α W2² as Σ w_i ℓ_i."""
        rows, x, y = self.data.forget.batch(batch, self.config.forget_batch2)
        output = self.model(x)
        losses = self.checked(self.loss(output, y), len(y), "forget")
        w, seeds, distance = self._forget_weights(rows, losses, output)
        value = (w * losses).sum()
        if seeds is not None:
            value = value + (seeds * output).sum()
        return value, {"loss_forget": losses.detach().mean(), "w2": distance}

    def _forget_weights(self, rows, losses, output):
        c = self.config
        sign = 1.0 if c.forget_sign == "paper" else -1.0
        plain = sign * (1 - c.alpha) * weights.means(losses)
        current = (output if c.w2 == "features" else losses).detach()
        rows = sent(rows, current.device)
        if c.w2_set == "batch":
            distance, slope = weights.w2(current, self.reference[rows], c.w2)
        else:
            self._seen = self._seen.clone()  # not in place: what is not finite must not come among the latest
            self._seen[rows] = current.to(self._seen.dtype)
            distance, slope = weights.w2(self._seen, self.reference, c.w2)
            slope = slope[rows] * (len(self._seen) / len(rows))  # the batch stands for the whole set
        slope = c.alpha * slope.to(current.dtype)
        return (plain, slope, distance) if c.w2 == "features" else (plain + slope, None, distance)

    def _away_from_samples(self, k, g_adjacent, row):
        """V = the span of the per-sample gradients of this step's forget samples and of the remote ones, or of their
        mean: a k×k Gram, a solve, and one combined gradient; no per-sample gradient is formed."""
        c = self.config
        batches = [self.data.forget.batch(k, c.forget_batch2)]
        if c.away_from == "samples":
            batches.append(self.data.remote.batch(k, c.remote_batch2))
            means = []
        else:
            means = [self._sum_of_minibatches(self._remote, k, row)]
        x, y = (torch.cat([b[i] for b in batches]) for i in (1, 2))
        with capture(self.model) as tape:
            output = self.model(x)
            losses = self.loss(output, y)
            for name, part in zip(("forget", "remote"), losses.detach().split([len(b[2]) for b in batches])):
                row[f"loss_{name}"] = self.checked(part, len(part), name).mean()
            tape.backward(losses)
        forget = len(batches[0][2])
        w, _, row["w2"] = self._forget_weights(batches[0][0], losses[:forget].detach(), output[:forget].detach())
        # what will be projected is m v + g
        moved = torch._foreach_add(torch._foreach_mul(self.sgd.buffers, self.sgd.carried), g_adjacent)
        inner = tape.project([moved, *means])
        gram, rhs = tape.gram(), inner[:, 0]
        if means:
            ends = ops.step_gram([means[0], moved])
            gram = torch.cat([torch.cat([gram, inner[:, 1:]], 1), torch.cat([inner[:, 1:].mT, ends[:1, :1]], 1)])
            rhs = torch.cat([rhs, ends[0, 1:]])
        n = len(losses)
        self.must_be_finite(gram.diagonal(), "forget or the remote", "gradient")
        # the sums over samples are as exact as the losses, whatever dtype they stand in
        coef = weights.project_onto(gram, rhs, ridge=c.ridge, rcond=len(gram) * torch.finfo(losses.dtype).eps)
        directions = [tape.combine(coef[:n].to(losses.dtype)), *means]
        found = self.sgd.step(g_adjacent, directions, coef=torch.cat([coef.new_ones(1), coef[n:]]))
        # ∇L̃_f and ∇L_rem as weights on the spanning gradients: their angle costs a product with the Gram
        u, v = gram.new_zeros(2, len(gram))
        u[:forget] = w.to(gram.dtype)
        v[forget:] = 1 / (len(gram) - forget)
        square = (u @ gram @ u) * (v @ gram @ v)
        found["cosine"] = (u @ gram @ v) / square.clamp(min=torch.finfo(gram.dtype).tiny).sqrt()
        return found

    # ---- to be continued, and to be reported ----

    def state(self):
        out = {"multiplier": self.multiplier}
        for i, p in enumerate(self.params):
            for key, value in self.adam.state.get(p, {}).items():
                out[f"adam.{i}.{key}"] = value
        for key in ("remote_start", "reference", "latest"):
            if getattr(self, key) is not None:
                out[key] = getattr(self, key)
        if self.bound:
            out["bound.start"] = self.bound["start"]
        return out | {f"momentum.{i}": v for i, v in enumerate(self.sgd.buffers if self.sgd else ())}

    def load(self, state):
        device = self.params[0].device
        self.multiplier = state["multiplier"].to(device)
        for key in ("remote_start", "reference", "latest"):
            if key in state:
                setattr(self, key, state[key].to(device))
        for i, p in enumerate(self.params):
            found = {k.split(".")[-1]: v for k, v in state.items() if k.startswith(f"adam.{i}.")}
            if found:
                self.adam.state[p] = {k: v if k == "step" else v.to(device) for k, v in found.items()}
        if "bound.start" in state:
            self.bound = {"start": state["bound.start"].to(device)}
        if "momentum.0" in state:
            self.sgd = self._optimizer()
            saved = {i: {"momentum_buffer": state[f"momentum.{i}"]} for i in range(len(self.params))}
            self.sgd.load_state_dict({"state": saved, "param_groups": self.sgd.state_dict()["param_groups"]})

    def facts(self):
        """The two propositions, measured (methods/propositions.py)."""
        if self.reference is None:  # no step of stage 2: there is no θ̄ to compare with
            return {}
        with torch.no_grad(), in_mode(self.model, False):
            classes = self.model(self.data.forget.take(torch.arange(1))[0]).shape[-1]
        found = {"first_order": first_order(self), "forget_bound": forget_bound(self, classes)}
        self.settle()
        return found
