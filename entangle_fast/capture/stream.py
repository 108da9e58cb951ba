"""Contractions made while the backward runs, so that no factor outlives its parameter's last use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from .contract import Contraction, components, listed
from .sources import Source

if TYPE_CHECKING:
    from .recorder import Recorder

STREAMABLE = ("gram", "sqnorms", "combine")


class Stream:
    """Contracts each parameter as soon as its last use has arrived, and lets its factors go."""

    def __init__(self, what: Sequence[str], n: int, rows: Tensor | None, single: bool, like: Tensor):
        self.what, self.n, self.rows, self.single, self.like = tuple(what), n, rows, single, like
        self.results: dict = {name: None if name != "combine" else {} for name in what}

    def arrived(self, recorder: Recorder, source: Source) -> None:
        if any(recorder.pending[i] for i in source.params):
            return
        reach, before = set(source.params), 0
        while len(reach) > before:  # all parameters joined to these through other sources
            before = len(reach)
            reach = reach.union(*(s.params for s, _ in recorder.uses if reach & set(s.params)))
        ready = [u for u in recorder.uses if reach & set(u[0].params)]
        if any(recorder.pending[i] for i in reach):
            return
        recorder.uses = [u for u in recorder.uses if not set(u[0].params) & reach]
        self._contract(recorder, ready)

    def finish(self, recorder: Recorder) -> None:
        """What is left: parameters with a use that the losses do not depend on."""
        left, recorder.uses = recorder.uses, []
        self._contract(recorder, left)
        for name, shape in (("gram", (self.n, self.n)), ("sqnorms", (self.n,))):
            if name in self.results and self.results[name] is None:
                self.results[name] = self.like.new_zeros(shape)

    def _contract(self, recorder: Recorder, uses) -> None:
        for component in components(uses):
            c = Contraction(component, recorder.params, self.n)
            if "gram" in self.what:
                self._add("gram", c.gram())
            if "sqnorms" in self.what:
                self._add("sqnorms", c.sqnorm())
            if "combine" in self.what:
                self.results["combine"].update(c.combine(self.rows))

    def _add(self, name: str, part: Tensor) -> None:
        before = self.results[name]  # layers may differ in dtype
        self.results[name] = part if before is None else before.add_(part) if before.dtype == part.dtype else before + part

    def combined(self, params: list[Tensor]) -> list:
        return listed(self.results["combine"], params, len(self.rows), self.single)
