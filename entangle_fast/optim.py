"""Optimiser steps over many tensors: projected momentum, decay and noise, look-ahead with an exact undo.

Everything that a step decides stays on the device, the k×k solve too: a step never makes the host wait, and with up to 32
directions it can be captured into a CUDA graph; so can a look-ahead that is given a capacity.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from . import ops
from .ops import check as checks

Tensors = Sequence[Tensor]


def _facts(gram: Tensor, coef: Tensor, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What a projection did, from the step's Gram in few kernels: cosine of the first two directions, where there are two;
    removed, the share of ‖w‖ that it took away, 0 of nothing; and ‖w − P_V w‖.  w: its coefficients on the Gram's rows."""
    k, tiny = len(coef), torch.finfo(gram.dtype).tiny
    both = torch.stack([w, torch.cat([-coef, w[k:]])])
    total, kept = ((both @ gram) * both).sum(1).clamp(min=0).unbind()
    found = {"removed": ((total - kept) / total.clamp(min=tiny)).clamp(0, 1).sqrt()}
    if k >= 2:
        found["cosine"] = gram[0, 1] / gram.diagonal()[:2].clamp(min=tiny).sqrt().prod()
    return found, kept.sqrt()


def _some(params: Tensors) -> list[Tensor]:
    if not (found := list(params)):
        raise ValueError("params: got no tensor; needs one at least")
    return found


