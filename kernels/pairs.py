"""Shared by gram and sqnorm: dot products of two blocks of factor rows, the inner step of the position-pair form."""

import triton
import triton.language as tl

from .layer import column_offsets


@triton.jit
def products(
    x, xo, xm, y, yo, ym, columns, d, TABLED: tl.constexpr, VEC: tl.constexpr, PREC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """<x_r, y_s> in float32 (BM, BN): rows of width d at element offsets xo (BM,), yo (BN,), where xm, ym."""
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, d, BK):
        c = k + tl.arange(0, BK)
        cm = c < d
        off = column_offsets(columns, c, cm, TABLED, VEC)
        u = tl.load(x + xo[:, None] + off[None, :], mask=xm[:, None] & cm[None, :], other=0.0)
        v = tl.load(y + yo[:, None] + off[None, :], mask=ym[:, None] & cm[None, :], other=0.0)
        acc = tl.dot(u, tl.trans(v), acc, input_precision=PREC)
    return acc
