"""Where the samples are in each tensor of the forward, followed through every torch function that the mode sees.

Sizes alone cannot tell: with as many positions as samples, (t, n, d) and (n, t, d) look alike, and so do rows folded
sample by sample and position by position. What cannot be followed is Lost, and refused where a parameter meets it.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from .follow import _broadcast, by_axis
from .follow_kinds import ELEMENTWISE, follower, unknown
from .place import Call, Lost, Place, Row
from .sources import function_name, tensors_in


class Places:
    """Tensor → Place, Row or Lost; a tensor that is not here does not depend on the batch."""

    forgiving = True  # of data: what no gradient flows through may mix the samples

    def __init__(self, recorder):
        self._recorder = weakref.ref(recorder)  # no cycle: factors go when the tape goes
        self._at: dict[int, tuple[weakref.ref, object]] = {}
        self._inside: set[int] = set()  # ids of what was made without autograd, as in a custom Function
        self._constants: dict[int, weakref.ref] = {}  # functional code only: made inside the `with` from nothing
        self.called = False  # the model itself was called: then all of the batch is known

    @property
    def recorder(self):
        return self._recorder()

    def get(self, x: Tensor):
        found = self._at.get(id(x))
        return found[1] if found is not None and found[0]() is x else None

    def put(self, x: Tensor, place) -> None:
        self._at[id(x)] = (weakref.ref(x), place)
        self._constants.pop(id(x), None)
        if not torch.is_grad_enabled():
            self._inside.add(id(x))

    def forget(self, x: Tensor) -> None:
        self._at.pop(id(x), None)

    def guess(self, x: Tensor):
        """The place of a tensor from outside, by its sizes; None where they say nothing."""
        n, dim = self.recorder.n, self.recorder.batch_dim
        if not n or x.dim() == 0:
            return None
        axis = dim or 0
        if x.dim() > axis and x.shape[axis] == n:
            return Place(axis)
        if dim is not None and x.shape[0] and x.shape[0] % n == 0:  # folded rows, in the order that the user named
            return Place(0, 1, x.shape[0] // n) if dim == 0 else Place(0, x.shape[0] // n, 1)
        return None

    def alive(self) -> Iterator[tuple[Tensor, object]]:
        return ((x, place) for ref, place in list(self._at.values()) if (x := ref()) is not None)

    def is_constant(self, x: Tensor) -> bool:
        ref = self._constants.get(id(x))
        return ref is not None and ref() is x

    def of(self, x: Tensor):
        """As ``get``, a tensor from outside being placed by its sizes where that is allowed."""
        if x in self.recorder.sources:
            return None
        if (place := self.get(x)) is not None or self.called and not x.requires_grad or self.is_constant(x):
            return place
        if (place := self.guess(x)) is not None and not self.recorder.is_buffer(x):
            self.put(x, place)
            return place
        return None

    def follow(self, func, args, kwargs, inputs: list[Tensor], out) -> None:
        """Note where the samples are in what ``func`` returned."""
        if not isinstance(out, (Tensor, tuple, list)) and not (out is None and inputs):
            return
        name = function_name(func)
        in_place = name.endswith("_") and not name.endswith("__") or name in _IN_PLACE
        target = args[0] if in_place and args and isinstance(args[0], Tensor) else None
        placed = [(x, p) for x in inputs if x is not target and (p := self.of(x)) is not None]
        if target is not None:  # by its sizes only where it is alone: it may be a part of what is being put together
            mine = self.get(target) if placed else self.of(target)
            placed = placed if mine is None else [(target, mine), *placed]
        self._note(placed)
        if len(placed) == 1 and type(out) is Tensor and self._stays(name, args, *placed[0], out):  # most calls
            return self.put(out, placed[0][1])
        if any(not isinstance(p, Place) or not p.soft for _, p in placed):
            placed = [(x, p) for x, p in placed if not isinstance(p, Place) or not p.soft]
        if not placed:
            for y in tensors_in(out):
                if self._repeats_constants(name, inputs, y):
                    self.put(y, Place(self.recorder.batch_dim or 0, soft=True))
                elif not self.called and (inputs or name in _MADE) and all(map(self._says_nothing, inputs)):
                    self._constants[id(y)] = weakref.ref(y)
                else:
                    self.forget(y)
            return
        targets = tensors_in(out) if target is None else [target]
        for k, y in enumerate(targets):
            if name == "__get__" or y in self.recorder.sources:
                continue
            if target is None and follower(name) is unknown and self.get(y) is not None and any(y is not x for x, _ in placed):
                continue  # a rule knew it
            place = self._where(name, args, kwargs, placed, y, k, out)
            if isinstance(place, Place) and place.soft and y.requires_grad:
                place = replace(place, soft=False)  # a parameter came in: now it matters whose row it is
            before = self.get(y)
            self.forget(y) if place is None else self.put(y, place)
            alone = len(placed) == 1 and placed[0][0] is y and (name[:-1] in ELEMENTWISE or follower(name) is _broadcast)
            if in_place and not alone and (before != place or isinstance(place, Lost)):
                self._rewritten(y, place, name)

    def _note(self, placed: list) -> None:
        """Keep on the graph where the samples are in what a custom Function takes and returns: the backward asks, when they may be gone."""
        inside = not torch.is_grad_enabled()
        for x, place in placed:
            if (inside or id(x) in self._inside) and isinstance(place, Place) and (node := x.grad_fn) is not None:
                node.metadata.setdefault(_NOTED, {})[x.output_nr] = place

    def _stays(self, name: str, args: tuple, x: Tensor, place, out: Tensor) -> bool:
        """The common case, told quickly: every sample stays where it was."""
        if type(place) is not Place or place.soft or name.endswith("_"):
            return False
        if name in ("linear", "layer_norm"):
            own = 1 if name == "linear" else len(args[1]) if len(args) > 1 else x.dim()  # the last dimensions are no batch
            if not args or x is not args[0] or place.axis >= x.dim() - own:
                return False
        elif name not in ELEMENTWISE:
            return False
        return len(out.shape) > place.axis and out.shape[place.axis] == place.size(self.recorder.n)

    def _rewritten(self, y: Tensor, place, name: str) -> None:
        """y was written to, and its samples are elsewhere now: so are those of the tensors that share its memory."""
        for x in self._sharing(y):
            whole = [d for d in range(x.dim()) if isinstance(place, Place) and place.axis < y.dim()
                     and (x.shape[d], x.stride(d)) == (y.shape[place.axis], y.stride(place.axis))]  # fmt: skip
            there = place.at(whole[0]) if len(whole) == 1 else None
            known = self.get(x)
            if there is None or known not in (None, there) and not getattr(known, "soft", False):
                there = Lost(f"{name}(…) writes samples into a part of it", x.requires_grad)
            self.put(x, there)

    def _sharing(self, y: Tensor) -> list[Tensor]:
        root = y if y._base is None else y._base
        return [x for x in (root, *(x for x, _ in self.alive() if x is not root and x._base is root)) if x is not y]

    def _says_nothing(self, x: Tensor) -> bool:
        return self.is_constant(x) or x in self.recorder.sources

    def _repeats_constants(self, name: str, inputs: list[Tensor], y: Tensor) -> bool:
        """Were the same constants given to each of the n samples? (token types, positions expanded to the batch)"""
        axis, n = self.recorder.batch_dim or 0, self.recorder.n
        if n is None or y.dim() <= axis or y.shape[axis] != n or y.requires_grad:
            return False
        if name in _GROWING and inputs:
            d = axis - (y.dim() - inputs[0].dim())
            return d < 0 or inputs[0].shape[d] == 1
        return name in _FILLED

    def _where(self, name, args, kwargs, placed, y, k, out):
        lost = next((p for _, p in placed if isinstance(p, Lost)), None)
        if lost is not None:
            mixed = next((p for _, p in placed if isinstance(p, Lost) and p.mixed), lost)
            return mixed
        n = self.recorder.n
        rows = {p.index for _, p in placed if isinstance(p, Row)}
        if rows:
            if name == "stack" and len(placed) == n and [p for _, p in placed] == [Row(i) for i in range(n)]:
                return Place(by_axis(args, kwargs, 1, y.dim(), 0))
            if len(rows) == 1 and len({type(p) for _, p in placed}) == 1:
                return Row(rows.pop())
            others = any(isinstance(p, Place) for _, p in placed) or name not in ("stack", "cat")
            others = others or name == "stack"  # not all samples, or not in their order
            mixed = others and any(x.requires_grad for x, p in placed if isinstance(p, Row))
            return Lost(f"{name}(…) joins tensors of single samples", mixed)
        follow = follower(name)
        if follow is unknown and not self.recorder.strict:
            follow = follower("clone")
        if "input" in kwargs:  # the first of whatever takes it
            args, kwargs = (kwargs["input"], *args), {k: v for k, v in kwargs.items() if k != "input"}
        place = follow(Call(name, args, kwargs, placed, y, k, out, n))
        if not isinstance(place, Lost) or n == 1:
            return self._checked(place, y, name)
        if self.forgiving and place.mixed and not any(x.requires_grad for x, _ in placed) and not _inside_a_function():
            # data only: its gradient does not exist, a sample may know of the others
            x, p = placed[0]
            return p if y.shape == x.shape else None
        return place

    def _checked(self, place, y: Tensor, name: str):
        n = self.recorder.n
        if n == 1 and not isinstance(place, Place):
            if y.dim() == 0:
                return Lost("it has no dimension left")
            return Place(0, 1, y.shape[0])
        if not isinstance(place, Place):
            return place
        if 0 <= place.axis < y.dim() and y.shape[place.axis] == place.size(n):
            return place
        return Lost(f"{name}(…) leaves {tuple(y.shape)}, in which the {n} samples cannot be found")


def noted(node) -> dict[int, Place]:
    """Of a node of the graph: where the samples are in its outputs, as far as a custom Function was concerned with them."""
    return node.metadata.get(_NOTED, {})


def _inside_a_function() -> bool:
    """In the forward of an autograd Function, where nothing requires a gradient and yet it may flow."""
    frame = None if torch.is_grad_enabled() else sys._getframe(1)
    while frame is not None and frame.f_code is not _APPLY:
        frame = frame.f_back
    return frame is not None


_NOTED = "entangle_fast.places"
_APPLY = torch.autograd.Function.apply.__func__.__code__
_MADE = {"arange", "linspace", "eye", "zeros", "ones", "full", "empty", "tril_indices", "triu_indices"}  # from nothing
_FILLED = {"zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty"}
_GROWING = {"expand", "expand_as", "broadcast_to", "repeat", "tile"}
_IN_PLACE = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__ipow__", "__ior__", "__iand__"}
