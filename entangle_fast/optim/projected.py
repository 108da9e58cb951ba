"""What the projected optimisers share: torch's parameter groups and state_dict, gradients and directions given as lists."""

from __future__ import annotations

import copy
import math
import numbers
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import check as checks
from ..ops.step import apart

Tensors = Sequence[Tensor]

_NUMBERS = ("lr", "momentum", "eps", "weight_decay", "noise")
_CHANGES_A_STEP = {"amsgrad", "betas", "dampening", "maximize", "momentum", "nesterov", "noise", "project", "ridge", "seed"}


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
        self.facts: dict[str, Tensor] = {}
        super().__init__(_given(params), defaults)
        self.register_state_dict_post_hook(type(self)._for_torchs)  # the first: the user's hooks see what is saved

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"ridge": self.ridge, "facts": self.facts}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.register_state_dict_post_hook(type(self)._for_torchs)  # torch copies and pickles no hooks

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
            _options(group)
            self._understood(group)
            for p in group["params"]:
                checks.require(p.is_floating_point(), f"params: got one of {p.dtype}; needs real floating-point tensors: leave it out")
            there = sorted({str(p.device) for p in self.params})
            checks.require(len(there) <= 1, f"params: on {' and '.join(there)}; the span is one over all groups and needs one device")
            if self.params:
                apart(params=self.params)
            with torch.inference_mode(False):  # state that can be written outside it too
                fresh = list(self._fresh(group["params"]))
        except BaseException:
            self.param_groups.pop()
            raise
        self.state.update(zip(group["params"], fresh))

    def _understood(self, group: dict) -> None:
        """Options of torch's optimisers, and of ours as a whole, which would be passed over in silence: refused where they change a
        step, else taken out."""
        coupled = "dampening" in group or group.pop("decoupled_weight_decay", True) is False
        if coupled and group["weight_decay"]:
            raise ValueError(f"weight_decay: got {group['weight_decay']} that is added to the gradient, as in torch's SGD and Adam; "
                             "needs 0, or the decay of one that decouples it, as AdamW does")  # fmt: skip
        for name in sorted(_CHANGES_A_STEP - self.defaults.keys()):
            if value := group.pop(name, None):
                raise ValueError(f"{name}: got {value!r} for a group; {type(self).__name__} has no such option of groups: leave it out")

    @staticmethod
    def _closed(grads: Tensors | Callable | None, closure: Callable | None) -> tuple[Tensors | None, Callable | None, object]:
        """The gradients, the closure and what it returned. A function in the first place is the closure, as in torch."""
        if callable(grads):
            checks.require(closure is None, "closure: got two functions; needs one")
            grads, closure = None, grads
        if closure is None:
            return grads, None, None
        checks.require(grads is None, "closure: got grads too; needs one of the two")
        with torch.enable_grad():
            return None, closure, closure()

    def _parts(self, grads: Tensors | None, directions: Sequence[Tensors]) -> tuple[list[Part], list[Tensor], list[list[Tensor]]]:
        """Each group's share, gradients and directions of what is stepped: everything, or what has a .grad."""
        params, parts, at = self.params, [], 0
        given = list(directions)
        directions = [list(d) for d in given]
        for j, d in enumerate(directions):
            if len(d) != len(params) and isinstance(given[j], Tensor):
                raise TypeError(f"directions[{j}]: got a tensor; needs a list of {len(params)} like params: give directions=[direction]")
            checks.require(len(d) == len(params), f"directions[{j}]: {len(d)} tensors for {len(params)} parameters; needs one for each")
        taken = [True] * len(params) if grads is not None else [p.grad is not None for p in params]
        if grads is None:
            checks.require(any(taken), "grads: got none, and no parameter has a .grad; needs tensors like params, or a backward before")
            grads = [p.grad for p in params if p.grad is not None]
            directions = [[x for x, t in zip(d, taken) if t] for d in directions]
        grads = list(grads)
        if len(grads) != sum(taken) or not grads:
            raise ValueError(f"grads: {len(grads)} tensors for {len(params)} parameters; needs one for each, and one at least")
        for i, g in enumerate(grads):
            if g.layout != torch.strided:
                raise ValueError(f"grads[{i}]: {g.layout}; needs a dense one: give .to_dense(), or nn.Embedding(sparse=False)")
        flags = iter(taken)
        for i, group in enumerate(self.param_groups):
            if own := [p for p, t in zip(group["params"], flags) if t]:
                _options(group)  # a scheduler or the user may have written there
                parts.append(Part(i, group, own, slice(at, at + len(own))))
                at += len(own)
        if len(parts) > 1:  # what the last group's step would refuse, before the first group's is taken
            stepped = [p for part in parts for p in part.params]
            checks.like(stepped, "grads", grads)
            for j, d in enumerate(directions):
                checks.like(stepped, f"directions[{j}]", d)
        return parts, grads, directions

    # ---- the state ----

    @abstractmethod
    def _for_torchs(self, state_dict: dict) -> None:
        """Complete what is saved, so that torch's own optimiser goes on from it too. The inner dicts of "state" are the live ones."""

    def _states(self, name: str, params: Iterable[Tensor] | None = None) -> list[Tensor]:
        return [self.state[p][name] for p in (self.params if params is None else params)]

    @abstractmethod
    def _refuse_alike(self, group: dict) -> None:
        """Raise ValueError for a saved group of an optimiser whose state looks alike and that steps otherwise."""

    def load_state_dict(self, state_dict: dict) -> None:
        """Take over what state_dict() gave, of an optimiser of parameters of the same shapes; an error before anything is changed.

        Options of groups come with it, as in torch; ridge, project and seed, which are of all groups, do not. That of torch.optim.SGD
        or AdamW is taken too, unless it holds what would step otherwise here: nesterov, dampening, maximize, amsgrad, or a decay that
        is not decoupled. RAdam's, RMSprop's and Muon's, which look alike, are refused. A parameter without state begins anew.

        The other way round torch.optim.SGD and AdamW take what state_dict() gives, with these exceptions: SGD has no decoupled decay, so
        that it fails (KeyError: 'dampening') on a group with one; AdamW passes over noise.
        """
        state_dict = copy.copy(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            adapted = hook(self, state_dict)
            state_dict = state_dict if adapted is None else adapted
        options, states = self._matched(state_dict)
        with torch.no_grad():  # not by torch's: it would narrow moments to their parameter's dtype, and not load in place
            for p, saved in zip(self.params, states):
                for name, x in self.state[p].items():
                    x.copy_(saved[name]) if saved else x.zero_()
        for group, saved in zip(self.param_groups, options):
            group.update(saved)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _matched(self, state_dict: dict) -> tuple[list[dict], list[dict[str, Tensor]]]:
        """The saved options of every group, and the saved state of every parameter."""
        try:
            groups = [list(group["params"]) for group in state_dict["param_groups"]]
            options = [copy.deepcopy({k: x for k, x in group.items() if k != "params"}) for group in state_dict["param_groups"]]
            saved = [state_dict["state"].get(key, {}).items() for key in chain.from_iterable(groups)]
            states = [{name: torch.as_tensor(x) for name, x in items if x is not None} for items in saved]
        except (TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"state_dict: got {type(state_dict).__name__}, which is not what state_dict() gave: {error!r}") from error
        got, needs = [len(g) for g in groups], [len(g["params"]) for g in self.param_groups]
        checks.require(got == needs, f"state_dict: groups of {got} parameters; needs {needs}: give that of an optimiser of the same ones")
        for group in options:
            missing = self.defaults.keys() - {"noise", "differentiable"} - group.keys()  # torch's AdamW has no noise
            checks.require(not missing, f"state_dict: a group without {' and '.join(sorted(missing))}; needs that of a like optimiser")
            self._refuse_alike(group)
            _options(group)
            self._understood(group)
        for i, (p, state) in enumerate(zip(self.params, states)):
            for name in (self.state[p].keys() | state.keys()) if state else ():
                got, needs = (tuple(s[name].shape) if name in s else None for s in (state, self.state[p]))
                checks.require(got == needs, f"state_dict: {name!r} of parameter {i} has shape {got}; needs {needs}: give that of an "
                                             "optimiser of the same parameters")  # fmt: skip
                x = state[name]
                if x.layout != torch.strided or x.is_complex() or x.is_meta != p.is_meta:
                    raise ValueError(f"state_dict: {name!r} of parameter {i} is {x.layout}, {x.dtype}, on {x.device}; needs dense, real "
                                     "numbers")  # fmt: skip
        return options, states


def _given(params: Iterable) -> list:
    """What torch.optim.Optimizer takes: tensors, (name, tensor), or dicts of a group's options."""
    if isinstance(params, (Tensor, str, torch.nn.Module)) or not isinstance(params, Iterable):
        raise TypeError(f"params: got {type(params).__name__}; needs tensors, such as model.parameters(), or groups of them")
    params = list(params)
    checks.require(len(params) > 0, "params: got no tensor; needs one at least")
    for i, x in enumerate(params):
        one = x[-1] if isinstance(x, tuple) and len(x) == 2 else x
        if not isinstance(one, (Tensor, dict)) or (isinstance(one, dict) and "params" not in one):
            raise TypeError(f"params[{i}]: got {type(one).__name__}; needs a torch.Tensor, or a dict with 'params' and options")
    return params


def _number(name: str, value: float) -> None:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: got {type(value).__name__}; needs a number{': give .item()' if isinstance(value, Tensor) else ''}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: got {value}; needs a finite number >= 0")


def _options(group: dict) -> None:
    """A group's options are numbers that a step can be taken with."""
    for name in _NUMBERS:
        if name in group:
            _number(name, group[name])
    if "betas" in group:
        checks.betas(group["betas"])


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
