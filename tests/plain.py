"""Plain PyTorch's own error, for the rule that every backend is held to: at most twice that."""

import sys
from contextlib import contextmanager

from entangle_fast import reference

ROOMS = ("combine", "gram", "project", "sample_loss", "sqnorm", "w2", "per_sample")


@contextmanager
def plain_precision():
    """The reference as plain PyTorch: computed in the dtype of its input, nothing accumulated wider."""
    rooms = [sys.modules[f"{reference.__name__}.{name}"] for name in ROOMS]
    kept = [room.accumulate_dtype for room in rooms]
    for room in rooms:
        room.accumulate_dtype = lambda *xs: xs[0].dtype
    try:
        yield
    finally:
        for room, old in zip(rooms, kept):
            room.accumulate_dtype = old
