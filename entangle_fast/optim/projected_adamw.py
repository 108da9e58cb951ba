"""AdamW whose gradient loses its part in the span of given directions first."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops import check as checks
from ..ops.step import capturing
from .projected import Projected, Tensors, facts

_ADAMW = {
    "amsgrad": False, "maximize": False, "foreach": None, "capturable": False, "differentiable": False, "fused": None,
    "decoupled_weight_decay": True,
}  # fmt: skip


class ProjectedAdamW(Projected):
    """AdamW whose gradient loses its part in the span of given directions before the moments see it [ours]; a torch.optim.Optimizer.

        g' = g − P_V g ;  m ← β1 m + (1 − β1) g' ;  u ← β2 u + (1 − β2) g'² ;  θ ← (1 − lr·wd) θ − lr m̂ / (√û + eps) + noise ξ

    This is ours, not the paper's: Adam divides each coordinate by its own √û, a preconditioner after the projection, which
    turns the update partly back into the span; and m mixes gradients that were projected away from earlier spans. Neither
    the update nor m is orthogonal to the directions, as ProjectedMomentum's v is. Without directions and noise this is
    torch.optim.AdamW in float32 and float64; narrower parameters have float32 moments here.

    Args:
        params: the parameters, changed in place, or groups of them with their own lr, betas, eps, weight_decay and noise; their
            moments are float32 (float64 for float64).
        lr, betas, eps, weight_decay: as in torch.optim.AdamW.
        ridge: added to the k×k Gram, in its own units.
        noise: standard deviation added to every parameter in each step; of group i from Philox stream (seed + i·2³², count of
            steps + j·2³²), j being where the first parameter with this count stands in its group.

    Where a step solves for its coefficients, a gradient or a direction that is not finite makes the whole step NaN, all parameters and
    moments with it; without directions, as in torch, the elements that it meets. No later step recovers, nothing is left out or skipped
    in silence, and the host does not wait to look: look at the gradients before.

    Counts of steps, one for the parameters of a group that have always been stepped together, stand on the device: a captured
    CUDA graph counts on when it is replayed, in the bias corrections and in the noise.

    >>> import torch, entangle_fast as ef
    >>> p, forget, retain = torch.zeros(8), torch.randn(8), torch.randn(8)
    >>> optimizer = ef.optim.ProjectedAdamW([p], lr=0.1)
    >>> sorted(optimizer.step([forget], [[retain]]))           # one direction: no cosine of two
    ['removed']
    >>> bool((optimizer.exp_avg[0] @ retain).abs() < 1e-5)     # the moments are of the projected gradient, the update is not
    True
    """

    @checks.kinds
    def __init__(
        self, params: Iterable, *, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2, ridge: float = 0.0, noise: float = 0.0, seed: int = 0,
    ):  # fmt: skip
        self.seed = operator.index(seed)
        checks.require(abs(seed) < 1 << 62, f"seed: got {seed}; needs a whole number below 2**62")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "noise": noise}, ridge)

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"seed": self.seed}

    def _fresh(self, params):
        count = torch.zeros((), dtype=torch.int64, device=params[0].device) if params else None
        for p in params:
            m, u = (torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32), requires_grad=False) for _ in range(2))
            yield {"step": count, "exp_avg": m, "exp_avg_sq": u}

    @property
    def exp_avg(self) -> list[Tensor]:
        """m, tensors shaped like params."""
        return self._states("exp_avg")

    @property
    def exp_avg_sq(self) -> list[Tensor]:
        """u, tensors shaped like params."""
        return self._states("exp_avg_sq")

    @property
    def count(self) -> Tensor:
        """Steps taken of the first parameter, 0-d int64."""
        return self.state[self.params[0]]["step"]

    @checks.kinds
    @torch.no_grad()
    def step(
        self, grads: Tensors | Callable | None = None, directions: Sequence[Tensors] = (), coef: Tensor | None = None,
        closure: Callable | None = None,
    ) -> dict[str, Tensor] | Any:  # fmt: skip
        """One step with gradient ``grads`` less its part in span(``directions``), over all parameters at once.

        grads: tensors like params; None: what stands in .grad, parameters without one being left alone.  directions: k lists of
        tensors like params.  coef: (k,) of P_V g where the caller has solved for it.
        closure: called first, with gradients enabled: computes the loss and its .grad, as torch's (and Lightning's) closures do;
        a function in the place of grads is taken for it.
        Returns the facts of the step, or with a closure what that returned; ``facts`` has those of the last step in both cases:
        with directions and no coef given 0-d tensors, cosine of the first two (k ≥ 2), and removed, the share of ‖g‖ that the
        projection took away.
        """
        grads, closure, loss = self._closed(grads, closure)
        parts, grads, directions = self._parts(grads, directions)
        found = {}
        if coef is None and directions:
            gram, coef = ops.step_project(directions, None, grads, ridge=self.ridge)
            found, _ = facts(gram, coef, torch.cat([torch.zeros_like(coef), torch.ones_like(coef[:1])]))
        elif coef is None:
            coef = torch.zeros(0, dtype=torch.float64, device=grads[0].device)
        for i, group, params, own in parts:
            for first, places in self._by_count(group, params):
                ps, g, *ds = ([xs[j] for j in places] for xs in (params, grads[own], *(d[own] for d in directions)))
                held = self.state[ps[0]]["step"]
                count = held + 1
                ops.step_adamw(
                    ps, self._states("exp_avg", ps), self._states("exp_avg_sq", ps), g, ds, coef, count, lr=group["lr"],
                    betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"], noise=group["noise"],
                    seed=self.seed + (i << 32), offset=first << 32, counter=count,
                )  # fmt: skip
                held.copy_(count)  # in place, for a replayed graph, and only once the step was taken
        self.facts = found
        return found if closure is None else loss

    # ---- counts: one tensor for the parameters of a group that were stepped together ----

    def _by_count(self, group: dict, params: list[Tensor]) -> list[tuple[int, list[int]]]:
        """For each count of ``params``, those of a group that are stepped now: where its first one stands in the group, and where
        all stand in ``params``. The host knows them by their tensors, and never reads one."""
        at, found, waiting = {p: j for j, p in enumerate(params)}, {}, set()
        for k, p in enumerate(group["params"]):
            key = id(self.state[p]["step"])
            if p in at:
                found.setdefault(key, (k, []))[1].append(at[p])
            else:
                waiting.add(key)
        for key in found.keys() & waiting:
            self._count_apart([params[j] for j in found[key][1]])
        return list(found.values())

    def _count_apart(self, params: list[Tensor]) -> None:
        """A count of their own, from where it stands, for parameters that leave others behind."""
        if capturing(params[0].device):
            raise RuntimeError("grads: under a CUDA graph capture other parameters have a .grad than before; needs a step with these first")
        count = self.state[params[0]]["step"].clone()
        for p in params:
            self.state[p]["step"] = count

    def _for_torchs(self, state_dict):
        for group in state_dict["param_groups"]:
            group.update(_ADAMW | group)
        # AdamW counts each parameter's steps in place, in float32
        state_dict["state"] = {key: state | {"step": state["step"].float()} for key, state in state_dict["state"].items()}

    def _refuse_alike(self, group):
        if not {"noise", "amsgrad"} & group.keys():  # ours; AdamW's and Adam's
            raise ValueError("state_dict: a group without amsgrad, such as RAdam's, whose moments look alike and step otherwise; needs "
                             "that of ProjectedAdamW, AdamW or Adam")  # fmt: skip

    def _matched(self, state_dict):
        options, states = super()._matched(state_dict)
        saved: dict[int, dict[int, list[Tensor]]] = {}
        for p, state in zip(self.params, states):
            saved.setdefault(id(self.state[p]["step"]), {}).setdefault(int(state.get("step", 0)), []).append(p)
        for shared in saved.values():
            for params in list(shared.values())[1:]:
                self._count_apart(params)
        return options, states
