"""step: one pass over all parameters, for a list of tensors at once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..dispatch import call
from . import check

Tensors = Sequence[Tensor]


def _like(params: Tensors, name: str, tensors: Tensors) -> None:
    check.require(len(tensors) == len(params), f"{name}: {len(tensors)} tensors for {len(params)} parameters")
    for i, (p, x) in enumerate(zip(params, tensors)):
        check.require(p.shape == x.shape and p.device == x.device,
                      f"{name}[{i}]: {tuple(x.shape)} on {x.device}; needs {tuple(p.shape)} on {p.device}")  # fmt: skip


def step_gram(directions: Sequence[Tensors]) -> Tensor:
    """Gram of k directions over all parameters at once, accumulated in float64.

    directions: k lists of tensors shaped alike → (k, k) float64 on their device.
    """
    for j, d in enumerate(directions):
        _like(directions[0], f"directions[{j}]", d)
    return call("step_gram", [x for d in directions for x in d], len(directions))


def step_update(
    params: Tensors, momentum: Tensors | None, grads: Tensors, directions: Sequence[Tensors], coef: Tensor, *,
    lr: float, beta: float = 0.0, weight_decay: float = 0.0, noise: float = 0.0, seed: int = 0, offset: int = 0,
) -> None:  # fmt: skip
    """v ← β v + g − Σ_k coef_k d_k;  θ ← (1 − lr·weight_decay) θ − lr v + noise ξ: in place, in one pass.

    Args:
        params, grads: p tensors.  momentum: p tensors that hold v afterwards, or None.
        directions: k lists of p tensors.  coef: (k,) on the parameters' device; never read by the host.
        noise: standard deviation of ξ's contribution; ξ is Philox stream (seed, offset).
    """
    _like(params, "grads", grads)
    if momentum is not None:
        _like(params, "momentum", momentum)
    for j, d in enumerate(directions):
        _like(params, f"directions[{j}]", d)
    check.require(coef.shape == (len(directions),), f"coef: shape {tuple(coef.shape)}; needs ({len(directions)},)")
    flat = [x for d in directions for x in d]
    call("step_update", list(params), list(momentum or ()), list(grads), flat, coef,
         lr, beta, weight_decay, noise, seed, offset)  # fmt: skip


def step_lookahead(params: Tensors, grads: Tensors, alpha: float) -> tuple[list[Tensor], Tensor, Tensor]:
    """θ ← θ − alpha·g in place; returns what step_lookahead_undo needs: one byte a parameter, not a copy."""
    _like(params, "grads", grads)
    return call("step_lookahead", list(params), list(grads), alpha)


def step_lookahead_undo(params: Tensors, grads: Tensors, residue: tuple, alpha: float) -> None:
    """Restore the bits that every parameter had before step_lookahead(params, grads, alpha) returned ``residue``."""
    _like(params, "grads", grads)
    ulps, index, value = residue
    call("step_lookahead_undo", list(params), list(grads), list(ulps), index, value, alpha)
