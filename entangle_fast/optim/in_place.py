"""Steps without state: decay and noise in one pass, and a look-ahead that is undone to the bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import ops
from ..ops import check as checks
from .projected import Tensors


@checks.kinds
@torch.no_grad()
def decay_noise_step(
    params: Tensors, grads: Tensors, *, lr: float, weight_decay: float = 0.0, noise: float = 0.0, seed: int | None = None,
    offset: int | None = None, counter: Tensor | None = None,
) -> None:  # fmt: skip
    """θ ← (1 − lr·weight_decay) θ − lr g + noise ξ, ξ ~ N(0, 1) from Philox stream (seed, offset + counter): one pass.

    seed, and offset or counter: needed with noise, since two calls with the same ones add the same numbers: give the number of the step.
    counter: 0-d int64 on the device; a captured CUDA graph that adds one to it draws fresh noise in every replay.

    Equivalent to: ``[p * (1 - lr * weight_decay) - lr * g + noise * torch.randn_like(p) for p, g in zip(params, grads)]``, the
    parameters being written in place and the noise another draw
    """
    params, grads = list(params), list(grads)
    checks.require(len(params) > 0, "params: got no tensor; needs one at least")
    if noise and (seed is None or (offset is None and counter is None)):
        raise ValueError(f"seed, offset: got {seed} and {offset} with noise={noise}; needs a seed, and the number of the step as offset: "
                         "the same two draw the same noise")  # fmt: skip
    none = torch.zeros(0, dtype=torch.float64, device=params[0].device)
    ops.step_update(
        params, None, grads, [], none, lr=lr, weight_decay=weight_decay, noise=noise, seed=seed or 0, offset=offset or 0,
        counter=counter,
    )  # fmt: skip


@contextlib.contextmanager
def lookahead(params: Tensors, grads: Tensors, alpha: float, capacity: int | None = None) -> Iterator[Tensor | None]:
    """Inside the ``with`` the parameters stand at θ − alpha·g; afterwards at the very bits they had before.

    One byte a parameter is held, not a copy of the model. grads must not change in between. Autograd counts both as changes:
    a graph that was built before cannot be differentiated afterwards.

    capacity: elements that may need more than the byte (|θ| far below |alpha·g|, or not finite). None: as many as there are; on
    a GPU the host waits once to know. An int ≥ 0: no wait, and the whole can be captured into a CUDA graph; elements beyond it
    stay at θ inside the ``with``. ops.step_lookahead says how to count them.
    Gives None without a capacity; with one a 0-d bool on the device, true where a slot was left, so that every element moved.

    >>> import torch, entangle_fast as ef
    >>> p = torch.tensor([0.1, 0.2])
    >>> with ef.optim.lookahead([p], [torch.ones(2)], alpha=0.5):
    ...     print(p)
    tensor([-0.4000, -0.3000])
    >>> p
    tensor([0.1000, 0.2000])
    """
    params, grads = list(params), list(grads)  # read twice
    with torch.no_grad():
        residue = ops.step_lookahead(params, grads, alpha, capacity)
    try:
        yield None if capacity is None else (residue[1][-1:, 0] < 0).any()
    finally:
        with torch.no_grad():
            ops.step_lookahead_undo(params, grads, residue, alpha)
