"""Look-aheads inside a step, of which the host learns nothing before it reads whether losses and gradients are finite.

An element far smaller than its own step needs a slot of 24 bytes beside the byte that all have (ops.step_lookahead). How many do,
only the data know: weights that are zero may all be among them, so that no number below that of the parameters holds for every
model, and so many slots are six copies of a float32 model. Where steps are as long as the weights, 1 in 800 needs one: a process
has one for each SHARE, 0.4 bytes a parameter. Whether they sufficed is read with the step's other questions. Where they did not,
nothing has changed yet: the step is taken anew with four times as many, as are all later ones, and gives the bits of slots for all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor

from ..optim import lookahead
from .sgd import SgdProcess

SHARE, LEAST = 64, 4096


class _TooFew(Exception):
    """Slots."""


class AheadProcess(SgdProcess):
    """Steps whose direction takes a gradient elsewhere than at θ."""

    def __init__(self, config, model, data, loss, seed):
        super().__init__(config, model, data, loss, seed)
        self._every = sum(p.numel() for p in self.params) + 1  # slots of which one is always left
        self.slots = min(self._every, max(LEAST, self._every // SHARE))

    def take_step(self, stage, k):
        while True:
            try:
                return super().take_step(stage, k)
            except _TooFew:
                self.slots = min(self._every, 4 * self.slots)

    @contextlib.contextmanager
    def ahead(self, move: Sequence[Tensor], alpha: float) -> Iterator[None]:
        """Inside the ``with`` the parameters stand at θ − alpha·move, once the step is settled; afterwards at their very bits."""
        with lookahead(self.params, move, alpha, self.slots) as left:
            self.ask(left, self._sufficed)
            yield

    @staticmethod
    def _sufficed(left: bool) -> None:
        if not left:
            raise _TooFew
