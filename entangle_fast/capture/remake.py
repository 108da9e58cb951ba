"""Inputs that need not be kept: what autograd keeps anyway makes them again when their factor is recorded.

A GELU, a gate or a norm keeps its own input for its backward; its output, which only the layers behind it would hold, costs
one elementwise pass to make again and as much memory as an activation to keep. The same function on the same values: the same
bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

# autograd's name of a function → its output from what its node saves; those that save their output (ReLU, tanh) share it already
_MAKERS = {
    "GeluBackward0": lambda node: F.gelu(node._saved_self, approximate=node._saved_approximate),
    "SiluBackward0": lambda node: F.silu(node._saved_self),
    "MishBackward0": lambda node: F.mish(node._saved_self),
    "HardswishBackward0": lambda node: F.hardswish(node._saved_self),
    "MulBackward0": lambda node: node._saved_self * node._saved_other,
}
_OURS: dict[type, Callable] = {}  # the same of this library's own autograd Functions
_KEY = "entangle_fast.remake"


def remade(function: type) -> type:
    """An autograd Function whose ``again(ctx)`` makes its output from what it saved."""
    _OURS[function] = function.again
    return function


def remaker(tape, x: Tensor) -> Callable[[], Tensor] | None:
    """A call that makes x again while the backward runs, or None where x has to be kept.

    It asks the node that made x, whose own backward comes later. Hooks on saved tensors (activation checkpointing,
    offloading) may hand each one out once only, so that nothing is asked for twice under them. Nor is it after ``.data`` or
    ``numpy()``, which can change what was made.
    """
    node, name = x.grad_fn, type(x.grad_fn).__name__
    make = _MAKERS.get(name) or _OURS.get(getattr(node, "_forward_cls", None))
    if make is None or x._version or tape.recomputes or tape.exposed:
        return None
    if name == "MulBackward0" and (node._saved_self is None or node._saved_other is None):
        return None  # one side needs no gradient: the other was not saved
    shared = node.metadata.setdefault(_KEY, [0, None])  # layers that still ask for it, and x while they do
    shared[0] += 1

    def remake():
        value = make(node) if shared[1] is None else shared[1]
        shared[0] -= 1
        shared[1] = value if shared[0] > 0 else None
        return value

    return remake
