"""Parameters, and what the forward makes of them before any sample is involved (transposes, casts, B @ A, 1 + w)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

# these keep inner products: entries are moved, selected or cast, never mixed or scaled
_ISOMETRIES = {
    "t", "transpose", "permute", "view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "contiguous",
    "clone", "to", "float", "half", "bfloat16", "double", "type", "narrow", "select", "__getitem__", "chunk", "split",
    "unbind", "swapaxes", "movedim", "mT", "T", "tensor_split", "view_as", "reshape_as", "squeeze_copy", "type_as",
}  # fmt: skip


def tensors_in(*trees) -> list[Tensor]:
    """Every tensor in nested tuples, lists and mappings."""
    found = []
    for tree in trees:
        if isinstance(tree, Tensor):
            found.append(tree)
        elif isinstance(tree, (tuple, list)):
            found += tensors_in(*tree)
        elif tree is not None and not isinstance(tree, _SCALARS) and isinstance(tree, Mapping):  # asking an ABC takes long
            found += tensors_in(*tree.values())
    return found


_SCALARS = (int, float, str, torch.dtype, torch.device)


def function_name(func) -> str:
    name = getattr(func, "__name__", repr(func))
    if name == "__get__":  # a property: its name stands on the descriptor
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return name


@dataclass(eq=False)
class Source:
    """A parameter, or a tensor computed from parameters alone, that meets the batch.

    value keeps the autograd graph from the parameters to here: a combined gradient goes back through it once.
    """

    value: Tensor
    params: tuple[int, ...]  # which parameters it depends on, as positions in Tape.params
    identity: bool = False
    isometric: bool = False
    region: tuple[int, int] | None = None  # span in the parameter's storage, in elements
    cut: Tensor = field(init=False)

    def __post_init__(self):
        self.cut = self.value.detach()

    def pull(self, grads: Tensor, params: list[Tensor], *, batched: bool = False) -> list[Tensor | None]:
        """Gradients w.r.t. ``value`` → gradients w.r.t. each of ``self.params``; batched: one for each row of grads."""
        if self.identity:
            return [grads]
        wanted = [params[i] for i in self.params]
        with torch.enable_grad():
            return list(
                torch.autograd.grad(
                    self.value, wanted, grads.to(self.value.dtype), retain_graph=True, allow_unused=True,
                    is_grads_batched=batched,
                )
            )  # fmt: skip

    def push(self, directions: dict[int, Tensor], params: list[Tensor]) -> Tensor:
        """Directions w.r.t. the parameters → the direction of ``value`` (a Jacobian-vector product)."""
        if self.identity:
            return directions[self.params[0]]
        wanted = [params[i] for i in self.params]
        with torch.enable_grad():
            u = torch.zeros_like(self.cut).requires_grad_()
            pulled = torch.autograd.grad(self.value, wanted, u, create_graph=True, allow_unused=True)
            dot = sum((p * directions[i].to(p.dtype)).sum() for i, p in zip(self.params, pulled) if p is not None)
            return torch.autograd.grad(dot, u)[0]


class Sources:
    """The tensors that are watched: id → Source, each kept alive so that no id is used twice."""

    def __init__(self, params: list[Tensor]):
        self._by_id = {id(p): Source(p, (i,), True, True, _span(p)) for i, p in enumerate(params)}

    def __contains__(self, x) -> bool:
        return id(x) in self._by_id

    def __getitem__(self, x: Tensor) -> Source:
        return self._by_id[id(x)]

    def derive(self, func, inputs: list[Tensor], out, args=()) -> None:
        """Note that ``out`` was computed by ``func`` from watched tensors and constants only."""
        listed = function_name(func) == "__getitem__" and _has_list(args[1:])
        sources = [self[x] for x in inputs if x in self]
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if not isinstance(x, Tensor) or not x.requires_grad or x in self:
                continue
            params = tuple(sorted({i for s in sources for i in s.params}))
            moved = len(inputs) == 1 and not listed and sources[0].isometric and function_name(func) in _ISOMETRIES
            base = sources[0]  # a copy's storage is not the parameter's: spans in it say nothing
            same = moved and base.region and x.numel() and _storage(x) == _storage(base.value)
            self._by_id[id(x)] = Source(x, params, False, moved, _span(x) if same else None)

    def changed(self, x: Tensor, inputs: list[Tensor]) -> None:
        """x, computed from parameters, was written to: it and its views are no mere copies of entries any more."""
        params = {i for z in inputs if z in self for i in self[z].params}
        for source in self._by_id.values():
            if not source.identity and _storage(source.value) == _storage(x):
                source.params = tuple(sorted(params.union(source.params)))
                source.isometric, source.region, source.cut = False, None, source.value.detach()


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def changes_in_place(func) -> bool:
    name = function_name(func)
    return name in _WRITES or name.endswith("_") and not name.endswith("__")


_WRITES = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__ipow__"}


def _has_list(index) -> bool:
    """Anything but integers, slices, None and …: rows may be taken twice."""
    return any(_has_list(i) if isinstance(i, tuple) else not (i is None or i is Ellipsis or isinstance(i, slice) or type(i) is int)
               for i in index)  # fmt: skip


def _span(x: Tensor) -> tuple[int, int]:
    start = x.storage_offset()
    if x.is_contiguous():
        return start, start + x.numel()
    return start, start + sum((size - 1) * step for size, step in zip(x.shape, x.stride())) + 1
