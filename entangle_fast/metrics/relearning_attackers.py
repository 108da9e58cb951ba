"""Relearning attackers: copies of one model's parameters, one a seed, trained side by side.

The model is only called, with other parameters (torch.func.functional_call): it is never changed. The copies are either
stacked and go through one vmapped call (the form that torch.func.stack_module_state gives), or are called one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from ..methods.data import SampleSet
from ..methods.training import device_of
from ..tasks.adjacency import embed
from .outputs import check_labels

ROWS = 256  # samples in one evaluating call
# tens of steps on most of the demo's models, where SGD at 1e-2 undoes any method in one or two
LEARNING_RATES = {"sgd": 2e-4, "adam": 1e-4, "retain": 1e-3, "prototype": 0.02}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Attackers:
    """``count`` copies of the parameters ``names`` of ``model``, and the optimiser that moves them.

    Args:
        model: called in the mode it is in; parameters that are not named, and buffers, are the model's own.
        optimizer: a function of a list of tensors → torch.optim.Optimizer, elementwise (so that stacking changes nothing).
            It moves tensors of float32 at least, which the model meets in its own dtype: 16 bits would lose short steps.
        vmapped: one vmapped call over stacked copies, or a loop of calls.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], count: int, optimizer, vmapped: bool):
        own = dict(model.named_parameters())
        self.model, self.count, self.vmapped = model, count, vmapped
        self.dtypes = {n: own[n].dtype for n in names}
        self.start = {n: own[n].detach().to(torch.promote_types(own[n].dtype, torch.float32)) for n in names}
        if vmapped:
            self.copies = [{n: p.expand(count, *p.shape).clone() for n, p in self.start.items()}]
        else:  # clone keeps channels_last, which a stack would lose
            self.copies = [{n: p.clone().requires_grad_() for n, p in self.start.items()} for _ in range(count)]
        self.optimizer = optimizer([p for copy in self.copies for p in copy.values()])

    def descend(self, x: Tensor, y: Tensor) -> Tensor:
        """One step of each copy on its own batch, x (count, b, ...), y (count, b); the mean losses before it, (count,)."""
        losses, gradients = self.gradients(x, y)
        self.move(gradients)
        return losses

    def gradients(self, x: Tensor, y: Tensor) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Mean cross-entropy (count,) of each copy's batch, and its gradient in the form of ``copies``."""
        if self.vmapped:
            with torch.no_grad():
                gradients, losses = vmap(grad_and_value(self._loss))(self.copies[0], x, y)
            return losses, [gradients]
        losses, gradients = [], []
        for copy, xs, ys in zip(self.copies, x, y):
            loss = self._loss(copy, xs, ys)
            found = torch.autograd.grad(loss, list(copy.values()), allow_unused=True, materialize_grads=True)
            losses.append(loss.detach())
            gradients.append(dict(zip(copy, found)))
        return torch.stack(losses), gradients

    def move(self, gradients: list[dict[str, Tensor]]) -> None:
        """One step of the optimiser along given gradients."""
        for copy, found in zip(self.copies, gradients):
            for name, p in copy.items():
                p.grad = found[name]
        self.optimizer.step()

    @torch.no_grad()
    def evaluate(self, samples: SampleSet) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy in nats and accuracy in % of each copy on samples that they share: float64 (count,)."""
        loss = torch.zeros(self.count, dtype=torch.float64)
        right = torch.zeros(self.count, dtype=torch.float64)
        for _, xs, ys in samples.chunks(ROWS):
            if self.vmapped:
                logits = vmap(self._logits, in_dims=(0, None))(self.copies[0], xs)
            else:
                logits = torch.stack([self._logits(copy, xs) for copy in self.copies])
            check_labels(logits, ys, samples.name)  # a Dataset's come to light only now
            targets = ys.expand(self.count, -1)
            losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
            loss += losses.double().sum(1).cpu()
            right += (logits.argmax(2) == targets).double().sum(1).cpu()
        return loss / len(samples), 100 * right / len(samples)

    @torch.no_grad()
    def distances(self) -> Tensor:
        """‖θ_t − θ_u‖ of each copy over the parameters it moves: float64 (count,)."""
        if self.vmapped:
            norms = [(p - self.start[n]).flatten(1).norm(dim=1) for n, p in self.copies[0].items()]
            return torch.stack(norms).double().norm(dim=0).cpu()
        start = list(self.start.values())
        apart = [torch.stack(torch._foreach_norm(torch._foreach_sub(list(copy.values()), start))) for copy in self.copies]
        return torch.stack(apart).double().norm(dim=1).cpu()

    def _logits(self, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        logits = functional_call(self.model, {n: p.to(self.dtypes[n]) for n, p in parameters.items()}, (x,))
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    def _loss(self, parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self._logits(parameters, x), y)


class Batches:
    """Batches of one set for each seed: order, and which ``share`` of the samples the attacker has, are the seed's."""

    def __init__(self, samples: SampleSet, seeds: Sequence[int], share: float, size: int):
        self.samples, self.size = samples, size
        kept = max(1, round(share * len(samples)))
        self.sets = []
        for seed in seeds:
            rows = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[:kept]
            self.sets.append(SampleSet("forget", (rows, rows), "cpu", seed))

    def __call__(self, number: int) -> tuple[Tensor, Tensor]:
        """Batch ``number`` of every seed: x (seeds, b, ...), y (seeds, b)."""
        rows = torch.stack([s.take(s.rows(number, self.size))[0] for s in self.sets])
        x, y = self.samples.take(rows.flatten())
        return x.unflatten(0, rows.shape), y.unflatten(0, rows.shape)


