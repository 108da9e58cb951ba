"""Philox4x32-10 (Salmon et al., SC 2011): random numbers as a function of (seed, offset, element).

Every backend draws the same numbers, in any order, and a resumed run continues the same stream.
Element e takes word e % 4 of the block with counter (e // 4, offset) and key seed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_M0, _M1, _W0, _W1, _MASK = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85, 0xFFFFFFFF


def _blocks(first: int, count: int, seed: int, offset: int | Tensor, device) -> list[Tensor]:
    return _words(torch.arange(first, first + count, dtype=torch.int64, device=device), seed, offset)


def _words(index: Tensor, seed: int, offset: int | Tensor) -> list[Tensor]:
    """The four words of blocks ``index``, int64 of any shape."""
    zero = torch.zeros_like(index)
    c = [index & _MASK, (index >> 32) & _MASK, zero + (offset & _MASK), zero + ((offset >> 32) & _MASK)]
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        p0, p1 = c[0] * _M0, c[2] * _M1  # wraps modulo 2^64, which is what is wanted
        c = [((p1 >> 32) & _MASK) ^ c[1] ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c[3] ^ k1, p0 & _MASK]
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c


def _numbers(words: list[Tensor], kind: str) -> Tensor:
    """The four words of blocks (…) → float32 (…, 4): "sign", or "gaussian" by Box–Muller on words (0, 1) and (2, 3)."""
    if kind == "sign":
        return 1.0 - 2.0 * (torch.stack(words, -1) >> 31).float()
    u = [((w >> 8).float() + 0.5) * 2.0**-24 for w in words]
    out = []
    for u1, u2 in ((u[0], u[1]), (u[2], u[3])):
        radius, angle = (-2.0 * u1.log()).sqrt(), (2.0 * math.pi) * u2
        out += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(out, -1)


def words(numel: int, seed: int, offset: int = 0, start: int = 0, device=None) -> Tensor:
    """``numel`` 32-bit words, as int64 (numel,), from element ``start`` on."""
    first = start // 4
    count = (start + numel + 3) // 4 - first
    flat = torch.stack(_blocks(first, count, seed, offset, device), 1).flatten()
    return flat[start - 4 * first :][:numel]


def normal(numel: int, seed: int, offset: int | Tensor = 0, start: int = 0, device=None) -> Tensor:
    """Standard normal float32 (numel,) by Box–Muller on word pairs (0, 1) and (2, 3) of each block.

    offset: a 0-d int64 tensor too, which the host never reads.
    """
    return _stretch(numel, seed, offset, start, device, "gaussian")


def sign(numel: int, seed: int, offset: int = 0, start: int = 0, device=None) -> Tensor:
    """±1 float32 (numel,) from the top bit of each word (set: −1)."""
    return _stretch(numel, seed, offset, start, device, "sign")


def _stretch(numel, seed, offset, start, device, kind) -> Tensor:
    first = start // 4
    count = (start + numel + 3) // 4 - first
    return _numbers(_blocks(first, count, seed, offset, device), kind).flatten()[start - 4 * first :][:numel]


def rows(starts: Tensor, width: int, seed: int, offset: int = 0, kind: str = "sign") -> Tensor:
    """float32 (m, width): row r holds elements starts[r], starts[r] + 1, … of the stream. starts: int64 (m,)."""
    index = (starts // 4).unsqueeze(1) + torch.arange((width + 6) // 4, device=starts.device)
    drawn = _numbers(_words(index, seed, offset), kind).flatten(1)
    return drawn.gather(1, (starts % 4).unsqueeze(1) + torch.arange(width, device=starts.device))
