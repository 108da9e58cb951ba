"""Σ_i g_i², elementwise: the diagonal of the empirical Fisher, which no contraction of the samples' Gram gives."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.per_sample import accumulate_dtype, chunks
from .contract import Contraction
from .factors import LinearFactor
from .tape import Tape


def square_sums(tape: Tape) -> list[Tensor]:
    """Sum over samples of the squared per-sample gradients, for each of ``tape.params``: shaped like it, at least float32.

    A linear layer of one position: (b²)ᵀ (a²), nothing being formed. With t positions the same would take t² products, more
    work than the gradients themselves: there, and in convolutions, they are formed for a chunk of samples and summed, never
    n of them at once. Raises CaptureError before tape.backward.
    """
    found = [torch.zeros_like(p, dtype=accumulate_dtype(p)) for p in tape.params]
    for part in tape._contractions():
        if _one_position(part):
            factor = part.uses[0][1]
            a, b = (x[:, 0].to(found[part.indices[0]].dtype).square() for x in (factor.a, factor.b))
            found[part.indices[0]] += b.mT @ a
            continue
        for lo, hi in chunks(part.n, part.bytes_of_a_sample()):
            for i, g in part.per_sample(lo, hi).items():
                found[i] += g.to(found[i].dtype).square().sum(0).view(found[i].shape)
    return found


def _one_position(part: Contraction) -> bool:
    if len(part.uses) != 1:
        return False
    source, factor = part.uses[0]
    return source.identity and isinstance(factor, LinearFactor) and factor.a.shape[1] == 1
