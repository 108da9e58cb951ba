"""The tape: what a captured forward and backward leave behind, and the questions it answers."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import check
from .contract import Component, Contraction, bytes_held, components, grams, listed
from .errors import CaptureError
from .factors import ConvFactor, LinearFactor
from .losses import check_losses
from .recorder import Recorder
from .stream import STREAMABLE, Stream


class Tape:
    """Factors of the per-sample gradients of n samples, for every trainable parameter.

    Made by ``ef.capture``; use it in this order: forward inside the ``with``, ``backward(losses)`` once, then any of
    ``gram``, ``sqnorms``, ``project``, ``project_random``, ``combine``, ``per_sample``.

    Attributes:
        names: the trainable parameters' names; results that are lists follow this order.
        params: the parameters themselves.
        n: the number of samples; None before a batch was seen.
    """

    def __init__(self, recorder: Recorder):
        self._recorder = recorder
        self.names, self.params = recorder.names, recorder.params
        weakref.finalize(self, recorder.drop)  # the losses' graph holds the recorder, and may outlive the tape

    @property
    def n(self) -> int | None:
        return self._recorder.n

    def __reduce_ex__(self, protocol):
        """Asked by copy and pickle: a deep copy would be of other parameters than the model's, a shallow one lose its factors."""
        raise TypeError("tape: it cannot be copied or pickled, it belongs to the parameters that it watched; keep the tape itself, "
                        "or copy what it answers: tape.gram(), tape.per_sample()")  # fmt: skip

    def __repr__(self) -> str:
        """One line: samples, modules with parameters, parameters, where they are, and what the factors take or why there are none."""
        r = self._recorder
        layers = len({name.rpartition(".")[0] for name in self.names})
        kinds = sorted({f"{str(p.dtype).removeprefix('torch.')} on {p.device}" for p in self.params})
        if not r.begun:
            state = "no backward yet"
        elif not r.finished:
            state = "its backward was broken off"
        else:
            state = f"{_amount(bytes_held(r.uses))} held" if r.stream is None else f"streamed: {', '.join(r.stream.results)}"
        counted = [f"{n} {what}{'s' * (n != 1)}" for n, what in ((layers, "layer"), (len(self.params), "parameter"))]
        samples = "no samples yet" if self.n is None else f"{self.n} sample{'s' * (self.n != 1)}"
        return f"Tape({samples}, {', '.join(counted)}, {' and '.join(kinds)}, {state})"

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
        check_losses(self._recorder, losses)
        if isinstance(stream, str) or any(s not in STREAMABLE for s in stream):
            raise ValueError(f"stream: got {stream!r}; needs a tuple of any of {', '.join(map(repr, STREAMABLE))}")
        if ("combine" in stream) != (weights is not None):
            raise ValueError("weights: give them with stream=('combine',), and only then")
        if stream:
            rows = None if weights is None else self._rows(weights)
            single = weights is not None and weights.dim() == 1
            self._recorder.stream = Stream(stream, self.n, rows, single, losses.detach())
        self._recorder.run(losses)

    # ---- questions ----

    def _contractions(self) -> list[Contraction]:
        r = self._recorder
        if not r.begun:
            raise CaptureError("tape: no backward yet; call tape.backward(losses) first")
        if not r.finished:
            raise CaptureError("tape: its backward was broken off, factors are missing; capture a new forward with ef.capture(model)")
        if r.stream is not None:
            raise CaptureError(
                f"tape: factors were freed while the backward ran, only {', '.join(r.stream.results)} can be asked; "
                "call tape.backward(losses) without stream= to keep them"
            )
        r.refuse_written()
        return [self._contraction(c) for c in components(r.uses)]

    def _contraction(self, component: Component) -> Contraction:
        return Contraction(component, self.params, self.n)

    def _total(self, parts: list[Tensor], shape) -> Tensor:
        p = self.params[0]
        return sum(parts[1:], parts[0]) if parts else torch.zeros(shape, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)

    def gram(self, other: Tape | None = None) -> Tensor:
        """K_ij = <g_i, g_j>, (n, n); with another tape of the same model <g_i, g'_j>, (n, m). Summed over all parameters."""
        if self._streamed("gram") and other is None:
            return self._recorder.stream.results["gram"]
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
        for joint in components(self._recorder.uses + other._recorder.uses):  # a branch may join parameters on one side only
            sides = [[u for u in joint.uses if any(u is v for v in tape._recorder.uses)] for tape in (self, other)]
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
                f"other: its gradients of {self._recorder.named(mine[0][0])} are {', '.join(sorted(others))}, this tape's "
                f"{', '.join(sorted(ours))}; capture both from the model in one dtype, and both with autocast or both without"
            )

    def sqnorms(self) -> Tensor:
        """‖g_i‖² over all parameters, (n,)."""
        if self._streamed("sqnorms"):
            return self._recorder.stream.results["sqnorms"]
        return self._total([c.sqnorm() for c in self._contractions()], (self.n,))

    @check.kinds
    def project(self, directions: Sequence[Sequence[Tensor]]) -> Tensor:
        """<g_i, D_k>: directions are k lists of tensors shaped like ``params`` → (n, k)."""
        given = list(directions)
        directions = [list(d) for d in given]  # iterators are used up by one look
        if not directions:
            raise ValueError("directions: got none; needs at least one list of tensors shaped like tape.params")
        for k, d in enumerate(directions):
            if [getattr(x, "shape", None) for x in d] != [p.shape for p in self.params]:
                mend = ": give project([direction])" if isinstance(given[k], Tensor) else ""
                raise ValueError(f"directions[{k}]: needs {len(self.params)} tensors shaped like tape.params, in that order{mend}")
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
        """Σ_i w_i g_i: w (n,) → list of tensors like ``params``; w (m, n) → m such lists (ops.combine takes (m, n) alone).

        Parameters that took no part get zeros. After a backward with stream=("combine",) w is not given again.
        """
        if self._streamed("combine") and w is None:
            return self._recorder.stream.combined(self.params)
        if w is None:
            raise ValueError("w: needs per-sample weights (n,) or (m, n)")
        rows = self._rows(w)
        found: dict[int, Tensor] = {}
        for c in self._contractions():
            found.update(c.combine(rows))
        return listed(found, self.params, len(rows), w.dim() == 1)

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

    def _streamed(self, what: str) -> bool:
        r = self._recorder
        return r.finished and r.stream is not None and what in r.stream.results


def _amount(count: float) -> str:
    """Of bytes, to three digits."""
    units = ["B", "kB", "MB", "GB"]
    while count >= 1000 and len(units) > 1:
        count, _ = count / 1000, units.pop(0)
    return f"{count:.3g} {units[0]}"