def _load(mine: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Copy state into mine, or raise ValueError before anything is changed."""
    for name in mine.keys() | state.keys():
        got, needs = (tuple(s[name].shape) if name in s else None for s in (state, mine))
        if got != needs:
            raise ValueError(f"state: {name!r} has shape {got}; needs {needs}: give the state of an optimiser of the same parameters")
    for name, x in mine.items():
        x.copy_(state[name])


class ProjectedMomentum:
    """SGD whose momentum buffer is kept orthogonal to given directions (methods.md §1, stage 2).

        v ← m v + g ;  v ← v − P_V v ;  θ ← θ − lr v

    Args:
        params: the parameters, changed in place.
        lr, momentum, weight_decay: as in torch.optim.SGD, the decay decoupled.
        ridge: added to the k×k Gram, in its own units; the authors add 1e-8 once per parameter tensor.
        project: "momentum" (above, the authors'), or "gradient": v ← m v + (g − P_V g).

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
        self, params: Tensors, *, lr: float, momentum: float = 0.9, weight_decay: float = 0.0, ridge: float = 0.0,
        project: str = "momentum",
    ):  # fmt: skip
        if project not in ("momentum", "gradient"):
            raise ValueError(f"project: got {project!r}; needs 'momentum' or 'gradient'")
        self.params = _some(params)
        self.lr, self.momentum, self.weight_decay, self.ridge = lr, momentum, weight_decay, ridge
        self.carried = momentum if project == "momentum" else 0.0  # the share of the old v that is projected again
        self.buffers = [torch.zeros_like(p, requires_grad=False) for p in self.params]
        self._w = torch.zeros(0)  # w on the rows of the last step's Gram

    @checks.kinds
    @torch.no_grad()
    def step(
        self, grads: Tensors, directions: Sequence[Tensors], coef: Tensor | None = None, check: Callable[[Tensor], None] | None = None
    ) -> dict[str, Tensor]:
        """One step with gradient ``grads``, away from span(``directions``), over all parameters at once.

        grads: tensors like params.  directions: k such lists.  coef: (k,) of P_V where the caller has solved for it.
        check: called with the Gram of (directions, v where it is projected again, grads) before anything is changed: where
        it raises, nothing was.
        Returns 0-d tensors: cosine of the first two directions (k ≥ 2), step_norm, lr·‖w − P_V w‖ of what was projected
        (w = m v + g, or g), and removed, the share of ‖w‖ that the projection took away.
        """
        k, held = len(directions), self.buffers if self.carried else None
        if coef is None:
            gram, coef = ops.step_project(directions, held, grads, beta=self.carried, ridge=self.ridge)
        else:
            gram, coef = ops.step_gram([*directions, *([held] if held else []), grads]), coef.double()
        if check is not None:
            check(gram)
        ops.step_update(
            self.params, self.buffers, grads, directions, coef, lr=self.lr, beta=self.momentum,
            weight_decay=self.weight_decay,
        )  # fmt: skip
        if len(self._w) != len(gram):
            self._w = gram.new_zeros(len(gram))
            self._w[k:] = 1.0
            self._w[k:-1] = self.carried
        found, kept = _facts(gram, coef, self._w)
        return {"step_norm": self.lr * kept, **found}

    def state(self) -> dict[str, Tensor]:
        return {f"momentum.{i}": v for i, v in enumerate(self.buffers)}

    def load(self, state: dict[str, Tensor]) -> None:
        _load(self.state(), {name: state[name] for name in state if name.startswith("momentum.")})


class ProjectedAdamW:
    """AdamW whose gradient loses its part in the span of given directions before the moments see it [ours].

        g' = g − P_V g ;  m ← β1 m + (1 − β1) g' ;  u ← β2 u + (1 − β2) g'² ;  θ ← (1 − lr·wd) θ − lr m̂ / (√û + eps) + noise ξ

    This is ours, not the paper's: Adam divides each coordinate by its own √û, a preconditioner after the projection, which
    turns the update partly back into the span; and m mixes gradients that were projected away from earlier spans. Neither
    the update nor m is orthogonal to the directions, as ProjectedMomentum's v is. Without directions and noise this is
    torch.optim.AdamW in float32 and float64; narrower parameters have float32 moments here.

    Args:
        params: the parameters, changed in place; their moments are float32 (float64 for float64).
        lr, betas, eps, weight_decay: as in torch.optim.AdamW.
        ridge: added to the k×k Gram, in its own units.
        noise: standard deviation added to every parameter in each step; from Philox stream (seed, count of the step).

    The count of steps stands on the device: a captured CUDA graph counts on when it is replayed, in the bias corrections
    and in the noise.

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
        self, params: Tensors, *, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2, ridge: float = 0.0, noise: float = 0.0, seed: int = 0,
    ):  # fmt: skip
        self.params = _some(params)
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.ridge, self.noise, self.seed = ridge, noise, seed
        wide = [torch.promote_types(p.dtype, torch.float32) for p in self.params]
        self.exp_avg = [torch.zeros_like(p, dtype=w, requires_grad=False) for p, w in zip(self.params, wide)]
        self.exp_avg_sq = [torch.zeros_like(m) for m in self.exp_avg]
        self.count = torch.zeros((), dtype=torch.int64, device=self.params[0].device)

    @checks.kinds
    @torch.no_grad()
    def step(self, grads: Tensors, directions: Sequence[Tensors] = (), coef: Tensor | None = None) -> dict[str, Tensor]:
        """One step with gradient ``grads`` less its part in span(``directions``), over all parameters at once.

        grads: tensors like params.  directions: k such lists.  coef: (k,) of P_V g where the caller has solved for it.
        Returns, with directions and no coef given, 0-d tensors: cosine of the first two (k ≥ 2), and removed, the share
        of ‖g‖ that the projection took away.
        """
        k, found = len(directions), {}
        if coef is None and k:
            gram, coef = ops.step_project(directions, None, grads, ridge=self.ridge)
            found, _ = _facts(gram, coef, torch.cat([torch.zeros_like(coef), torch.ones_like(coef[:1])]))
        elif coef is None:
            coef = torch.zeros(0, dtype=torch.float64, device=self.count.device)
        count = self.count + 1
        ops.step_adamw(
            self.params, self.exp_avg, self.exp_avg_sq, grads, directions, coef, count, lr=self.lr, betas=self.betas,
            eps=self.eps, weight_decay=self.weight_decay, noise=self.noise, seed=self.seed, counter=count,
        )  # fmt: skip
        self.count.copy_(count)  # in place, for a replayed graph, and only once the step was taken
        return found

    def state(self) -> dict[str, Tensor]:
        out = {"count": self.count}
        for i, (m, u) in enumerate(zip(self.exp_avg, self.exp_avg_sq)):
            out |= {f"exp_avg.{i}": m, f"exp_avg_sq.{i}": u}
        return out

    def load(self, state: dict[str, Tensor]) -> None:
        _load(self.state(), state)


@checks.kinds
@torch.no_grad()
def decay_noise_step(
    params: Tensors, grads: Tensors, *, lr: float, weight_decay: float = 0.0, noise: float = 0.0, seed: int = 0,
    offset: int = 0, counter: Tensor | None = None,
) -> None:  # fmt: skip
    """θ ← (1 − lr·weight_decay) θ − lr g + noise ξ, ξ ~ N(0, 1) from Philox stream (seed, offset + counter): one pass.

    counter: 0-d int64 on the device; a captured CUDA graph that adds one to it draws fresh noise in every replay.

    Equivalent to: ``[p * (1 - lr * weight_decay) - lr * g + noise * torch.randn_like(p) for p, g in zip(params, grads)]``, the
    parameters being written in place and the noise another draw
    """
    params = _some(params)
    none = torch.zeros(0, dtype=torch.float64, device=params[0].device)
    ops.step_update(
        params, None, grads, [], none, lr=lr, weight_decay=weight_decay, noise=noise, seed=seed, offset=offset, counter=counter
    )


@contextlib.contextmanager
def lookahead(params: Tensors, grads: Tensors, alpha: float, capacity: int | None = None) -> Iterator[None]:
    """Inside the ``with`` the parameters stand at θ − alpha·g; afterwards at the very bits they had before.

    One byte a parameter is held, not a copy of the model. grads must not change in between. Autograd counts both as changes:
    a graph that was built before cannot be differentiated afterwards.

    capacity: elements that may need more than the byte (|θ| far below |alpha·g|, or not finite). None: as many as there are; on
    a GPU the host waits once to know. An int ≥ 0: no wait, and the whole can be captured into a CUDA graph; elements beyond it
    stay at θ inside the ``with``. ops.step_lookahead says how to count them.

    >>> import torch, entangle_fast as ef
    >>> p = torch.tensor([0.1, 0.2])
    >>> with ef.optim.lookahead([p], [torch.ones(2)], alpha=0.5):
    ...     print(p)
    tensor([-0.4000, -0.3000])
    >>> p
    tensor([0.1000, 0.2000])
    """
    with torch.no_grad():
        residue = ops.step_lookahead(params, grads, alpha, capacity)
    try:
        yield
    finally:
        with torch.no_grad():
            ops.step_lookahead_undo(params, grads, residue, alpha)
