"""‖G_i‖²: the diagonal of the Gram, at its own cost."""

from __future__ import annotations

from torch import Tensor

from . import per_sample
from .per_sample import accumulate_dtype, chunks, with_positions, without_padding


def sqnorm(a: Tensor, b: Tensor) -> Tensor:
    """Squared norms of a linear layer's per-sample gradients.  a (n,t,d_in), b (n,t,d_out) → (n,).

    t = 1: ‖a_i‖²‖b_i‖²; otherwise the cheaper of t×t position products and explicit gradients.
    """
    dtype = accumulate_dtype(a, b)
    a, b = with_positions(a).to(dtype), with_positions(b).to(dtype)
    n, t, d_in = a.shape
    d_out = b.shape[2]
    if t == 1:
        return a[:, 0].square().sum(1) * b[:, 0].square().sum(1)
    if t * (d_in + d_out) <= d_in * d_out:
        return ((a @ a.mT) * (b @ b.mT)).sum((1, 2))
    out = a.new_empty(n)
    for lo, hi in chunks(n, d_in * d_out * a.element_size()):
        out[lo:hi] = per_sample.linear(a[lo:hi], b[lo:hi]).square().sum((1, 2))
    return out


def sqnorm_conv(x: Tensor, g: Tensor, kernel_size, stride, padding, dilation, groups: int) -> Tensor:
    """Squared norms of a convolution's per-sample weight gradients, (n,)."""
    out = x.new_empty(x.shape[0], dtype=accumulate_dtype(x, g))
    each = x.shape[1] * out.element_size()
    for k in (*kernel_size, *g.shape[2:]):
        each *= k  # the unfolded input dominates
    for lo, hi in chunks(x.shape[0], each):
        part = per_sample.conv(x[lo:hi], g[lo:hi], kernel_size, stride, padding, dilation, groups)
        out[lo:hi] = part.flatten(1).square().sum(1)
    return out


def sqnorm_embedding(ids: Tensor, b: Tensor, padding_idx: int = -1) -> Tensor:
    """Squared norms of a lookup table's per-sample gradients.  ids (n,t), b (n,t,d) → (n,)."""
    ids = ids.long()
    b = without_padding(ids, b, padding_idx).to(accumulate_dtype(b))
    same = ids.unsqueeze(2) == ids.unsqueeze(1)
    return ((b @ b.mT) * same).sum((1, 2))
