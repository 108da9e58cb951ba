"""What rules talk to while a model runs, and where the factors arrive while the backward does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from .errors import CaptureError
from .factors import Factor
from .gradients import Gradients
from .layout import Layout
from .mode import CaptureMode
from .place import Lost, Place
from .places import Places
from .sources import Source, Sources
from .stream import Stream


class Use:
    """One meeting of a source with the batch; its factor arrives during the backward."""

    __slots__ = ("recorder", "source")

    def __init__(self, recorder: Recorder, source: Source):
        self.recorder, self.source = recorder, source

    def record(self, factor: Factor) -> None:
        if not self.recorder.running:
            return self.recorder.refuse_other_backward(self.source)
        for name, x in vars(factor).items():
            # the graph of an activation, or of what a view looks into, leads back to the recorder: a cycle that holds all factors
            if isinstance(x, Tensor) and (x.requires_grad or x._is_view()):
                setattr(factor, name, x.detach())
        self.recorder.record(self, factor)


class Recorder:
    """The state of one capture, behind a Tape: who is watched, where the samples are, which factors have arrived."""

    def __init__(self, named: Mapping[str, Tensor], buffers: Iterable[Tensor], *, batch_size, batch_dim, strict):
        self.names, self.params = list(named), list(named.values())
        self.n: int | None = batch_size
        self.batch_dim, self.strict = batch_dim, strict
        self.sources = Sources(self.params)
        self.mode = CaptureMode(self)
        self.anchor = torch.zeros((), requires_grad=True)  # makes outputs require a gradient although weights are cut
        self._buffers = {id(b): b for b in buffers}
        self.places, self.gradients = Places(self), Gradients(self)
        self.active = False  # inside the `with`
        self.idle = False  # the forward is over: what runs inside the `with` now is not watched
        self.recomputes = False  # the forward runs again in the backward (activation checkpointing)
        self.found: dict | None = None  # a forward that will run again found n: the layouts that it met, by who asked and the shape
        self.remakes: list = []  # weak references to the inputs that will be made again (remake.py)
        self.exposed = False  # an activation may have been written to behind autograd's back
        self.running = False  # the tape's own backward
        self.asked = self.again = False  # torch.autograd.grad, called by the model; with create_graph=True
        self.pending: dict[int, int] = {}  # uses of each parameter whose factor has not arrived
        self.uses: list[tuple[Source, Factor]] = []
        self._versions: list[tuple[Source, Tensor, int]] = []  # of what the factors hold, which the caller may write to
        self.stream: Stream | None = None
        self.begun = self.finished = False  # the backward: all factors are there once it is finished

    # ---- what rules ask ----

    def is_buffer(self, x: Tensor) -> bool:
        return id(x) in self._buffers

    def carries_samples(self, x: Tensor) -> bool:
        """Does this tensor depend on the batch?

        The inputs of the model are followed (places.py). In functional code, tensors from outside are taken by size.
        """
        if x in self.sources or self.is_buffer(x) or self.places.is_constant(x):
            return False
        if x.requires_grad or self.places.of(x) is not None:
            return True
        return self.n is None and x.dim() > 0  # functional code: the first tensor to meet a parameter

    def layout(self, x: Tensor, where: str, axis: int = 0) -> Layout:
        """Where the samples are in this activation; a CaptureError where that is not known.

        axis: in the first activation of functional code, unless batch_dim says so.
        """
        if self.n is None:
            axis = axis if self.batch_dim is None else self.batch_dim
            if x.dim() <= axis:
                raise CaptureError(f"{where}: an activation of shape {tuple(x.shape)} has no dimension {axis} for the samples")
            self.n = x.shape[axis]
            self.places.put(x, Place(axis))
            self.found = {} if self.recomputes else None
        place = self.places.of(x)
        if place is None and x.requires_grad:  # from code that cannot be followed
            place = self.places.guess(x)
        if not isinstance(place, Place):
            why = place.why if isinstance(place, Lost) else "nothing says where"
            raise CaptureError(
                f"{where}: the {self.n} samples are not to be found in an activation of shape {tuple(x.shape)}: {why}; if the "
                "batch was guessed wrong, say ef.capture(model, batch_size=…, batch_dim=0 or 1); otherwise freeze the parameter"
            )
        layout = Layout(self.n, place.axis, place.outer, place.inner)
        if self.found is not None:
            self._compare_with_before(where, x, layout)
        return layout

    def _compare_with_before(self, where: str, x: Tensor, layout: Layout) -> None:
        """n, not known when this forward began, is known when it runs again: what comes before it was found is followed only then."""
        before = self.found.setdefault((where, tuple(x.shape)), set())
        if not self.running_again:
            before.add(layout)
        elif before != {layout}:
            raise CaptureError(f"{where}: {_FOUND_INSIDE} an activation of shape {tuple(x.shape)}{_SAY_IT}")

    @contextlib.contextmanager
    def positions_first(self):
        """Inside attention the samples stand in dimension 1, whatever the model outside does."""
        before, self.batch_dim = self.batch_dim, 1
        try:
            yield
        finally:
            self.batch_dim = before

    @property
    def running_again(self) -> bool:
        """What forward there is now is a checkpointed one, for a backward."""
        return self.begun or self.asked

    @contextlib.contextmanager
    def gradients_asked(self, again: bool):
        """The model asks for gradients of its activations: nothing is recorded. again: to differentiate them once more."""
        before, self.asked, self.again = self.asked, True, self.again or again
        try:
            yield
        finally:
            self.asked, self.again = before, False

    def autocast_on(self, x: Tensor) -> bool:
        return torch.is_autocast_enabled(x.device.type)

    def autocast_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype in which autocast would run a matrix product of x."""
        if self.autocast_on(x) and x.is_floating_point() and x.dtype != torch.float64:
            return torch.get_autocast_dtype(x.device.type)
        return x.dtype

    def refuse_dtypes(self, what: str, x: Tensor, *weights: Tensor | None, wider: bool = False) -> None:
        """Without autocast an input of another dtype than the weights is an error, as it is without a capture.

        wider: float32 weights may meet a 16-bit input.
        """
        for p in (w for w in weights if w is not None and w.dtype != x.dtype):
            if not self.autocast_on(x) and not (wider and p.dtype == torch.float32 and x.dtype.itemsize == 2):
                raise CaptureError(f"{what}: an input of {x.dtype} meets weights of {p.dtype}; convert one: x.to({p.dtype})")

    def use(self, p: Tensor, dtype: torch.dtype) -> tuple[Tensor, Use | None]:
        """Values to compute with, cut off from autograd, and where to record; no record for a tensor not watched."""
        if p not in self.sources:
            return p.to(dtype), None
        source = self.sources[p]
        if p.is_complex():
            raise CaptureError(f"{self.describe(p)}: complex numbers; capture has rules for real ones only; freeze it")
        if not self.running_again:  # it records nothing of its own
            for i in source.params:
                self.pending[i] = self.pending.get(i, 0) + 1
        cut = source.cut
        return cut if cut.dtype == dtype else cut.to(dtype), Use(self, source)

    def refuse_samples(self, what: str, *weights: Tensor | None) -> None:
        """A weight that needs a gradient and is not watched: its gradient would be dropped."""
        for weight in weights:
            if weight is not None and weight not in self.sources and weight.requires_grad:
                raise CaptureError(
                    f"{what}: a weight of shape {tuple(weight.shape)} needs a gradient but is not a parameter that was given: left out "
                    "of the mapping (name it, or freeze it with requires_grad_(False)), computed from the batch, or by a custom "
                    "autograd.Function? no rule covers the last two"
                )

    def refuse_other_backward(self, source: Source) -> None:
        """A backward that is not the tape's: a plain gradient of an activation may pass, one that needs a weight's may not."""
        name = self.named(source)
        if self.again:
            raise CaptureError(
                f"{name}: a gradient of a gradient (create_graph=True) passes through it; capture has no rule for that; detach "
                "it, or freeze the parameter with requires_grad_(False)"
            )
        if not self.asked:
            raise CaptureError(
                f"{name}: a backward that is not the tape's would leave its .grad empty; call tape.backward(losses) instead, or for "
                "gradients of activations torch.autograd.grad inside the `with`"
            )

    def describe(self, x: Tensor) -> str:
        return self.named(self.sources[x])

    def named(self, source: Source) -> str:
        return "parameter " + ", ".join(repr(self.names[i]) for i in source.params)

    # ---- recording ----

    def record(self, use: Use, factor: Factor) -> None:
        self.uses.append((use.source, factor))
        if self.stream is None:
            held = [x for x in vars(factor).values() if isinstance(x, Tensor) and not x.is_inference()]
            self._versions += [(use.source, x, x._version) for x in held]
        for i in use.source.params:
            self.pending[i] -= 1
        if self.stream is not None:
            self.stream.arrived(self, use.source)

    def drop(self) -> None:
        """The tape is gone, and nobody can ask any more."""
        self.uses, self._versions, self.stream = [], [], None

    def run(self, losses: Tensor) -> None:
        """The one backward."""
        self.begun = True
        self.idle, self.running = not self.recomputes, True
        with self.mode if self.recomputes and not self.active else contextlib.nullcontext():
            try:
                if self.recomputes:
                    # torch.autograd.backward hands itself to the mode, which is then off for the forwards inside
                    torch.autograd.Variable._execution_engine.run_backward(
                        (losses,), (torch.ones_like(losses),), False, False, (self.anchor,), allow_unreachable=True, accumulate_grad=True
                    )
                else:
                    # of the sum: seeds given to torch.autograd make it import sympy, 50 MB
                    with torch.inference_mode(False), torch.enable_grad():
                        total = losses.sum()
                    torch.autograd.backward(total, inputs=[self.anchor])
            except CheckpointError as error:
                if self.found is None:
                    raise
                raise CaptureError(f"{_FOUND_INSIDE} its activations{_SAY_IT}") from error
            finally:
                self.idle, self.running, self.anchor.grad = True, False, None
        if self.stream is not None:
            self.stream.finish(self)
        self.finished = True

    def refuse_written(self) -> None:
        """Factors look into the model's inputs and activations, which may have been written to since."""
        for source, x, version in self._versions:
            if x._version != version:
                raise CaptureError(
                    f"{self.named(source)}: a tensor of shape {tuple(x.shape)} that its per-sample gradients are made of was written to "
                    "in place since the backward; ask the tape before that, or give the model a copy (x.clone())"
                )


_FOUND_INSIDE = "activation checkpointing: the number of samples was found inside a forward that runs again, where they may be elsewhere in"
_SAY_IT = (
    " than at first; say ef.capture(parameters, batch_size=…), and batch_dim=1 where positions stand before samples, or compute what its "
    "first parameter meets outside of it"
)
