"""Philox4x32-10: the very numbers of entangle_fast/reference/philox.py.

Element e takes word e % 4 of the block with counter (e // 4, offset) and key seed; reference/philox.py is the source.
"""

import triton
import triton.language as tl

MASK = 0xFFFFFFFF


def key(seed: int, offset: int) -> tuple[int, int, int, int]:
    """seed and offset as four 32-bit words, low before high."""
    return seed & MASK, seed >> 32 & MASK, offset & MASK, offset >> 32 & MASK


@triton.jit
def blocks(index, k0, k1, o0, o1):
    """The four words (uint32 each, shaped like ``index``, int64) of blocks ``index``."""
    zero = tl.zeros_like(index)
    c0 = (index & 0xFFFFFFFF).to(tl.uint32)
    c1 = (index >> 32).to(tl.uint32)
    c2 = (zero + o0).to(tl.uint32)
    c3 = (zero + o1).to(tl.uint32)
    return tl.philox_impl(c0, c1, c2, c3, (zero + k0).to(tl.uint32), (zero + k1).to(tl.uint32))


@triton.jit
def uniform(word):
    """(0, 1) from the top 24 bits, centred in its cell."""
    return ((word >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08


@triton.jit
def box_muller(w0, w1):
    radius = tl.sqrt(-2.0 * tl.log(uniform(w0)))
    angle = 6.283185307179586 * uniform(w1)
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def in_order(x0, x1, x2, x3):
    """Values of word 0..3 of each block, (…, q) each, laid out by element: (…, 4q)."""
    return tl.interleave(tl.interleave(x0, x2), tl.interleave(x1, x3))


@triton.jit
def values(index, k0, k1, o0, o1, GAUSSIAN: tl.constexpr):
    """±1 (top bit set: −1) or standard normal float32, (…, 4q) for blocks ``index`` (…, q)."""
    w0, w1, w2, w3 = blocks(index, k0, k1, o0, o1)
    if GAUSSIAN:
        z0, z1 = box_muller(w0, w1)
        z2, z3 = box_muller(w2, w3)
        return in_order(z0, z1, z2, z3)
    else:
        word = in_order(w0, w1, w2, w3)
        return 1.0 - 2.0 * (word >> 31).to(tl.float32)


@triton.jit
def single_values(element, k0, k1, o0, o1, GAUSSIAN: tl.constexpr):
    """The same for elements at any place, four times the work: for rows that do not begin on a block."""
    w0, w1, w2, w3 = blocks(element // 4, k0, k1, o0, o1)
    r = (element % 4).to(tl.int32)
    if GAUSSIAN:
        first = r < 2
        c, s = box_muller(tl.where(first, w0, w2), tl.where(first, w1, w3))
        return tl.where(r % 2 == 0, c, s)
    else:
        word = tl.where(r < 2, tl.where(r == 0, w0, w1), tl.where(r == 2, w2, w3))
        return 1.0 - 2.0 * (word >> 31).to(tl.float32)
