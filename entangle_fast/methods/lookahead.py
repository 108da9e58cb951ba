"""LUR: forget at the point where the next retain step would lead, so that forgetting and retaining stop pulling apart.

Patel & Qiu, "Learning to Unlearn while Retaining", ICCV 2025, arXiv 2503.06339 (methods.md §2; the objective [third]):

    min_θ  L_r(θ) + λ 𝓛_f(θ′),   θ′ = θ − α ∇L_r(θ)
    𝓛_f(θ′) = 𝓛_f(θ) − α <∇𝓛_f, ∇L_r> + O(α²)                        Taylor: an implicit regulariser of the inner product
    order=2    ∇L_r(θ) + λ (I − α H_r(θ)) ∇𝓛_f(θ′)                    the objective's own gradient
    order=1    ∇L_r(θ) + λ ∇𝓛_f(θ′)                                   [ours], H_r left out
    swap       L_r(θ′) + λ 𝓛_f(θ),  θ′ = θ − α ∇𝓛_f(θ)                [ours]; the same two orders

What is descended is 𝓛_f, so that with 𝓛_f = −CE a larger <∇𝓛_f, ∇L_r> is a smaller <∇CE_f, ∇L_r>: the angle between the
cross-entropy gradients of the two sets, which is what a run reports, gets wider.

H_r v is a double backward through the graph that ∇L_r left: the look-ahead is undone to the bit, hence that graph is valid
again and nothing is computed twice. torch.func.jvp over grad has to run the forward and the first backward again; a retain
gradient with its H v took 0.96 (SmallCNN), 0.70 (residual CNN, attention block) and 0.56 (MLP) of the time of that form,
256 samples, one thread of an AMD EPYC (Zen 4), torch 2.13. Attention takes its math backend there: the fused ones have no
second derivative. Where a model has none at all, H v is a central difference of two more gradients, and a warning says so.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from .. import ops, weights
from .ahead import AheadProcess
from .baselines import reset
from .process import square
from .sgd import SgdOptions, positive
from .training import sent


@dataclass
class Lookahead(SgdOptions):
    """Configuration. The paper's, as a third party quotes it: alpha .01, lr .01, 10 epochs, lam of .01, .05, 1 and trim .03
    (CIFAR-10), .01, .1 (CIFAR-100); the defaults here are for the demo's task [ours].

    Args:
        alpha: α, length of the look-ahead in units of the inner gradient; 0 is plain joint descent.
        lam: λ, weight of the forget loss.
        order: 2, the objective's gradient; 1, without its Hessian term.
        swap: take the inner step on the forget loss and the retain gradient at θ′.
        forget_loss: "clipped", −CE whose gradient is zero from ``clip`` nats on; "random_label", CE to wrong labels drawn
            once from the seed; "target", CE to the class ``target``, or to each sample's runner-up at the start.
        trim: the share 1 − s of the weights that is re-initialised first, those with the largest |w ∘ Σ|∇CE_f||, the sum
            over forget minibatches [ours]; BatchNorm stays as it is.
        retain_batch: retain samples a step.  batch, epochs: forget samples a step, passes over them.
        stop_at: as for the other methods, the forget samples seen at θ′ (at θ with swap).
        angle_every: steps between measurements of ``inner`` and ``cosine`` = <∇CE_f, ∇CE_r> and its cosine, of the step's
            batches at θ (true labels, unclipped), and of ``loss_forget``; each costs one more forget gradient. 0: never.
    """

    name = "lookahead"
    epochs: float = 10.0
    lr: float = 2e-2
    alpha: float = 0.01
    lam: float = 0.5
    order: Literal[1, 2] = 1
    swap: bool = False
    forget_loss: Literal["clipped", "random_label", "target"] = "clipped"
    clip: float = 1.35  # just below chance among the demo's four classes, log 4
    target: int | None = None
    trim: float = 0.0
    retain_batch: int = 512
    angle_every: int = 1

    def __post_init__(self):
        positive(self, "epochs", "lr", "batch", "retain_batch")
        for name in ("alpha", "lam", "max_norm"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name}: got {getattr(self, name)}; needs a finite number >= 0")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: got {self.momentum}; needs a number in [0, 1)")
        if not self.clip > 0:
            raise ValueError(f"clip: got {self.clip}; needs a number > 0, or inf for none")
        if not 0 <= self.trim < 1:
            raise ValueError(f"trim: got {self.trim}; needs a share in [0, 1)")
        if self.angle_every < 0:
            raise ValueError(f"angle_every: got {self.angle_every}; needs a number of steps, or 0 for never")
        for name, known in (("order", (1, 2)), ("forget_loss", ("clipped", "random_label", "target"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: got {getattr(self, name)!r}; needs one of {', '.join(map(repr, known))}")
        if self.target is not None and (self.forget_loss != "target" or self.target < 0):
            raise ValueError(f"target: got {self.target} with forget_loss={self.forget_loss!r}; needs a class index >= 0 and "
                             "forget_loss='target'")  # fmt: skip

    def start(self, model, data, loss, seed):
        return LookaheadProcess(self, model, data, loss, seed)


class LookaheadProcess(AheadProcess):
    def __init__(self, config, model, data, loss, seed):
        super().__init__(config, model, data, loss, seed)
        self.labels: Tensor | None = None  # what each forget sample shall be called, (n,) int64
        self.exact = True  # H v by double backward

    @property
    def stages(self):
        return [("trim", 1)] * (self.config.trim > 0) + super().stages

    def enter(self, stage):
        if self.config.forget_loss != "clipped" and self.labels is None:
            self.labels = self._wrong_labels()

    def take_step(self, stage, k):
        return self._trim() if stage == "trim" else super().take_step(stage, k)

    # ---- the step ----

    def direction(self, k, row):
        c = self.config
        second = c.order == 2 and c.alpha > 0
        inner, outer = (self._forget, self._retain) if c.swap else (self._retain, self._forget)
        share, share_ahead = (c.lam, 1.0) if c.swap else (1.0, c.lam)
        graph = None
        with sdpa_kernel(SDPBackend.MATH) if second and self.exact else contextlib.nullcontext():
            value = inner(k, row)
        if second and self.exact:
            graph = self._graph_of(value)
        g = self.gradient(value, inner.__name__[1:]) if graph is None else [x.detach() for x in graph]
        if c.angle_every and k % c.angle_every == 0:
            self._measure(k, row, None if c.swap else g)
        # the undo gives the very bits back, so graph's saved parameters are right whatever their version counters say
        with torch.autograd._unsafe_preserve_version_counter(tuple(self.params)), self.ahead(g, c.alpha):
            ahead = self.gradient(outer(k, {}), f"{outer.__name__[1:]} (at θ′)")
        if second:
            curved = None if graph is None else self._double_backward(graph, ahead)
            curved = self._difference(inner, k, ahead) if curved is None else curved
            self.note_finite(curved, "training", "Hessian-vector product")
            ahead = torch._foreach_sub(ahead, curved, alpha=c.alpha)
        return torch._foreach_add(torch._foreach_mul(g, share), ahead, alpha=share_ahead)

    def _retain(self, k, row) -> Tensor:
        return self.retain_losses(k, self.config.retain_batch, row).mean()

    def _forget(self, k, row) -> Tensor:
        """𝓛_f on the step's batch; what loss_forget says is left to _measure."""
        c, forget = self.config, self.data.forget
        if c.forget_loss == "clipped":
            losses = self.batch_losses(forget, k, c.batch, {})
            return -(weights.clipped(losses, c.clip) * losses).sum()
        rows, x, y = forget.batch(k, c.batch)
        output = self.model(x)
        losses = self.checked(self.loss(output, self.labels[sent(rows, y.device)]), len(y), "forget")
        self.note_right(output, y)
        return losses.mean()

    def _measure(self, k, row, g_retain) -> None:
        """The mean cross-entropy gradients of the step's forget and retain batches, at θ."""
        _, x, y = self.data.forget.batch(k, self.config.batch)
        losses = self.losses(x, y, "forget")
        row["loss_forget"] = losses.detach().mean()
        g_forget = self.gradient(losses.mean(), "forget")
        if g_retain is None:
            g_retain = self.gradient(self._retain(k, row), "retain")
        gram = ops.step_gram([g_forget, g_retain])
        row["inner"] = gram[0, 1]
        row["cosine"] = gram[0, 1] / (gram[0, 0] * gram[1, 1]).clamp(min=torch.finfo(gram.dtype).tiny).sqrt()

    # ---- H v of the inner objective ----

    def _graph_of(self, value: Tensor) -> list[Tensor] | None:
        """The gradient with the graph that it is made of; None, with a warning, where something has no second derivative."""
        with self._or_difference():
            found = torch.autograd.grad(value, self.params, create_graph=True, allow_unused=True)
            found = [torch.zeros_like(p) if g is None else g for p, g in zip(self.params, found)]
            if missing := _underivable(found):
                raise RuntimeError(f"{missing} has no derivative")
            self.note_finite([g.detach() for g in found], "forget" if self.config.swap else "retain", "gradient")
            return found
        return None

    def _double_backward(self, graph: list[Tensor], v: list[Tensor]) -> list[Tensor] | None:
        curved = [(g, x) for g, x in zip(graph, v) if g.requires_grad]  # a gradient that is constant has none
        if not curved:
            return [torch.zeros_like(p) for p in self.params]
        with self._or_difference():
            found = torch.autograd.grad([g for g, _ in curved], self.params, [x for _, x in curved], allow_unused=True)
            return [torch.zeros_like(p) if h is None else h for p, h in zip(self.params, found)]
        return None

    @contextlib.contextmanager
    def _or_difference(self):
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.exact = False
            reason = str(error).splitlines()[0]
            warnings.warn(f"order=2: the model or its loss cannot be differentiated twice ({reason}); its Hessian-vector "
                          "products are central differences from here on, not exact; or take order=1", stacklevel=2)  # fmt: skip

    def _difference(self, inner, k: int, v: list[Tensor]) -> list[Tensor]:
        """(∇(θ + εv) − ∇(θ − εv)) / 2ε, ε‖v‖ = ∛eps·(1 + ‖θ‖): an error of about eps^⅔ in third derivatives and in rounding."""
        norm, size = (square(x).sqrt().to(v[0].dtype) for x in (v, [p.detach() for p in self.params]))
        step = torch.finfo(size.dtype).eps ** (1 / 3) * (1 + size)
        move = torch._foreach_mul(v, torch.where(norm > 0, step / norm, 0))
        ends = []
        for sign in (-1.0, 1.0):
            with self.ahead(move, sign):
                ends.append(self.gradient(inner(k, {}), f"{inner.__name__[1:]} (beside θ)"))
        return torch._foreach_mul(torch._foreach_sub(*ends), norm / (2 * step))

    # ---- the start ----

    @torch.no_grad()
    def _wrong_labels(self) -> Tensor:
        c, found, generator = self.config, [], torch.Generator().manual_seed(self.seed)
        for _, x, y in self.data.forget.chunks():
            output = self.model(x)
            if output.dim() != 2 or y.dim() != 1:
                raise ValueError(f"forget_loss: got {c.forget_loss!r} for a model whose output is {tuple(output.shape)}; needs "
                                 "class logits (n, C), or forget_loss='clipped'")  # fmt: skip
            if c.forget_loss == "random_label":
                wrong = (y + torch.randint(1, output.shape[1], y.shape, generator=generator).to(y.device)) % output.shape[1]
            elif c.target is None:
                wrong = output.scatter(1, y[:, None], -math.inf).argmax(1)
            else:
                wrong = torch.full_like(y, c.target)
                if c.target >= output.shape[1] or (y == c.target).any():
                    raise ValueError(f"target: got {c.target}; needs a class below {output.shape[1]} that no forget sample has")
            found.append(wrong)
        return torch.cat(found)

    def _trim(self) -> dict:
        """A share of the weights anew, from the modules' own initialisation and the seed."""
        c, model = self.config, self.model
        norms = {id(p) for m in model.modules() if isinstance(m, _BatchNorm) for p in m.parameters(recurse=False)}
        kept = [i for i, p in enumerate(self.params) if id(p) not in norms]
        total = [torch.zeros_like(p, requires_grad=False) for p in self.params]
        for _, x, y in self.data.forget.chunks(c.batch):
            g = self.gradient(self.losses(x, y, "forget").mean(), "forget")
            torch._foreach_add_(total, torch._foreach_abs(g))
        self.settle()
        saliency = torch.cat([(self.params[i].detach() * total[i]).abs().flatten() for i in kept])
        count = round(c.trim * len(saliency))
        chosen = torch.zeros_like(saliency, dtype=torch.bool)
        chosen[saliency.topk(count).indices] = True
        fresh = copy.deepcopy(model)
        reset(fresh, self.seed)
        anew = [p for p in fresh.parameters() if p.requires_grad]
        parts = chosen.split([self.params[i].numel() for i in kept])
        with torch.no_grad():
            for i, part in zip(kept, parts):
                self.params[i].copy_(torch.where(part.view(self.params[i].shape), anew[i], self.params[i]))
        return {"epoch": 0.0, "trimmed": count}

    def state(self):
        labels = {} if self.labels is None else {"labels": self.labels}
        return super().state() | labels | {"exact": torch.tensor(self.exact)}  # attention's backend goes with it

    def load(self, state):
        super().load(state)
        self.exact = bool(state["exact"])
        self.labels = state["labels"].to(self.params[0].device) if "labels" in state else None


def _underivable(outputs: list[Tensor]) -> str:
    """Name of a node that stands for a missing derivative, "" without one.

    Torch warns or says nothing where such a node leads to no parameter, and gives a Hessian that lacks its part.
    """
    todo, seen = [t.grad_fn for t in outputs if t.grad_fn is not None], set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name().endswith(("NotImplemented", "::Error")):  # no formula; once_differentiable
            return node.name()
        todo += [n for n, _ in node.next_functions if n is not None]
    return ""
