"""Gradients followed as activations are: what hooks and custom autograd.Functions make of them while the backward runs.

Only gradients carry samples here; activations that such code kept are constants to it. What it computes by other means than
torch's functions (numpy, Python numbers from .item(), kernels of its own) is not seen, nor are hooks on a grad_fn itself: autograd
lists them nowhere.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor
from torch._C import DisableTorchFunction
from torch.nn.modules._functions import BackwardHookFunction
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import BackwardHook

from .errors import CaptureError
from .place import Lost, Place, Row
from .places import Places, noted
from .sources import tensors_in


class Gradients(Places):
    """Where the samples are in the gradients that hooks and custom Functions are given, and in what they make of them."""

    forgiving = False

    def __init__(self, recorder):
        super().__init__(recorder)
        self.called = True  # a tensor that is not known is a constant

    def of(self, x: Tensor):
        return self.get(x)

    def _sharing(self, y: Tensor) -> list[Tensor]:
        memory = _memory(y)  # without autograd a view does not say of what, and .data never does
        return [x for x, _ in self.alive() if x is not y and memory is not None and _memory(x) == memory]

    def run(self, what: str, code: Callable, args: Sequence, grads: Sequence, places: Sequence, wanted: Sequence):
        """``code(*args)`` with the samples of ``grads`` at ``places``; a CaptureError unless what it returns has them as ``wanted``.

        None for a place that is not known, and in ``wanted`` for what goes nowhere.
        """
        for g, place in zip(grads, places):
            if isinstance(g, Tensor) and isinstance(place, Place):
                self.put(g, place)
        with _Following(self):
            out = code(*args)
        returned = zip(out if isinstance(out, (tuple, list)) else (out,), wanted)
        for y, want in (*returned, *zip(grads, places)):  # those that it was given, too: it may have written to them
            found = self.get(y) if isinstance(y, Tensor) and want is not None else None
            moved = isinstance(found, Place) and isinstance(want, Place) and _where(found) != _where(want)
            if isinstance(found, (Lost, Row)) or moved:
                why = found.why if isinstance(found, Lost) else f"they are in dimension {found.axis}, not {want.axis}" if moved else (
                    "those of one sample are all that is left"
                )  # fmt: skip
                raise CaptureError(
                    f"{what}: the gradients that it leaves are not one per sample, in the samples' order: {why}; remove it, or where it "
                    "does keep the samples apart say ef.capture(model, strict=False)"
                )
        return out


def _memory(x: Tensor) -> int | None:
    try:
        return x.untyped_storage().data_ptr()
    except RuntimeError:  # sparse (NotImplementedError, which is one), or inside vmap: no storage to look at
        return None


class _Following(TorchFunctionMode):
    def __init__(self, places: Places):
        super().__init__()
        self.places = places

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.places.follow(func, args, kwargs, tensors_in(args, kwargs), out)
        return out


_ANYWHERE = object()  # wanted: a gradient that flows on, where its samples ought to be being unknown


def _where(place: Place) -> tuple[int, int, int]:
    return place.axis, place.outer, place.inner


def watch_hook(recorder, x: Tensor, hook: Callable) -> Callable:
    """A hook on an activation's gradient (Tensor.register_hook), followed in the tape's own backward."""
    place, ref = recorder.places.of(x), weakref.ref(recorder)
    if not recorder.strict or not isinstance(place, Place):
        return hook
    what = f"the hook on an activation of shape {tuple(x.shape)} (register_hook)"

    def followed(g):
        recorder = ref()
        if recorder is None or not recorder.running or recorder.n == 1:
            return hook(g)
        return recorder.gradients.run(what, hook, (g,), (g,), (place,), (place,))

    return followed


def is_foreign(node) -> bool:
    """Is this node of the graph an autograd.Function that is not this library's?"""
    made_by = getattr(type(node), "_forward_cls", None)
    return made_by is not None and not made_by.__module__.startswith(__package__)


def watch_nodes(recorder, nodes: Iterable, graph: Iterable, anchor) -> None:
    """Custom Functions, and modules' full backward hooks, in the graph of the losses: followed in the tape's own backward.

    graph: all of its nodes.  anchor: the one that every captured parameter hangs on; what leads nowhere near it may add up samples.
    """
    reach = _leading_to(anchor, graph)
    with DisableTorchFunction():
        alive = {(x.grad_fn, x.output_nr): place for x, place in recorder.places.alive() if x.grad_fn is not None}
        into = {node for foreign in nodes for node in (foreign, *(parent for parent, _ in foreign.next_functions)) if node is not None}
        known = {(node, k): place for node in into for k, place in noted(node).items()} | alive
        for node in nodes:
            (_watch_module_hooks if node._forward_cls is BackwardHookFunction else _watch_backward)(recorder, node, known, reach)


def _leading_to(anchor, graph: Iterable) -> set:
    users: dict = {}
    for node in graph:
        for into, _ in node.next_functions:
            users.setdefault(into, []).append(node)
    found, stack = set(), [anchor]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += users.get(node, ())
    return found


def _placed(grads: Sequence, at: Callable, n: int) -> list[Place | None]:
    """Of each gradient: as its tensor was in the forward, otherwise by its sizes where they leave no doubt."""
    places = []
    for k, g in enumerate(grads):
        fits = [d for d, size in enumerate(g.shape) if size == n] if isinstance(g, Tensor) else []
        places.append(at(k) or (Place(fits[0]) if len(fits) == 1 else None))
    return places


def _watch_backward(recorder, node, known: dict, reach: set) -> None:
    ref, mine, own = weakref.ref(recorder), weakref.ref(node), type(node)
    there = {k: place for (made_by, k), place in known.items() if made_by is node}
    wanted = [known.get((into, k), _ANYWHERE) if into in reach else None for into, k in node.next_functions]
    name = own._forward_cls.__name__

    def apply(*grads):
        recorder, node = ref(), mine()
        if recorder is None or not recorder.running:
            return own.apply(node, *grads)
        places = _placed(grads, there.get, recorder.n)
        return recorder.gradients.run(f"autograd.Function {name}, its backward", own.apply, (node, *grads), grads, places, wanted)

    node.apply = apply  # what the engine calls: an attribute of this one node


def _watch_module_hooks(recorder, node, known: dict, reach: set) -> None:
    ref = weakref.ref(recorder)
    there = {k: place for (made_by, k), place in known.items() if made_by is node}
    handle = node.register_hook(lambda *_: None)
    hooks = handle.hooks_dict_ref()  # all of the node's
    handle.remove()

    def watched(hook: Callable) -> Callable:
        owner = next((c.cell_contents.module for c in hook.__closure__ or () if isinstance(c.cell_contents, BackwardHook)), None)
        what = f"the backward hook of a module {type(owner).__name__}"

        def followed(into, out):
            recorder = ref()
            if recorder is None or not recorder.running:
                return hook(into, out)
            places = _placed(into, there.get, recorder.n)
            return recorder.gradients.run(what, hook, (into, out), (*into, *out), places * 2, [p or _ANYWHERE for p in places])

        return followed

    for key, hook in list(hooks.items()):
        hooks[key] = watched(hook)
