"""Where the samples are in one tensor, and what a follower (follow*.py) is told about a call."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Dimension ``axis`` counts outer · n · inner entries: entry e belongs to sample (e // inner) % n."""

    axis: int
    outer: int = 1
    inner: int = 1
    soft: bool = False  # constant rows, one for each sample: agrees with any place that is surer

    def at(self, axis: int) -> Place:
        return self if axis == self.axis else replace(self, axis=axis)

    def size(self, n: int) -> int:
        return self.outer * n * self.inner


@dataclass(frozen=True)
class Row:
    """A tensor of one sample alone."""

    index: int


@dataclass(frozen=True)
class Lost:
    """Samples are in there, but no longer in an order that is known. mixed: gradients of several samples meet."""

    why: str
    mixed: bool = False


@dataclass
class Call:
    """One torch function call: what its follower needs to know."""

    name: str
    args: tuple
    kwargs: dict
    placed: list
    y: Tensor
    k: int  # y is the k-th result
    out: object
    n: int

    @property
    def x(self) -> Tensor:
        return self.placed[0][0]

    @property
    def place(self) -> Place:
        return self.placed[0][1]

    def mixed(self, how: str) -> Lost:
        return Lost(f"{self.name}(…) {how}", mixed=True)

    def lost(self, how: str) -> Lost:
        return Lost(f"{self.name}(…) {how}")

    def reshaped(self, shape, to) -> Place | Lost:
        """Row-major: from ``shape`` with this place to sizes ``to``."""
        p = self.place
        before, after = math.prod(shape[: p.axis]) * p.outer, p.inner * math.prod(shape[p.axis + 1 :])
        for d, size in enumerate(to):
            left, right = math.prod(to[:d]), math.prod(to[d + 1 :])
            if left and right and before % left == 0 and after % right == 0:
                outer, inner = before // left, after // right
                if outer * self.n * inner == size:
                    return Place(d, outer, inner)
        return self.lost(f"spreads the samples of {tuple(shape)} over the sizes {tuple(to)}")
