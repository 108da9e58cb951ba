"""Inputs that need not be kept: what autograd keeps anyway makes them again when their factor is recorded.

A GELU, a gate or a norm keeps its own input for its backward; its output, which only the layers behind it would hold, costs
one elementwise pass to make again and as much memory as an activation to keep. The same function on the same values: the same
bits.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor
from torch._C import DisableTorchFunction

# autograd's name of a function → its output from what its node saves; those that save their output (ReLU, tanh) share it already
_MAKERS = {
    "GeluBackward0": lambda node: F.gelu(node._saved_self, approximate=node._saved_approximate),
    "SiluBackward0": lambda node: F.silu(node._saved_self),
    "MishBackward0": lambda node: F.mish(node._saved_self),
    "HardswishBackward0": lambda node: F.hardswish(node._saved_self),
    "MulBackward0": lambda node: node._saved_self * node._saved_other,
}
_OURS: dict[type, Callable] = {}  # the same of this library's own autograd Functions
_SMALL = 1 << 18  # bytes; inputs up to this size are kept: little memory, and a call less
_SAVED = ("_saved_self", "_saved_other")
_KEY = "entangle_fast.remake"


def remade(function: type) -> type:
    """An autograd Function whose ``again(ctx)`` makes its output from what it saved."""
    _OURS[function] = function.again
    return function


class Remake:
    """Makes a layer's input again while the backward runs."""

    def __init__(self, make: Callable, x: Tensor):
        self.make, self.node, self.x = make, x.grad_fn, weakref.ref(x)
        self.shared = self.node.metadata.setdefault(_KEY, [0, None, False])  # layers that still ask, x while they do, for good
        self.shared[0] += 1

    def __call__(self) -> Tensor:
        value = self.make(self.node) if self.shared[1] is None else self.shared[1]
        self.shared[0] -= 1
        self.shared[1] = value if self.shared[0] > 0 or self.shared[2] else None
        return value

    def keep_from(self, exposed: Tensor) -> None:
        """From here on x, or what it is made from, may change: what autograd would have kept is kept."""
        x, node = self.x(), self.node
        made_from = node.saved_tensors if hasattr(node, "saved_tensors") else [getattr(node, a, None) for a in _SAVED]
        places = {z.untyped_storage().data_ptr() for z in (x, *made_from) if z is not None}
        if self.shared[1] is None and exposed.untyped_storage().data_ptr() in places:
            self.shared[1], self.shared[2] = self.make(node) if x is None or x._version else x.detach(), True


def expose(recorder, x: Tensor) -> None:
    """x can be written to behind autograd's back: what is made from it so far is kept, and nothing is made again from now on."""
    with DisableTorchFunction():
        for remake in [made for ref in recorder.remakes if (made := ref()) is not None]:
            remake.keep_from(x)
    recorder.exposed = recorder.exposed or x not in recorder.sources


def remaker(recorder, x: Tensor) -> Remake | None:
    """A call that makes x again while the backward runs, or None where x has to be kept.

    It asks the node that made x, whose own backward comes later. Hooks on saved tensors (activation checkpointing,
    offloading) may hand each one out once only, so that nothing is asked for twice under them. Nor is it after ``.data`` or
    ``numpy()``, which can change what was made.
    """
    node, name = x.grad_fn, type(x.grad_fn).__name__
    make = _MAKERS.get(name) or _OURS.get(getattr(node, "_forward_cls", None))
    if make is None or x.nbytes <= _SMALL or x._version or recorder.recomputes or recorder.exposed:
        return None
    if name == "MulBackward0" and (node._saved_self is None or node._saved_other is None):
        return None  # one side needs no gradient: the other was not saved
    made = Remake(make, x)
    recorder.remakes.append(weakref.ref(made))
    return made
