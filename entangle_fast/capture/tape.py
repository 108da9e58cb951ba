"""The tape: what a captured forward and backward leave behind, and the questions it answers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..ops import check
from .contract import Component, Contraction, components, grams
from .errors import CaptureError
from .factors import ConvFactor, Factor, LinearFactor
from .gradients import Gradients, is_foreign, watch_nodes
from .layout import Layout
from .mode import CaptureMode
from .place import Lost, Place
from .places import Places
from .sources import Source, Sources
from .stream import STREAMABLE, Stream


class _Use:
    """One meeting of a source with the batch; its factor arrives during the backward."""

    __slots__ = ("tape", "source")

    def __init__(self, tape: Tape, source: Source):
        self.tape, self.source = tape, source

    def record(self, factor: Factor) -> None:
        if not self.tape.running:
            return self.tape.refuse_other_backward(self.source)
        for name, x in vars(factor).items():
            # the graph of an activation, or of what a view looks into, leads back to this tape: a cycle that holds all factors
            if isinstance(x, Tensor) and (x.requires_grad or x._is_view()):
                setattr(factor, name, x.detach())
        self.tape._record(self, factor)


class Tape:
    """Factors of the per-sample gradients of n samples, for every trainable parameter.

    Made by ``ef.capture``; use it in this order: forward inside the ``with``, ``backward(losses)`` once, then any of
    ``gram``, ``sqnorms``, ``project``, ``project_random``, ``combine``, ``per_sample``.

    Attributes:
        names: the trainable parameters' names; results that are lists follow this order.
        params: the parameters themselves.
        n: the number of samples.
    """

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
        self.remakes: list = []  # weak references to the inputs that will be made again (remake.py)
        self.exposed = False  # an activation may have been written to behind autograd's back
        self.running = False  # the tape's own backward
        self.asked = self.again = False  # torch.autograd.grad, called by the model; with create_graph=True
        self._pending: dict[int, int] = {}  # uses of each parameter whose factor has not arrived
        self._uses: list[tuple[Source, Factor]] = []
        self._versions: list[tuple[Source, Tensor, int]] = []  # of what the factors hold, which the caller may write to
        self._stream: Stream | None = None
        self._done = self._finished = False  # the backward: begun; all factors are there

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

    def layout(self, x: Tensor, where: str) -> Layout:
        """Where the samples are in this activation; a CaptureError where that is not known."""
        if self.n is None:
            axis = self.batch_dim or 0
            if x.dim() <= axis:
                raise CaptureError(f"{where}: an activation of shape {tuple(x.shape)} has no dimension {axis} for the samples")
            self.n = x.shape[axis]
        place = self.places.of(x)
        if place is None and x.requires_grad:  # from code that cannot be followed
            place = self.places.guess(x)
        if not isinstance(place, Place):
            why = place.why if isinstance(place, Lost) else "nothing says where"
            raise CaptureError(
                f"{where}: the {self.n} samples are not to be found in an activation of shape {tuple(x.shape)}: {why}; if the "
                "batch was guessed wrong, say ef.capture(model, batch_size=…, batch_dim=0 or 1); otherwise freeze the parameter"
            )
        return Layout(self.n, place.axis, place.outer, place.inner)

    @contextlib.contextmanager
    def positions_first(self):
        """Inside attention the samples stand in dimension 1, whatever the model outside does."""
        before, self.batch_dim = self.batch_dim, 1
        try:
            yield
        finally:
            self.batch_dim = before

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

    def use(self, p: Tensor, dtype: torch.dtype) -> tuple[Tensor, _Use | None]:
        """Values to compute with, cut off from autograd, and where to record; no record for a tensor not watched."""
        if p not in self.sources:
            return p.to(dtype), None
        source = self.sources[p]
        if p.is_complex():
            raise CaptureError(f"{self.describe(p)}: complex numbers; capture has rules for real ones only; freeze it")
        if not self._done:  # a recomputed forward records nothing of its own
            for i in source.params:
                self._pending[i] = self._pending.get(i, 0) + 1
        cut = source.cut
        return cut if cut.dtype == dtype else cut.to(dtype), _Use(self, source)

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
        name = self._named(source)
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
        return self._named(self.sources[x])

    def _named(self, source: Source) -> str:
        return "parameter " + ", ".join(repr(self.names[i]) for i in source.params)

    # ---- recording ----

    def _record(self, use: _Use, factor: Factor) -> None:
        self._uses.append((use.source, factor))
        if self._stream is None:
            held = [x for x in vars(factor).values() if isinstance(x, Tensor) and not x.is_inference()]
            self._versions += [(use.source, x, x._version) for x in held]
        for i in use.source.params:
            self._pending[i] -= 1
        if self._stream is not None:
            self._stream.arrived(self, use.source)

    def backward(self, losses: Tensor, *, stream: Sequence[str] = (), weights: Tensor | None = None) -> None:
        """Run the one backward that fills the tape; no weight gradient is formed and no ``.grad`` is touched.

        Args:
            losses: (n,), one loss per sample, not reduced. Each sample's seed is 1, whatever reduction you think in:
                a mean over samples is ``combine`` with weights 1/n.
            stream: contractions to make layer by layer while the backward runs, factors being freed at once: any of
                "gram", "sqnorms", "combine". Afterwards the tape answers only these.
            weights: (n,) or (m, n) for "combine" in stream.

        Raises: ValueError for reduced or empty losses, CaptureError when a parameter's gradient escaped the rules.
        """
        self._check_losses(losses)
        if isinstance(stream, str) or any(s not in STREAMABLE for s in stream):
            raise ValueError(f"stream: got {stream!r}; needs a tuple of any of {', '.join(map(repr, STREAMABLE))}")
        if ("combine" in stream) != (weights is not None):
            raise ValueError("weights: give them with stream=('combine',), and only then")
        if stream:
            rows = None if weights is None else self._rows(weights)
            self._stream = Stream(stream, self.n, rows, weights is not None and weights.dim() == 1, losses.detach())
        self._done = True
        self._run(losses)
        if self._stream is not None:
            self._stream.finish(self)
        self._finished = True

    def _run(self, losses: Tensor) -> None:
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
            finally:
                self.idle, self.running, self.anchor.grad = True, False, None

    def _check_losses(self, losses: Tensor) -> None:
        if self._done:
            raise CaptureError("backward: this tape has had its backward; capture a new forward with ef.capture(model)")
        if not isinstance(losses, Tensor):
            raise TypeError(f"losses: got {type(losses).__name__}; needs a tensor (n,), one loss per sample")
        if losses.dim() != 1:
            got = "an already reduced loss" if losses.dim() == 0 else f"shape {tuple(losses.shape)}"
            raise ValueError(f"losses: got {got}; needs one loss per sample, (n,): use reduction='none'")
        if not self.sources or not self.params:
            raise CaptureError("model: no trainable parameter; set requires_grad_(True) on those that shall be captured")
        if not losses.requires_grad:
            raise CaptureError(
                "losses: they depend on no trainable parameter seen inside the `with`; compute them there, not under no_grad"
            )
        if self.n is None:
            raise CaptureError("losses: no parameter met a batch inside this `with`; run the model's forward there")
        if len(losses) != self.n:
            raise ValueError(
                f"losses: {len(losses)} of them for a batch of {self.n}; need one per sample; for several batches concatenate their "
                "inputs before one forward; if the batch was guessed wrong, say ef.capture(model, batch_size=…), or batch_dim=1 where "
                "positions stand before samples"
            )
        if self.n == 0:
            raise ValueError("losses: an empty batch has no gradient; needs at least one sample")
        self._refuse_leaks(losses)
        place = self.places.get(losses)
        if isinstance(place, Lost):
            raise CaptureError(
                f"losses: they are not one per sample, in the samples' order: {place.why}; compute each sample's loss from its own "
                "activations alone, and leave the order as it is"
            )

    def _refuse_leaks(self, losses: Tensor) -> None:
        """A parameter that reached the loss past every rule (a custom autograd.Function) must not be dropped silently."""
        watched = {id(p): name for name, p in zip(self.names, self.params)}
        stack, seen, foreign, anchor = [losses.grad_fn], set(), [], None
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            variable = getattr(node, "variable", None)
            anchor = node if variable is self.anchor else anchor
            if is_foreign(node):
                foreign.append(node)
            if type(node).__name__ == "CheckpointFunctionBackward":
                raise CaptureError(
                    "activation checkpointing with use_reentrant=True hides its parameters; use "
                    "torch.utils.checkpoint.checkpoint(…, use_reentrant=False)"
                )
            if variable is not None and id(variable) in watched:
                raise CaptureError(
                    f"parameter {watched[id(variable)]!r} reaches the losses through code that capture cannot see (a custom "
                    "autograd.Function, a scripted or compiled module: run it eagerly), through tensors that it does not take "
                    "for part of the batch (not arguments of the model), or from outside the `with`; or freeze it"
                )
            stack += [parent for parent, _ in node.next_functions]
        if anchor is None:
            raise CaptureError("losses: they depend on no parameter that was seen inside this `with`; compute them there")
        if foreign and self.strict and self.n > 1:
            watch_nodes(self, foreign, seen, anchor)

    # ---- questions ----

    def _contractions(self) -> list[Contraction]:
        if not self._done:
            raise CaptureError("tape: no backward yet; call tape.backward(losses) first")
        if not self._finished:
            raise CaptureError("tape: its backward was broken off, factors are missing; capture a new forward with ef.capture(model)")
        if self._stream is not None:
            raise CaptureError(
                f"tape: factors were freed while the backward ran, only {', '.join(self._stream.results)} can be asked; "
                "call tape.backward(losses) without stream= to keep them"
            )
        self._refuse_written()
        return [self._contraction(c) for c in components(self._uses)]

    def _refuse_written(self) -> None:
        """Factors look into the model's inputs and activations, which may have been written to since."""
        for source, x, version in self._versions:
            if x._version != version:
                raise CaptureError(
                    f"{self._named(source)}: a tensor of shape {tuple(x.shape)} that its per-sample gradients are made of was written to "
                    "in place since the backward; ask the tape before that, or give the model a copy (x.clone())"
                )

    def _contraction(self, component: Component) -> Contraction:
        return Contraction(component, self.params, self.n)

    def _total(self, parts: list[Tensor], shape) -> Tensor:
        p = self.params[0]
        return sum(parts[1:], parts[0]) if parts else torch.zeros(shape, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)

    def gram(self, other: Tape | None = None) -> Tensor:
        """K_ij = <g_i, g_j>, (n, n); with another tape of the same model <g_i, g'_j>, (n, m). Summed over all parameters."""
        if self._streamed("gram") and other is None:
            return self._stream.results["gram"]
        if not isinstance(other, Tape | None):
            raise TypeError(f"other: got {type(other).__name__}; needs a tape of the same model")
        if other is self:
            other = None
        mine = self._contractions()
        if other is None:
            return self._total(grams((c, None) for c in mine), (self.n, self.n))
        if [id(p) for p in self.params] != [id(p) for p in other.params]:
            raise ValueError("other: its tape is of another model; capture both from the same parameters")
        other._contractions()  # says what is missing
        pairs = []
        for joint in components(self._uses + other._uses):  # a branch may join parameters on one side only
            sides = [[u for u in joint.uses if any(u is v for v in tape._uses)] for tape in (self, other)]
            if all(sides):
                self._refuse_other_dtypes(*sides)
                left, right = (tape._contraction(Component(joint.params, uses)) for tape, uses in zip((self, other), sides))
                pairs.append((left, right))
        return self._total(grams(pairs), (self.n, other.n))

    def _refuse_other_dtypes(self, mine: list, theirs: list) -> None:
        """Both sides of a cross-Gram of a linear layer or a convolution are in one dtype."""
        ours, others = ({str(f.dtype) for _, f in uses if isinstance(f, (LinearFactor, ConvFactor))} for uses in (mine, theirs))
        if ours != others and ours and others:
            raise ValueError(
                f"other: its gradients of {self._named(mine[0][0])} are {', '.join(sorted(others))}, this tape's "
                f"{', '.join(sorted(ours))}; capture both from the model in one dtype, and both with autocast or both without"
            )

    def sqnorms(self) -> Tensor:
        """‖g_i‖² over all parameters, (n,)."""
        if self._streamed("sqnorms"):
            return self._stream.results["sqnorms"]
        return self._total([c.sqnorm() for c in self._contractions()], (self.n,))

    @check.kinds
    def project(self, directions: Sequence[Sequence[Tensor]]) -> Tensor:
        """<g_i, D_k>: directions are k lists of tensors shaped like ``params`` → (n, k)."""
        directions = [list(d) for d in directions]  # iterators are used up by one look
        if not directions:
            raise ValueError("directions: got none; needs at least one list of tensors shaped like tape.params")
        for k, d in enumerate(directions):
            if [getattr(x, "shape", None) for x in d] != [p.shape for p in self.params]:
                raise ValueError(f"directions[{k}]: needs {len(self.params)} tensors shaped like tape.params, in that order")
        maps = [dict(enumerate(d)) for d in directions]
        return self._total([c.project(maps) for c in self._contractions()], (self.n, len(directions)))

    @check.kinds
    def project_random(self, k: int, *, seed: int, kind: str = "sign") -> Tensor:
        """<g_i, D_j> for k random directions over all parameters, which are generated and never stored → (n, k): the features of TRAK.

        Args:
            k: how many. The first ones of a larger k are those of a smaller one.
            seed: parameter i of ``params``, laid flat, meets the directions of (seed, offset i) in entangle_fast/reference/philox.py:
                the numbers depend on nothing else, be it the backend, the layer, how often a parameter is used, or the chunks.
            kind: "sign" (±1) or "gaussian" (standard normal, drawn in float32).

        Not divided by √k: with another tape of the same parameters and the same seed, ``sketch @ other_sketch.T / k`` estimates
        ``gram(other)``, an entry to within about ‖g_i‖·‖g'_j‖/√k (Johnson & Lindenstrauss).

        Returns: float32; float64 for float64. Linear layers, convolutions and embeddings are contracted from their factors, biases and
        norms from what the tape holds. Where a weight is computed from parameters (LoRA merged, weight norm, parts of a
        parameter), gradients are formed for as many samples as two chunks of 64 MiB hold (128 in float64), one at least.

        Equivalent to: ``G = [g.view(tape.n, p.numel()) for p, g in zip(tape.params, tape.per_sample().values())];
        sum(g @ philox.directions(k, g.shape[1], seed, i, kind).T.to(g.dtype) for i, g in enumerate(G))``
        with philox from entangle_fast.reference

        Raises: ValueError and TypeError naming k, seed or kind; CaptureError before the backward, and after one with stream=.
        """
        check.directions(k, seed, kind)
        return self._total([c.project_random(k, seed, kind) for c in self._contractions()], (self.n, k))

    def combine(self, w: Tensor | None = None) -> list:
        """Σ_i w_i g_i: w (n,) → list of tensors like ``params``; w (m, n) → m such lists.

        Parameters that took no part get zeros. After a backward with stream=("combine",) w is not given again.
        """
        if self._streamed("combine") and w is None:
            return self._stream.combined(self)
        if w is None:
            raise ValueError("w: needs per-sample weights (n,) or (m, n)")
        rows = self._rows(w)
        found: dict[int, Tensor] = {}
        for c in self._contractions():
            found.update(c.combine(rows))
        return self._listed(found, len(rows), w.dim() == 1)

    def per_sample(self) -> dict[str, Tensor]:
        """Name → (n, *shape): the explicit per-sample gradients. For checking: this is what the rest avoids."""
        found: dict[int, Tensor] = {}
        for c in self._contractions():
            found.update(c.per_sample(0, self.n))
        shapes = zip(self.names, self.params)
        return {name: found.get(i, p.new_zeros(self.n, *p.shape)).view(self.n, *p.shape)
                for i, (name, p) in enumerate(shapes)}  # fmt: skip

    def _rows(self, w: Tensor) -> Tensor:
        if not isinstance(w, Tensor):
            raise TypeError(f"w: got {type(w).__name__}; needs a tensor ({self.n},) or (m, {self.n}), one weight per sample")
        if w.dim() not in (1, 2) or w.shape[-1] != self.n:
            raise ValueError(f"w: shape {tuple(w.shape)}; needs ({self.n},) or (m, {self.n}), one weight per sample")
        return w.detach().unsqueeze(0) if w.dim() == 1 else w.detach()

    def _listed(self, found: dict[int, Tensor], m: int, single: bool) -> list:
        lists = [[found[i][k].to(p.dtype).view(p.shape) if i in found else torch.zeros_like(p)
                  for i, p in enumerate(self.params)] for k in range(m)]  # fmt: skip
        return lists[0] if single else lists

    def _streamed(self, what: str) -> bool:
        return self._finished and self._stream is not None and what in self._stream.results
