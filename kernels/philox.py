"""Philox4x32-10: the very numbers of entangle_fast/reference/philox.py, which says how streams and directions are read off blocks."""

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
    """Values of word 0..3 of each block, (…, q) each, side by side: (…, 4q)."""
    return tl.interleave(tl.interleave(x0, x2), tl.interleave(x1, x3))


@triton.jit
def normals(index, k0, k1, o0, o1):
    """Standard normal float32, (…, 4q) for blocks ``index`` (…, q)."""
    w0, w1, w2, w3 = blocks(index, k0, k1, o0, o1)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return in_order(z0, z1, z2, z3)


@triton.jit
def directions(first, elements, numel, k0, k1, o0, o1, COUNT: tl.constexpr, GAUSSIAN: tl.constexpr):
    """Directions first … first + COUNT − 1 at ``elements`` (E, int64) of a weight of ``numel``: float32 (E, COUNT).

    first: a multiple of COUNT. COUNT: 32, 64 or 128 of signs, which take one call an element and 2 operations more each.
    """
    if GAUSSIAN:
        block = (first // 4 + tl.arange(0, COUNT // 4)).to(tl.int64)
        w0, w1, w2, w3 = blocks(block[:, None] * numel + elements[None, :], k0, k1, o0, o1)
        z0, z1 = box_muller(w0, w1)
        z2, z3 = box_muller(w2, w3)
        fours = tl.permute(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (0, 2, 3, 1))
        return tl.trans(tl.reshape(fours, (COUNT, elements.shape[0])))  # elements together: tf32 of tl.dot needs them so
    else:
        w0, w1, w2, w3 = blocks(elements + tl.cast(first // 128, tl.int64) * numel, k0, k1, o0, o1)
        at = first // 32 % 4
        if COUNT == 128:
            words = in_order(w0, w1, w2, w3)
        elif COUNT == 64:
            words = tl.interleave(tl.where(at == 0, w0, w2), tl.where(at == 0, w1, w3))
        else:
            # a sum: of a choice Triton makes one in each thread that needs it, with all of Philox before it
            fours = tl.reshape(in_order(w0, w1, w2, w3), (elements.shape[0], 4))
            words = tl.sum(tl.where((tl.arange(0, 4) == at)[None, :], fours, 0), 1)
        turned = words[:, None] << (31 - tl.arange(0, 32)).to(tl.uint32)[None, :]  # each direction's bit on top
        signs = ((turned & 0x80000000) | 0x3F800000).to(tl.float32, bitcast=True)
        return tl.reshape(signs, (elements.shape[0], COUNT))
