"""One pass over all parameters: Gram and projection, projected momentum and AdamW steps, look-ahead and its exact undo."""

from __future__ import annotations

import torch
from torch import Tensor

from . import philox
from .solve import least_norm


def step_gram(tensors: list[Tensor], k: int) -> Tensor:
    """Gram of k directions over all parameters at once, float64 (k, k).

    tensors: k·p tensors, direction-major: the p tensors of direction 0, then of direction 1, …
    """
    p = len(tensors) // k if k else 0
    out = torch.zeros(k, k, dtype=torch.float64, device=tensors[0].device if tensors else None)
    for i in range(p):
        rows = torch.stack([tensors[j * p + i].flatten() for j in range(k)]).double()
        out += rows @ rows.T
    return out


def step_project(
    directions: list[Tensor], momentum: list[Tensor], grads: list[Tensor], beta: float, ridge: float, rcond: float
) -> tuple[Tensor, Tensor]:
    """coef (k,) float64 with Σ_k coef_k d_k = P_V (β v + g), and the Gram it was solved from, in one reading.

    directions: k·p tensors, direction-major; momentum: p tensors, or none (then the projected vector is g); grads: p.
    Gram (k + 2, k + 2) float64 of the directions, v and g, in this order; (k + 1, k + 1) without v.
    coef: (K + ridge·I) coef = β <d, v> + <d, g>, solved as solve.least_norm does.
    """
    k = len(directions) // len(grads)
    gram = step_gram([*directions, *momentum, *grads], k + (2 if momentum else 1))
    inner = gram[:k, -1]
    if momentum:
        inner = beta * gram[:k, k] + inner
    return gram, least_norm(gram[:k, :k], inner, ridge, rcond)


def _projected(i: int, p: int, x: Tensor, directions: list[Tensor], coef: Tensor) -> Tensor:
    for j in range(len(coef)):
        x = x - coef[j].to(x.dtype) * directions[j * p + i].to(x.dtype)
    return x


def _noise(theta: Tensor, start: int, scale: float, seed: int, offset: int, counter: Tensor | None) -> Tensor | float:
    if not scale:
        return 0.0
    xi = philox.normal(theta.numel(), seed, offset if counter is None else offset + counter, start, theta.device)
    return scale * xi.view(theta.shape).to(torch.promote_types(theta.dtype, torch.float32))


def step_update(
    params: list[Tensor], momentum: list[Tensor], grads: list[Tensor], directions: list[Tensor], coef: Tensor,
    lr: float, beta: float = 0.0, weight_decay: float = 0.0, noise: float = 0.0, seed: int = 0, offset: int = 0,
    counter: Tensor | None = None,
) -> None:  # fmt: skip
    """v ← β v + g − Σ_k coef_k d_k;  θ ← (1 − lr·weight_decay) θ − lr v + noise ξ,  ξ ~ N(0, 1), in place.

    params, grads: p tensors; momentum: p tensors, or none (then v lives only within the step);
    directions: k·p tensors, direction-major; coef (k,) on the parameters' device (no host sync).
    ξ is Philox stream (seed, offset + counter), element e of the p tensors laid end to end; counter: 0-d int64 on the
    device, or None for 0.
    """
    start, p = 0, len(params)
    for i, (theta, g) in enumerate(zip(params, grads)):
        dtype = torch.promote_types(theta.dtype, torch.float32)
        v = g.to(dtype) if not momentum else momentum[i].to(dtype) * beta + g.to(dtype)
        v = _projected(i, p, v, directions, coef)
        if momentum:
            momentum[i].copy_(v)
        new = theta.to(dtype) * (1 - lr * weight_decay) - lr * v
        theta.copy_(new + _noise(theta, start, noise, seed, offset, counter))
        start += theta.numel()


def step_adamw(
    params: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor], grads: list[Tensor], directions: list[Tensor],
    coef: Tensor, step: Tensor, lr: float, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8,
    weight_decay: float = 0.0, noise: float = 0.0, seed: int = 0, offset: int = 0, counter: Tensor | None = None,
) -> None:  # fmt: skip
    """AdamW (Loshchilov and Hutter, ICLR 2019) on a projected gradient, with noise, in place.

        g' = g − Σ_k coef_k d_k;  m ← β1 m + (1 − β1) g';  u ← β2 u + (1 − β2) g'²
        θ ← (1 − lr·weight_decay) θ − lr m̂ / (√û + eps) + noise ξ,   m̂ = m / (1 − β1^step),  û = u / (1 − β2^step)

    exp_avg, exp_avg_sq: m and u, float32 (float64 for float64 parameters); step: 0-d, the count of this step, from 1 on;
    the rest as in step_update.
    """
    start, p = 0, len(params)
    count = step.double()
    size, root = lr / (1 - beta1**count), (1 - beta2**count).sqrt()
    for i, (theta, g, m, u) in enumerate(zip(params, grads, exp_avg, exp_avg_sq)):
        dtype = m.dtype
        g = _projected(i, p, g.to(dtype), directions, coef)
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        u.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        new = theta.to(dtype) * (1 - lr * weight_decay) - size.to(dtype) * m / (u.sqrt() / root.to(dtype) + eps)
        theta.copy_(new + _noise(theta, start, noise, seed, offset, counter))
        start += theta.numel()


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _ordered(x: Tensor) -> Tensor:
    """Floats as integers (int64) in which neighbouring floats differ by one; −0 is one below +0."""
    bits = x.contiguous().view(_BITS[x.element_size()]).to(torch.int64)
    return torch.where(bits < 0, -(bits & (2 ** (8 * x.element_size() - 1) - 1)) - 1, bits)


