"""How to bring the samples of an activation to the front, and per-sample values into its shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """n samples in dimension ``axis``, which counts outer · n · inner entries (see place.Place)."""

    n: int
    axis: int = 0
    outer: int = 1
    inner: int = 1

    @property
    def flat(self) -> bool:
        """Positions are folded into the samples' dimension."""
        return self.outer * self.inner != 1

    def leading(self, x: Tensor) -> Tensor:
        """Samples first, the other dimensions in order; folded positions become dimension 1."""
        x = x.movedim(self.axis, 0) if self.axis else x
        if not self.flat:
            return x
        x = x.reshape(self.outer, self.n, self.inner, *x.shape[1:])
        return (x[0] if self.outer == 1 else x.transpose(0, 1).flatten(1, 2)) if self.n else x.flatten(0, 2)

    def positions(self, x: Tensor) -> Tensor:
        """(…, d) with the samples anywhere → (n, t, d)."""
        x = self.leading(x)
        return x.unsqueeze(1) if x.dim() == 2 else x if x.dim() == 3 else x.flatten(1, -2)

    def spread(self, rows: Tensor, shape) -> Tensor:
        """Per-sample values (n, *others), others being ``shape`` without ``axis`` or broadcastable to it → like ``shape``."""
        if self.flat:
            rows = rows[None, :, None].expand(self.outer, self.n, self.inner, *rows.shape[1:]).flatten(0, 2)
        return rows.movedim(0, self.axis) if self.axis else rows


def no_view(y: Tensor) -> Tensor:
    """y, the only name of its memory: autograd lets nobody write to a view that an autograd Function returns."""
    return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y
