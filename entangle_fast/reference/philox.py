"""Philox4x32-10 (Salmon et al., SC 2011): random numbers as a function of (seed, offset, index), the same on every backend, in any order.

A block is four 32-bit words: counter (index as int64, offset as int64), low half first, key seed. Two ways to read blocks:

    a stream      element e takes word e % 4 of block e // 4, so that four neighbours share a call: the noise of steps
    directions    D[j, e], e < numel, takes of block (j // each)·numel + e
                  sign      each = 128: bit j % 128, which is bit j % 32 of word j % 128 // 32; set: −1, else +1
                  gaussian  each = 4: number j % 4 of the block's four normals
                  so that a call serves as many directions of one element as it has numbers, wherever a row begins
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_M0, _M1, _W0, _W1, _MASK = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85, 0xFFFFFFFF


def _blocks(index: Tensor, seed: int, offset: int | Tensor) -> list[Tensor]:
    """The four words of blocks ``index``, int64 of any shape."""
    zero = torch.zeros_like(index)
    c = [index & _MASK, (index >> 32) & _MASK, zero + (offset & _MASK), zero + ((offset >> 32) & _MASK)]
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        p0, p1 = c[0] * _M0, c[2] * _M1  # wraps modulo 2^64, which is what is wanted
        c = [((p1 >> 32) & _MASK) ^ c[1] ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c[3] ^ k1, p0 & _MASK]
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c


def _normals(words: list[Tensor]) -> list[Tensor]:
    """Four standard normals (float32) of each block, by Box–Muller on words (0, 1) and (2, 3)."""
    u = [((w >> 8).float() + 0.5) * 2.0**-24 for w in words]
    out = []
    for u1, u2 in ((u[0], u[1]), (u[2], u[3])):
        radius, angle = (-2.0 * u1.log()).sqrt(), (2.0 * math.pi) * u2
        out += [radius * angle.cos(), radius * angle.sin()]
    return out


def words(numel: int, seed: int, offset: int = 0, start: int = 0, device=None) -> Tensor:
    """``numel`` words of the stream, as int64 (numel,), from element ``start`` on."""
    return _stretch(numel, seed, offset, start, device, list)


def normal(numel: int, seed: int, offset: int | Tensor = 0, start: int = 0, device=None) -> Tensor:
    """Standard normals of the stream, float32 (numel,).

    offset: a 0-d int64 tensor too, which the host never reads.
    """
    return _stretch(numel, seed, offset, start, device, _normals)


def _stretch(numel, seed, offset, start, device, numbers) -> Tensor:
    first = start // 4
    index = torch.arange(first, (start + numel + 3) // 4, dtype=torch.int64, device=device)
    return torch.stack(numbers(_blocks(index, seed, offset)), 1).flatten()[start - 4 * first :][:numel]


def each_direction(k: int, elements: Tensor, numel: int, seed: int, offset: int = 0, kind: str = "sign") -> Iterator[Tensor]:
    """D[0], …, D[k − 1] at ``elements`` (int64, any shape) of a weight of ``numel``: float32 of that shape each."""
    for j in range(k):
        if kind == "sign":
            if j % 128 == 0:
                drawn = _blocks(elements + j // 128 * numel, seed, offset)
            yield 1.0 - 2.0 * (drawn[j % 128 // 32] >> j % 32 & 1).float()
        else:
            if j % 4 == 0:
                drawn = _normals(_blocks(elements + j // 4 * numel, seed, offset))
            yield drawn[j % 4]


def directions(k: int, numel: int, seed: int, offset: int = 0, kind: str = "sign", device=None) -> Tensor:
    """D, float32 (k, numel): "sign" (±1) or "gaussian" (standard normal). The first ones of a larger k are those of a smaller one."""
    elements = torch.arange(numel, dtype=torch.int64, device=device)
    return torch.stack(list(each_direction(k, elements, numel, seed, offset, kind))) if k else torch.empty(0, numel, device=device)
