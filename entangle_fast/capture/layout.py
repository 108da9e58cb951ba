"""Where the samples are in an activation, and how to bring them to the front."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .errors import CaptureError


@dataclass(frozen=True)
class Layout:
    """axis: the dimension that counts samples.  flat: positions are folded into dimension 0 with the samples,
    sample-major (axis 0) or position-major (axis 1)."""

    n: int
    axis: int = 0
    flat: bool = False

    def positions(self, x: Tensor) -> Tensor:
        """(…, d) with the samples anywhere → (n, t, d)."""
        return self.leading(x).reshape(self.n, -1, x.shape[-1])

    def leading(self, x: Tensor) -> Tensor:
        """Samples first, the other dimensions in order."""
        if self.flat:
            t = x.shape[0] // self.n
            if self.axis == 0:
                return x.reshape(self.n, t, *x.shape[1:])
            return x.reshape(t, self.n, *x.shape[1:]).transpose(0, 1)
        return x.transpose(0, 1) if self.axis else x

    def spread(self, rows: Tensor, shape) -> Tensor:
        """Per-sample values (n, *aligned), aligned to the right of ``shape``, as a tensor broadcastable to ``shape``."""
        inner = len(shape) - 1 if not self.flat else len(shape)
        rows = rows.reshape(self.n, *(1,) * (inner - (rows.dim() - 1)), *rows.shape[1:])
        if not self.flat:
            return rows.transpose(0, 1) if self.axis else rows
        t = shape[0] // self.n
        rows = rows.expand(self.n, t, *rows.shape[2:])
        return (rows if self.axis == 0 else rows.transpose(0, 1)).reshape(shape[0], *rows.shape[2:])


def find(shape, n: int, batch_dim: int | None, seq_first: bool, where: str) -> Layout:
    """The layout of an activation of this shape in a batch of n.

    batch_dim: told by the user or by the operation, or None: guessed from the sizes, an ambiguity being an error.
    seq_first: the model holds modules that put positions first, so equal sizes are ambiguous.
    """
    if batch_dim == 1:
        if len(shape) >= 2 and shape[1] == n and (len(shape) > 2 or shape[0] % n):
            return Layout(n, 1)
        if shape[0] % n == 0:
            return Layout(n, 1, flat=True)
    elif len(shape) and shape[0] == n:
        if batch_dim is None and seq_first and n > 1 and len(shape) >= 3 and shape[1] == n:
            raise CaptureError(
                f"{where}: an activation of shape {tuple(shape)} has {n} samples in dimension 0 or in dimension 1, and "
                "the model holds modules with batch_first=False; say which: ef.capture(model, batch_dim=1) or =0"
            )
        return Layout(n)
    elif batch_dim is None and len(shape) >= 3 and shape[1] == n:
        return Layout(n, 1)
    elif len(shape) and n and shape[0] % n == 0:
        return Layout(n, 0, flat=True)
    raise CaptureError(
        f"{where}: an activation of shape {tuple(shape)} has no dimension for the batch of {n} samples; if the batch is "
        "not in dimension 0, say so: ef.capture(model, batch_dim=1); if it is guessed wrong: batch_size=…"
    )
