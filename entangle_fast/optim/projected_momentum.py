"""SGD whose momentum buffer is kept orthogonal to given directions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops import check as checks
from .projected import Projected, Tensors, facts

_SGD = {"dampening": 0, "nesterov": False, "maximize": False, "foreach": None, "differentiable": False, "fused": None}


class ProjectedMomentum(Projected):
    """SGD whose momentum buffer is kept orthogonal to given directions (methods.md §1, stage 2); a torch.optim.Optimizer.

        v ← m v + g ;  v ← v − P_V v ;  θ ← θ − lr v

    Args:
        params: the parameters, changed in place, or groups of them with their own lr, momentum and weight_decay.
        lr, momentum, weight_decay: as in torch.optim.SGD, the decay decoupled.
        ridge: added to the k×k Gram, in its own units; the authors add 1e-8 once per parameter tensor.
        project: "momentum" (above, the authors'), all groups having one momentum then; or "gradient": v ← m v + (g − P_V g).

    Where a step solves for its coefficients, a gradient, a direction or a projected momentum that is not finite makes the whole step
    NaN, all parameters and v with it; without directions, as in torch, the elements that it meets. Nothing is left out or skipped in
    silence, and the host does not wait to look: ``check=`` of a step sees the Gram before anything is changed.

    An Adam-type preconditioner after the projection turns the update partly back into the span: see ProjectedAdamW.

    Without directions this is torch.optim.SGD(params, lr, momentum).

    >>> import torch, entangle_fast as ef
    >>> p, forget, retain = torch.zeros(2), torch.tensor([1.0, 1.0]), torch.tensor([0.0, 2.0])
    >>> optimizer = ef.optim.ProjectedMomentum([p], lr=0.1)
    >>> facts = optimizer.step([forget], [[retain]])           # along forget, without its part along retain
    >>> bool((p - torch.tensor([-0.1, 0.0])).abs().max() < 1e-6)
    True
    >>> round(float(facts["removed"]), 4)                      # the share of the momentum that lay along retain
    0.7071
    """

    @checks.kinds
    def __init__(
        self, params: Iterable, *, lr: float, momentum: float = 0.9, weight_decay: float = 0.0, ridge: float = 0.0,
        project: str = "momentum",
    ):  # fmt: skip
        checks.choice("project", project, ("momentum", "gradient"))
        self.project = project
        self._weights = (0, 0.0, torch.zeros(0))  # k, carried and w of the last step: on the rows of its Gram
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}, ridge)

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"project": self.project, "_weights": self._weights}

    def _fresh(self, params):
        for p in params:
            yield {"momentum_buffer": torch.zeros_like(p, requires_grad=False)}

    @property
    def buffers(self) -> list[Tensor]:
        """v, tensors like params."""
        return self._states("momentum_buffer")

    @property
    def carried(self) -> float:
        """The share of the old v that is projected again: m, or 0 where only gradients are."""
        if self.project == "gradient":
            return 0.0
        found = {group["momentum"] for group in self.param_groups}
        checks.require(len(found) == 1, f"momentum: groups have {sorted(found)}; needs one for all where it is projected: "
                                        "give one, or project='gradient'")  # fmt: skip
        return found.pop()

    @checks.kinds
    @torch.no_grad()
    def step(
        self, grads: Tensors | Callable | None = None, directions: Sequence[Tensors] = (), coef: Tensor | None = None,
        check: Callable[[Tensor], None] | None = None, closure: Callable | None = None,
    ) -> dict[str, Tensor] | Any:  # fmt: skip
        """One step with gradient ``grads``, away from span(``directions``), over all parameters at once.

        grads: tensors like params; None: what stands in .grad, parameters without one being left alone.  directions: k lists of
        tensors like params.  coef: (k,) of P_V where the caller has solved for it.
        closure: called first, with gradients enabled: computes the loss and its .grad, as torch's (and Lightning's) closures do;
        a function in the place of grads is taken for it.
        check: called with the Gram of (directions, v where it is projected again, grads) before anything is changed: where
        it raises, nothing was.
        Returns the facts of the step, or with a closure what that returned; ``facts`` has those of the last step in both cases:
        0-d tensors, cosine of the first two directions (k ≥ 2), removed, the share of ‖w‖ that the projection took away
        (w = m v + g, or g), and, where all groups have one lr, step_norm, lr·‖w − P_V w‖.
        """
        grads, closure, loss = self._closed(grads, closure)
        parts, grads, directions = self._parts(grads, directions)
        k, carried = len(directions), self.carried
        buffers = self._states("momentum_buffer", [p for part in parts for p in part.params])
        held = buffers if carried else None
        if coef is None:
            gram, coef = ops.step_project(directions, held, grads, beta=carried, ridge=self.ridge)
        else:
            checks.floating(coef=coef)
            gram, coef = ops.step_gram([*directions, *([held] if held else []), grads]), coef.double()
        if check is not None:
            check(gram)
        for _, group, params, own in parts:
            ops.step_update(
                params, buffers[own], grads[own], [d[own] for d in directions], coef, lr=group["lr"], beta=group["momentum"],
                weight_decay=group["weight_decay"],
            )  # fmt: skip
        found, kept = facts(gram, coef, self._on_rows(gram, k, carried))
        rates = {group["lr"] for _, group, _, _ in parts}
        self.facts = {"step_norm": rates.pop() * kept, **found} if len(rates) == 1 else found
        return self.facts if closure is None else loss

    def _on_rows(self, gram: Tensor, k: int, carried: float) -> Tensor:
        """What is projected, m v + g, as coefficients on the Gram's rows."""
        if self._weights[:2] != (k, carried) or len(self._weights[2]) != len(gram):
            w = gram.new_zeros(len(gram))
            w[k:] = 1.0
            w[k:-1] = carried
            self._weights = (k, carried, w)
        return self._weights[2]

    def _for_torchs(self, state_dict):
        for group in state_dict["param_groups"]:
            if not group["weight_decay"]:  # SGD would add it to the gradient
                group.update(_SGD | group)

    def _refuse_alike(self, group):
        for name, whose in (("ns_steps", "Muon's"), ("centered", "RMSprop's")):
            if name in group:
                raise ValueError(f"state_dict: a group with {name}, {whose}, whose momentum looks alike and steps otherwise; needs that "
                                 "of ProjectedMomentum or SGD")  # fmt: skip
