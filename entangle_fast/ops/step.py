"""step: one pass over all parameters, for a list of tensors at once.

A step that writes runs as under torch.no_grad(), on every backend, and counts in the version of each tensor it changed: a
backward that had saved one raises. Before anything is changed, ValueError is raised for what cannot be stepped: lists that do
not fit each other, no tensor, integers, and written tensors that share memory, since an update would be lost; of a look-ahead
gradients too that share it with a parameter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..dispatch import call
from . import check

Tensors = Sequence[Tensor]


def _some(name: str, tensors: Sequence, what: str = "tensor") -> None:
    if not len(tensors):
        raise ValueError(f"{name}: got no {what}; needs one at least")
    if what == "tensor" and len(there := {x.device for x in tensors}) > 1:
        raise ValueError(f"{name}: on {' and '.join(sorted(map(str, there)))}; needs one device: move them with .to(...)")


def _momentum(params: Tensors, momentum: Tensors | None) -> None:
    if momentum is None:
        return
    check.like(params, "momentum", momentum)
    for i, (p, v) in enumerate(zip(params, momentum)):
        if v.dtype == torch.float64 != p.dtype:
            raise ValueError(f"momentum[{i}]: torch.float64 for a parameter of {p.dtype}, which is stepped in float32; needs "
                             "float32 or narrower: convert with .float()")  # fmt: skip


def _reach(x: Tensor) -> int:
    """Elements from the first to the last in memory; 0 where two of x may be one."""
    reach = 1
    for stride, size in sorted(zip(x.stride(), x.shape)):
        if size > 1 and stride < reach:
            return 0
        reach += stride * (size - 1)
    return reach


def apart(**written: Tensors | None) -> None:
    """No element that is written stands in memory twice. Of views with gaps only the first elements are compared."""
    every = [x for xs in written.values() if xs is not None for x in xs]
    if torch.compiler.is_compiling() or hasattr(every[0], "fake_mode"):
        return  # a traced tensor has no memory
    if len({x.data_ptr() for x in every}) == len(every) and all(x.is_contiguous() and not x.storage_offset() for x in every):
        return  # of two that overlap, one begins where the other does or inside of a storage
    last, full, end = (0,), (0,), 0  # the one that began last, and of those without gaps the one that ends last
    named = [(x.data_ptr(), name, i, x) for name, xs in written.items() if xs is not None for i, x in enumerate(xs)]
    for row in sorted(named, key=lambda row: row[0]):
        start, name, i, x = row
        reach = x.numel() if x.is_contiguous() else _reach(x)
        if x.numel() and not reach:
            raise ValueError(f"{name}[{i}]: elements of shape {tuple(x.shape)} with strides {x.stride()} share memory; needs memory "
                             "for each: give .contiguous()")  # fmt: skip
        if not start:
            continue  # no element, or of the meta device
        dense = reach == x.numel()  # else another may stand in its gaps
        if start == last[0] or (dense and start < end):
            _, other, j, _ = last if start == last[0] else full
            raise ValueError(f"{name}[{i}]: shares memory with {other}[{j}], one update would be lost; give each tensor once, "
                             "or a .clone()")  # fmt: skip
        last = row
        if dense and start + x.nbytes > end:
            full, end = row, start + x.nbytes


def _unmoved(params: Tensors, grads: Tensors) -> None:
    """The undo reads the gradients again: none may stand where a parameter does, and move with it."""
    if torch.compiler.is_compiling() or hasattr(params[0], "fake_mode"):
        return  # a traced tensor has no memory
    storages = {p.untyped_storage().data_ptr() for p in params} - {0}
    for i, g in enumerate(grads):
        if g.untyped_storage().data_ptr() not in storages:
            continue
        first, last = _span(g)
        for j, p in enumerate(params):
            start, end = _span(p)
            if start < last and first < end:
                raise ValueError(f"grads[{i}]: shares memory with params[{j}], so that it would change with it, and the undo miss; give "
                                 "a .clone()")  # fmt: skip


def _span(x: Tensor) -> tuple[int, int]:
    """Where its memory begins and ends."""
    elements = 1 + sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape)) if x.numel() else 0
    return x.data_ptr(), x.data_ptr() + elements * x.element_size()


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured there; a traced call is captured only once it is compiled."""
    here = device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_initialized()
    return here and torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def _writing(*lists: Tensors | None) -> Iterator[None]:
    """Without a graph, and known to autograd afterwards."""
    with torch.no_grad():
        yield
    if not torch.compiler.is_compiling():  # the compiler knows from the schema; kernels write where autograd does not see it
        torch.autograd.graph.increment_version([x for xs in lists if xs is not None for x in xs])