def attack(model: nn.Module, samples: SampleSet, seeds: Sequence[int], batched: str, head: str | None, recipe: dict):
    """The attackers of a recipe (see `relearn`), and step(k): takes step k, gives the losses of its batches (seeds,).

    The prototype attack has no batches; its step gives zeros.
    """
    lr, momentum = recipe["lr"], recipe["momentum"]

    def sgd(tensors):
        return torch.optim.SGD(tensors, lr=lr, momentum=momentum, foreach=True)

    def adam(tensors):
        return torch.optim.Adam(tensors, lr=lr, foreach=True)

    if recipe["attacker"] == "prototype":
        labels = samples.labels()
        head, name = classifier(model, head, int(labels.max()))
        vmapped = _choose(model, [name], batched, samples)
        attackers = Attackers(model, [name], len(seeds), lambda tensors: torch.optim.SGD(tensors, lr=lr), vmapped)
        directions = prototype_directions(attackers.start[name], embed(model, samples, head), labels, recipe["shots"], seeds)
        moves = [{name: directions}] if vmapped else [{name: d} for d in directions]
        return attackers, lambda k: (attackers.move(moves), torch.zeros(len(seeds)))[1]
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    batches = Batches(samples, seeds, recipe["share"], recipe["batch"])
    make = adam if recipe["attacker"] == "adam" else sgd
    attackers = Attackers(model, names, len(seeds), make, _choose(model, names, batched, samples))
    return attackers, lambda k: attackers.descend(*batches(k))


def classifier(model: nn.Module, head: str | None, label: int) -> tuple[str, str]:
    """The module that gives the logits (default: the nn.Linear registered last) and the name of its weight."""
    modules = dict(model.named_modules())
    if head is None:
        head = next((n for n in reversed(modules) if isinstance(modules[n], nn.Linear)), None)
    layer = modules.get(head)
    if not isinstance(layer, nn.Linear) or layer.out_features <= label:
        kind = f"of {layer.out_features} outputs" if isinstance(layer, nn.Linear) else f"a {type(layer).__name__}"
        got = f"{head!r}, {kind if head in modules else 'which is no module of the model'}"
        fit = [repr(n) for n, m in modules.items() if isinstance(m, nn.Linear) and m.out_features > label]
        needs = f"the name of the nn.Linear that gives the logits, label {label} among them"
        raise ValueError(f"head: got {got}; needs {needs}, {'such as ' + ', '.join(fit[-3:]) if fit else 'of which the model has none'}")
    return head, next(n for n, p in model.named_parameters() if p is layer.weight)


def prototype_directions(weight: Tensor, features: Tensor, y: Tensor, shots: int, seeds: Sequence[int]) -> Tensor:
    """−‖w_c‖ p_c / ‖p_c‖ in the rows of the classes of y, zero elsewhere: (seeds, classes, d), to be descended along.

    p_c is the mean of the features (n, d) of ``shots`` samples of class c (all where there are fewer), drawn from the
    seed. [ours], after the idea of arXiv 2506.01318.
    """
    y, out = y.cpu(), weight.new_zeros(len(seeds), *weight.shape)
    for i, seed in enumerate(seeds):
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
        for c in y.unique():
            prototype = features[order[y[order] == c][:shots]].mean(0).to(weight)
            out[i, c] = -weight[c].norm() * F.normalize(prototype, dim=0)
    return out


def _choose(model: nn.Module, names: Sequence[str], batched: str, samples: SampleSet) -> bool:
    """Whether to vmap; "auto" as measured (see `relearn`), and never where the model cannot be vmapped."""
    if batched != "auto":
        return batched == "vmap"
    if device_of(model).type == "cpu" and any(isinstance(m, CONVOLUTIONS) for m in model.modules()):
        return False  # a vmapped convolution is a grouped one, slow there
    try:
        trial = Attackers(model, names, 2, lambda tensors: None, True)
        trial.gradients(*(t.expand(2, *t.shape) for t in samples.take(torch.zeros(1, dtype=torch.int64))))
    except RuntimeError:
        return False
    return True
