"""What the projected optimisers share: torch's parameter groups and state_dict, gradients and directions given as lists."""

from __future__ import annotations

import math
import numbers
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import check as checks

Tensors = Sequence[Tensor]


class Part(NamedTuple):
    """A group's share of a step: its number, its options, its parameters, and where they stand in every list."""

    index: int
    group: dict
    params: list[Tensor]
    own: slice


class Projected(torch.optim.Optimizer):
    """A torch.optim.Optimizer: parameter groups with their own options, learning-rate schedulers, state_dict, hooks.

    All state stands from the start and is loaded in place, so that a captured CUDA graph goes on with it.
    """

    def __init__(self, params: Iterable, defaults: dict, ridge: float):
        _number("ridge", ridge)
        self.ridge = ridge
        super().__init__(_given(params), defaults)

    @abstractmethod
    def _fresh(self, params: list[Tensor]) -> Iterator[dict[str, Tensor]]:
        """The state of each of a group's parameters before the first step."""

    @property
    def params(self) -> list[Tensor]:
        """The parameters of all groups, in order: what gradients and directions are shaped like."""
        return [p for group in self.param_groups for p in group["params"]]

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for name in self.defaults.keys() & {"lr", "momentum", "weight_decay", "eps", "noise"}:
                _number(name, group[name])
            if "betas" in self.defaults:
                checks.betas(group["betas"])
            for p in group["params"]:
                checks.require(p.is_floating_point(), f"params: got one of {p.dtype}; needs real floating-point tensors: leave it out")
            self.state.update(zip(group["params"], self._fresh(group["params"])))
        except BaseException:
            self.param_groups.pop()
            raise

    def _parts(self, grads: Tensors | None, directions: Sequence[Tensors]) -> tuple[list[Part], list[Tensor], list[list[Tensor]]]:
        """Each group's share, gradients and directions of what is stepped: everything, or what has a .grad."""
        params, parts, at = self.params, [], 0
        directions = [list(d) for d in directions]
        for j, d in enumerate(directions):
            checks.require(len(d) == len(params), f"directions[{j}]: {len(d)} tensors for {len(params)} parameters; needs one for each")
        taken = [True] * len(params) if grads is not None else [p.grad is not None for p in params]
        if grads is None:
            checks.require(any(taken), "grads: got none, and no parameter has a .grad; needs tensors like params, or a backward before")
            grads = [p.grad for p in params if p.grad is not None]
            directions = [[x for x, t in zip(d, taken) if t] for d in directions]
        flags = iter(taken)
        for i, group in enumerate(self.param_groups):
            if own := [p for p, t in zip(group["params"], flags) if t]:
                parts.append(Part(i, group, own, slice(at, at + len(own))))
                at += len(own)
        if len(parts) > 1:  # what the last group's step would refuse, before the first group's is taken
            stepped = [p for part in parts for p in part.params]
            checks.like(stepped, "grads", grads)
            for j, d in enumerate(directions):
                checks.like(stepped, f"directions[{j}]", d)
        return parts, list(grads), directions

    # ---- the state ----

    def _states(self, name: str, params: Iterable[Tensor] | None = None) -> list[Tensor]:
        return [self.state[p][name] for p in (self.params if params is None else params)]

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Take over what state_dict() gave, of an optimiser of parameters of the same shapes; ValueError before anything is changed.

        Options come with it, as in torch. A parameter without state begins anew.
        """
        found = self._matched(state_dict)
        mine, options = dict(self.state), [dict(group) for group in self.param_groups]
        super().load_state_dict(state_dict)  # options and hooks; it would narrow moments to their parameter's dtype
        for group, before in zip(self.param_groups, options):
            group.update({name: before[name] for name in before.keys() - group.keys()})  # torch's AdamW has no noise
        self.state.clear()
        self.state.update(mine)
        for p, saved in zip(self.params, found):
            for name, x in mine[p].items():
                x.copy_(torch.as_tensor(saved[name])) if saved else x.zero_()

    def _matched(self, state_dict: dict) -> list[dict]:
        """The saved state of every parameter."""
        try:
            saved, groups = state_dict["state"], [list(group["params"]) for group in state_dict["param_groups"]]
        except (TypeError, LookupError) as error:
            raise ValueError(f"state_dict: got {type(state_dict).__name__} without state and param_groups; needs what "
                             "state_dict() gave") from error  # fmt: skip
        got, needs = [len(g) for g in groups], [len(g["params"]) for g in self.param_groups]
        checks.require(got == needs, f"state_dict: groups of {got} parameters; needs {needs}: give that of an optimiser of the same ones")
        found = []
        for i, (key, p) in enumerate(zip(chain.from_iterable(groups), self.params)):
            state = {name: x for name, x in saved.get(key, {}).items() if x is not None}
            for name in (self.state[p].keys() | state.keys()) if state else ():
                got, needs = (tuple(torch.as_tensor(s[name]).shape) if name in s else None for s in (state, self.state[p]))
                checks.require(got == needs, f"state_dict: {name!r} of parameter {i} has shape {got}; needs {needs}: give that of an "
                                             "optimiser of the same parameters")  # fmt: skip
            found.append(state)
        return found


def _given(params: Iterable) -> list:
    """What torch.optim.Optimizer takes: tensors, (name, tensor), or dicts of a group's options."""
    if isinstance(params, (Tensor, str)) or not isinstance(params, Iterable):
        raise TypeError(f"params: got {type(params).__name__}; needs tensors, such as model.parameters(), or groups of them")
    params = list(params)
    checks.require(len(params) > 0, "params: got no tensor; needs one at least")
    for i, x in enumerate(params):
        one = x[-1] if isinstance(x, tuple) and len(x) == 2 else x
        if not isinstance(one, (Tensor, dict)):
            raise TypeError(f"params[{i}]: got {type(one).__name__}; needs a torch.Tensor, or a dict with 'params' and options")
    return params


def _number(name: str, value: float) -> None:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: got {type(value).__name__}; needs a number")
    checks.require(0 <= value < math.inf, f"{name}: got {value}; needs a finite number >= 0")


def facts(gram: Tensor, coef: Tensor, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What a projection did, from the step's Gram in few kernels: cosine of the first two directions, where there are two;
    removed, the share of ‖w‖ that it took away, 0 of nothing; and ‖w − P_V w‖.  w: its coefficients on the Gram's rows."""
    k, tiny = len(coef), torch.finfo(gram.dtype).tiny
    both = torch.stack([w, torch.cat([-coef, w[k:]])])
    total, kept = ((both @ gram) * both).sum(1).clamp(min=0).unbind()
    found = {"removed": ((total - kept) / total.clamp(min=tiny)).clamp(0, 1).sqrt()}
    if k >= 2:
        found["cosine"] = gram[0, 1] / gram.diagonal()[:2].clamp(min=tiny).sqrt().prod()
    return found, kept.sqrt()