def _flat(like: Tensors, directions: Sequence[Tensors]) -> list[Tensor]:
    for j, d in enumerate(directions):
        check.like(like, f"directions[{j}]", d)
    return [x for d in directions for x in d]


def _coefficients(coef: Tensor, k: int) -> None:
    check.require(coef.shape == (k,), f"coef: shape {tuple(coef.shape)}; needs ({k},), one for each direction")
    check.floating(coef=coef)


def _scalar(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...], like: Tensors) -> None:
    if not (x.dim() == 0 and x.dtype in dtypes and x.device == like[0].device):
        raise ValueError(f"{name}: shape {tuple(x.shape)}, {x.dtype} on {x.device}; needs a 0-d tensor of "
                         f"{' or '.join(map(str, dtypes))} on the parameters' device")  # fmt: skip


@check.kinds
def step_gram(directions: Sequence[Tensors]) -> Tensor:
    """Gram of k directions over all parameters at once, accumulated in float64.

    directions: k ≥ 1 lists of tensors shaped alike → (k, k) float64 on their device.

    Equivalent to: ``D = torch.stack([torch.cat([x.flatten() for x in d]) for d in directions]).double(); D @ D.T``
    """
    _some("directions", directions, "list")
    _some("directions[0]", directions[0])
    return call("step_gram", _flat(directions[0], directions), len(directions))


