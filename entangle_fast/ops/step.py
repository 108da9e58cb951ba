"""step: one pass over all parameters, for a list of tensors at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import call
from . import check

Tensors = Sequence[Tensor]
_SHORTEST = 1e-30  # length of a direction


def _like(params: Tensors, name: str, tensors: Tensors) -> None:
    check.require(len(tensors) == len(params), f"{name}: {len(tensors)} tensors for {len(params)} parameters")
    for i, (p, x) in enumerate(zip(params, tensors)):
        check.require(p.shape == x.shape and p.device == x.device,
                      f"{name}[{i}]: {tuple(x.shape)} on {x.device}; needs {tuple(p.shape)} on {p.device}")  # fmt: skip
        for what, t in ((name, x), ("the tensor like which it shall be", p)):
            check.require(t.is_floating_point(), f"{name}[{i}]: {what} is of {t.dtype}; needs a real floating-point dtype")


def _flat(like: Tensors, directions: Sequence[Tensors]) -> list[Tensor]:
    for j, d in enumerate(directions):
        _like(like, f"directions[{j}]", d)
    return [x for d in directions for x in d]


def _coefficients(coef: Tensor, k: int) -> None:
    check.require(coef.shape == (k,), f"coef: shape {tuple(coef.shape)}; needs ({k},), one for each direction")


def _scalar(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...], like: Tensors) -> None:
    ok = x.dim() == 0 and x.dtype in dtypes and (not like or x.device == like[0].device)
    check.require(ok, f"{name}: shape {tuple(x.shape)}, {x.dtype} on {x.device}; needs a 0-d tensor of "
                      f"{' or '.join(map(str, dtypes))} on the parameters' device")  # fmt: skip


def step_gram(directions: Sequence[Tensors]) -> Tensor:
    """Gram of k directions over all parameters at once, accumulated in float64.

    directions: k lists of tensors shaped alike → (k, k) float64 on their device.
    """
    return call("step_gram", _flat(directions[0] if directions else [], directions), len(directions))


def step_project(
    directions: Sequence[Tensors], momentum: Tensors | None, grads: Tensors, *, beta: float = 0.0, ridge: float = 0.0,
    rcond: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """coef with Σ_k coef_k d_k = P_V (β v + g), V = span(directions), solved where the tensors are.

    Args:
        directions: k lists of p tensors.  momentum: v, p tensors, or None for none.  grads: g, p tensors.
        ridge: (K + ridge·I) coef = <d, β v + g>, in the Gram's own units.
        rcond: without a ridge, as in weights.solve: eigenvalues of the unit-diagonal Gram below rcond·largest count as
            zero, and of all solutions the one of least norm is found; in [0, 1), default k·eps of the directions' dtype,
            float64 or float32: what they are subtracted in.

    The coefficient of a direction shorter than 1e-30 that is not float64 is set to zero, since float32 may not hold it:
    what that direction shares with the momentum stays.

    Returns: the Gram, float64 (k + 2, k + 2) of the directions, v and g in this order ((k + 1, k + 1) without v), and
    coef (k,) float64. On a GPU up to 32 directions never make the host wait; more go through torch.linalg.
    """
    check.require(len(grads) > 0, "grads: got no tensor; needs one for each parameter")
    check.require(ridge >= 0, f"ridge: got {ridge}; needs a number >= 0")
    if momentum is not None:
        _like(grads, "momentum", momentum)
    flat = _flat(grads, directions)
    exact = all(d.dtype == torch.float64 for d in flat)
    if rcond is None:
        rcond = max(1, len(directions)) * torch.finfo(torch.float64 if exact else torch.float32).eps
    check.require(0 <= rcond < 1, f"rcond: got {rcond}; needs a number in [0, 1)")
    gram, coef = call("step_project", flat, list(momentum or ()), list(grads), beta, ridge, rcond)
    if not exact:  # else a saturated softmax's gradient of 1e-40 makes the parameters inf
        coef = torch.where(gram.diagonal()[: len(coef)] > _SHORTEST**2, coef, 0)
    return gram, coef


def step_update(
    params: Tensors, momentum: Tensors | None, grads: Tensors, directions: Sequence[Tensors], coef: Tensor, *,
    lr: float, beta: float = 0.0, weight_decay: float = 0.0, noise: float = 0.0, seed: int = 0, offset: int = 0,
    counter: Tensor | None = None,
) -> None:  # fmt: skip
    """v ← β v + g − Σ_k coef_k d_k;  θ ← (1 − lr·weight_decay) θ − lr v + noise ξ: in place, in one pass.

    Args:
        params, grads: p tensors.  momentum: p tensors that hold v afterwards, or None.
        directions: k lists of p tensors.  coef: (k,) on the parameters' device; never read by the host.
        noise: standard deviation of ξ's contribution; ξ is Philox stream (seed, offset + counter).
        counter: 0-d int64 on the parameters' device, or None: what a captured CUDA graph adds one to, so that its
            replays draw fresh noise.
    """
    _like(params, "grads", grads)
    if momentum is not None:
        _like(params, "momentum", momentum)
    flat = _flat(params, directions)
    _coefficients(coef, len(directions))
    if counter is not None:
        _scalar("counter", counter, (torch.int64,), params)
    call("step_update", list(params), list(momentum or ()), list(grads), flat, coef,
         lr, beta, weight_decay, noise, seed, offset, counter)  # fmt: skip


def step_adamw(
    params: Tensors, exp_avg: Tensors, exp_avg_sq: Tensors, grads: Tensors, directions: Sequence[Tensors], coef: Tensor,
    step: Tensor, *, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
    noise: float = 0.0, seed: int = 0, offset: int = 0, counter: Tensor | None = None,
) -> None:  # fmt: skip
    """AdamW on the projected gradient g' = g − Σ_k coef_k d_k, with noise: in place, in one pass.

        m ← β1 m + (1 − β1) g';  u ← β2 u + (1 − β2) g'²
        θ ← (1 − lr·weight_decay) θ − lr m̂ / (√û + eps) + noise ξ,   m̂ = m / (1 − β1^step),  û = u / (1 − β2^step)

    Args:
        params, grads: p tensors.  exp_avg, exp_avg_sq: m and u, float32, or float64 for float64 parameters.
        directions, coef: as in step_update; none and an empty coef are plain AdamW (torch.optim.AdamW).
        step: 0-d int64 or float64 on the parameters' device, how many steps have been taken with this one; the caller
            adds the one, and the host never reads it.
        noise, seed, offset, counter: as in step_update; counter may be step.
    """
    for name, tensors in (("grads", grads), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        _like(params, name, tensors)
    for i, (p, m, u) in enumerate(zip(params, exp_avg, exp_avg_sq)):
        wide = torch.promote_types(p.dtype, torch.float32)
        for name, x in (("exp_avg", m), ("exp_avg_sq", u)):
            check.require(x.dtype == wide, f"{name}[{i}]: {x.dtype} for a parameter of {p.dtype}; needs {wide}")
    check.require(len(betas) == 2, f"betas: got {betas}; needs two numbers in [0, 1)")
    for b in betas:
        check.require(0 <= b < 1, f"betas: got {betas}; needs two numbers in [0, 1)")
    check.require(eps >= 0, f"eps: got {eps}; needs a number >= 0")
    flat = _flat(params, directions)
    _coefficients(coef, len(directions))
    _scalar("step", step, (torch.int64, torch.float64), params)
    if counter is not None:
        _scalar("counter", counter, (torch.int64,), params)
    call("step_adamw", list(params), list(exp_avg), list(exp_avg_sq), list(grads), flat, coef, step,
         lr, *betas, eps, weight_decay, noise, seed, offset, counter)  # fmt: skip


def step_lookahead(params: Tensors, grads: Tensors, alpha: float) -> tuple[list[Tensor], Tensor, Tensor]:
    """θ ← θ − alpha·g in place; returns what step_lookahead_undo needs: one byte a parameter, not a copy."""
    _like(params, "grads", grads)
    return call("step_lookahead", list(params), list(grads), alpha)


def step_lookahead_undo(params: Tensors, grads: Tensors, residue: tuple, alpha: float) -> None:
    """Restore the bits that every parameter had before step_lookahead(params, grads, alpha) returned ``residue``."""
    _like(params, "grads", grads)
    ulps, index, value = residue
    call("step_lookahead_undo", list(params), list(grads), list(ulps), index, value, alpha)