def _from_ordered(i: Tensor, dtype: torch.dtype, size: int) -> Tensor:
    top = -(2 ** (8 * size - 1))
    bits = torch.where(i < 0, (-i - 1) | top, i)
    return bits.to(_BITS[size]).view(dtype)


_UNMOVED = -128  # in ulps: an element that found no slot, left as it was


def step_lookahead(
    params: list[Tensor], grads: list[Tensor], alpha: float, capacity: int | None = None
) -> tuple[list[Tensor], Tensor, Tensor]:
    """θ ← θ − alpha·g in place, with what an exact undo needs: one byte a parameter instead of a copy.

    Returns ulps: int8 like each parameter, within ±127, how many floats the plain undo θ + alpha·g lands off;
    index (q, 2) int64 and value (q,) float64: (tensor, element) and old value of the few elements
    that are off by more than 127 (weights far smaller than their step) or not finite.
    With a capacity q is that number, whatever the data, and the host never waits: those elements fill the first slots, in
    order; what is left over holds index −1 and value 0. One that finds no slot is not moved, and its ulps is −128.
    """
    device = params[0].device if params else None
    ulps, index, value = [], [torch.zeros(0, 2, dtype=torch.int64, device=device)], [torch.zeros(0, dtype=torch.float64, device=device)]
    if capacity is not None:  # one slot more, where all the others go
        index = torch.full((capacity + 1, 2), -1, dtype=torch.int64, device=device)
        value = torch.zeros(capacity + 1, dtype=torch.float64, device=device)
        taken = torch.zeros((), dtype=torch.int64, device=device)
    for i, (theta, g) in enumerate(zip(params, grads)):
        old = theta.clone()
        theta.sub_(g.to(theta.dtype), alpha=alpha)
        back = theta.add(g.to(theta.dtype), alpha=alpha)
        off = _ordered(old) - _ordered(back)
        far = (off > 127) | (off < -127) | ~torch.isfinite(back)
        off = off.clamp(-127, 127).to(torch.int8)
        if capacity is None:
            where = far.flatten().nonzero().squeeze(1)
            index.append(torch.stack([torch.full_like(where, i), where], 1))
            value.append(old.flatten()[where].double())
        else:
            slot = far.flatten().cumsum(0) - 1 + taken
            taken = taken + far.sum()
            slot = torch.where(far.flatten(), slot.clamp(max=capacity), capacity)
            index[slot] = torch.stack([torch.full_like(slot, i), torch.arange(len(slot), device=device)], 1)
            value[slot] = old.flatten().double()
            unmoved = far & (slot == capacity).view(far.shape)
            theta.copy_(torch.where(unmoved, old, theta))
            off.masked_fill_(unmoved, _UNMOVED)
        ulps.append(off)
    if capacity is None:
        return ulps, torch.cat(index), torch.cat(value)
    return ulps, index[:capacity], value[:capacity]


def step_lookahead_undo(
    params: list[Tensor], grads: list[Tensor], ulps: list[Tensor], index: Tensor, value: Tensor, alpha: float
) -> None:
    """Put every parameter back to the very bits it had before step_lookahead with the same grads and alpha.

    Elements of ulps −128 stay as they are; rows of index −1 are of no element. The host never waits.
    """
    for i, (theta, g, off) in enumerate(zip(params, grads, ulps)):
        back = theta.add(g.to(theta.dtype), alpha=alpha)
        exact = _from_ordered(_ordered(back) + off, theta.dtype, theta.element_size()).view(theta.shape)
        exact = torch.where(off == _UNMOVED, theta, exact)
        if len(index):
            flat = torch.nn.functional.pad(exact.flatten(), (0, 1))  # one element more, where the rows of others go
            flat[torch.where(index[:, 0] == i, index[:, 1], theta.numel())] = value.to(theta.dtype)
            exact = flat[:-1].view(theta.shape)
        theta.copy_(exact)