@check.kinds
def step_project(
    directions: Sequence[Tensors], momentum: Tensors | None, grads: Tensors, *, beta: float = 0.0, ridge: float = 0.0,
    rcond: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """coef with Σ_k coef_k d_k = P_V (β v + g), V = span(directions), solved where the tensors are.

    Args:
        directions: k lists of p tensors.  momentum: v, p tensors, or None for none.  grads: g, p tensors.
        ridge: (K + ridge·I) coef = <d, β v + g>, in the Gram's own units; below 1e-60 it is none.
        rcond: without a ridge, as in weights.solve: eigenvalues of the unit-diagonal Gram below rcond·largest count as
            zero, and of all solutions the one of least norm is found; in [0, 1), default k·eps of the directions' dtype,
            float64 or float32: what they are subtracted in.

    A direction not longer than 1e-30 is left out, with coefficient 0, since float32 may not hold it; one that is not finite
    makes every coefficient NaN.

    Equivalent to: ``torch.linalg.lstsq(D.T, beta * v + g).solution`` for the coefficients, with D (k, P), v and g flat, no ridge

    Returns: the Gram, float64 (k + 2, k + 2) of the directions, v and g in this order ((k + 1, k + 1) without v), and
    coef (k,) float64. On a GPU up to 32 directions never make the host wait; more go through torch.linalg.
    """
    _some("grads", grads)
    check.ridge(ridge)
    if momentum is not None:
        check.like(grads, "momentum", momentum)
    flat = _flat(grads, directions)
    if rcond is None:
        exact = all(d.dtype == torch.float64 for d in flat)
        rcond = max(1, len(directions)) * torch.finfo(torch.float64 if exact else torch.float32).eps
    check.require(0 <= rcond < 1, f"rcond: got {rcond}; needs a number in [0, 1)")
    return call("step_project", flat, list(momentum or ()), list(grads), beta, ridge, rcond)


@check.kinds
def step_update(
    params: Tensors, momentum: Tensors | None, grads: Tensors, directions: Sequence[Tensors], coef: Tensor, *,
    lr: float, beta: float = 0.0, weight_decay: float = 0.0, noise: float = 0.0, seed: int = 0, offset: int = 0,
    counter: Tensor | None = None,
) -> None:  # fmt: skip
    """v ← β v + g − Σ_k coef_k d_k;  θ ← (1 − lr·weight_decay) θ − lr v + noise ξ: in place, in one pass.

    Args:
        params, grads: p tensors.  momentum: p tensors that hold v afterwards, or None; float64 only for float64 parameters,
            since the others are stepped in float32.
        directions: k lists of p tensors.  coef: (k,) on the parameters' device; never read by the host.
        noise: standard deviation of ξ's contribution; ξ is Philox stream (seed, offset + counter).
        counter: 0-d int64 on the parameters' device, or None: what a captured CUDA graph adds one to, so that its
            replays draw fresh noise.

    Without directions, decay and noise: a step of torch.optim.SGD(params, lr, momentum=beta).
    """
    _some("params", params)
    check.like(params, "grads", grads)
    _momentum(params, momentum)
    flat = _flat(params, directions)
    _coefficients(coef, len(directions))
    if counter is not None:
        _scalar("counter", counter, (torch.int64,), params)
    apart(params=params, momentum=momentum)
    with _writing(params, momentum):
        call("step_update", list(params), list(momentum or ()), list(grads), flat, coef,
             lr, beta, weight_decay, noise, seed, offset, counter)  # fmt: skip


@check.kinds
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
    _some("params", params)
    for name, tensors in (("grads", grads), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        check.like(params, name, tensors)
    for i, (p, m, u) in enumerate(zip(params, exp_avg, exp_avg_sq)):
        wide = torch.promote_types(p.dtype, torch.float32)
        for name, x in (("exp_avg", m), ("exp_avg_sq", u)):
            if x.dtype != wide:
                raise ValueError(f"{name}[{i}]: {x.dtype} for a parameter of {p.dtype}; needs {wide}")
    check.betas(betas)
    check.require(eps >= 0, f"eps: got {eps}; needs a number >= 0")
    flat = _flat(params, directions)
    _coefficients(coef, len(directions))
    _scalar("step", step, (torch.int64, torch.float64), params)
    if counter is not None:
        _scalar("counter", counter, (torch.int64,), params)
    apart(params=params, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    with _writing(params, exp_avg, exp_avg_sq):
        call("step_adamw", list(params), list(exp_avg), list(exp_avg_sq), list(grads), flat, coef, step,
             lr, *betas, eps, weight_decay, noise, seed, offset, counter)  # fmt: skip


@check.kinds
def step_lookahead(
    params: Tensors, grads: Tensors, alpha: float, capacity: int | None = None
) -> tuple[list[Tensor], Tensor, Tensor]:  # fmt: skip
    """θ ← θ − alpha·g in place; returns what step_lookahead_undo needs: one byte a parameter, not a copy.

    Args:
        params, grads: p tensors.
        capacity: how many elements may need more than the byte: those whose |θ| is far below |alpha·g|, and what is not finite.
            None: as many as there are, which the host waits to know on a GPU. An int ≥ 0: memory for so many, no wait, and
            the call can be captured into a CUDA graph. Elements beyond the first ``capacity`` are left as they are: their
            look-ahead alone is left out, the undo is exact for every element. ``sum((u == -128).sum() for u in ulps)`` counts them.

    Returns: ulps, p int8 tensors shaped like params: floats from the plain undo to the old value, −128 where an element was not
    moved; index (q, 2) int64, (tensor, element), and value (q,) float64, their old values. q is capacity where one is given, and
    slots that are left over hold index −1 and value 0.

    RuntimeError: no capacity under a CUDA graph capture.

    Equivalent to: ``torch._foreach_sub_(params, grads, alpha=alpha)`` after keeping copies of the parameters
    """
    _some("params", params)
    check.like(params, "grads", grads)
    if capacity is not None:
        check.require(check.whole(capacity) and capacity >= 0, f"capacity: got {capacity!r}; needs an int >= 0, or None for no bound")
    elif capturing(params[0].device):
        raise RuntimeError("capacity: got None under a CUDA graph capture, where the host cannot wait for the size of index; needs an "
                           "int >= 0, such as 4096")  # fmt: skip
    apart(params=params)
    _unmoved(params, grads)
    with _writing(params):
        return call("step_lookahead", list(params), list(grads), alpha, capacity)


@check.kinds
def step_lookahead_undo(params: Tensors, grads: Tensors, residue: tuple, alpha: float) -> None:
    """Restore the bits that every parameter had before step_lookahead(params, grads, alpha) returned ``residue``.

    Elements that were not moved (ulps −128) stay, rows of index −1 are passed over. A NaN that had a slot comes back as a NaN.
    """
    _some("params", params)
    check.like(params, "grads", grads)
    apart(params=params)
    ulps, index, value = residue
    with _writing(params):
        call("step_lookahead_undo", list(params), list(grads), list(ulps), index, value, alpha)
