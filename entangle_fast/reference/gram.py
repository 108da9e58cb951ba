"""K_ij = <G_i, G'_j>: inner products of per-sample gradients, never holding n×P of them."""

from __future__ import annotations

import torch
from torch import Tensor

from . import per_sample
from .per_sample import accumulate_dtype, chunks, with_positions, without_padding


def gram(a: Tensor, b: Tensor, a2: Tensor | None = None, b2: Tensor | None = None, route: str = "tiles") -> Tensor:
    """Gram of a linear layer's per-sample gradients G_i = Σ_t b_it a_itᵀ.

    a (n,t,d_in), b (n,t,d_out); a2 (m,s,d_in), b2 (m,s,d_out), or None for the symmetric (n,n) case → (n, m).
    route: "rows" (t = 1) and "pairs" contract positions, Σ_ts <a_it,a'_js><b_it,b'_js>;
    "tiles" forms a tile of per-sample gradients and accumulates its Gram. All three agree.
    """
    dtype = accumulate_dtype(a, b)
    a, b = with_positions(a).to(dtype), with_positions(b).to(dtype)
    a2 = a if a2 is None else with_positions(a2).to(dtype)
    b2 = b if b2 is None else with_positions(b2).to(dtype)
    if route == "rows":
        return (a[:, 0] @ a2[:, 0].T) * (b[:, 0] @ b2[:, 0].T)
    if route == "pairs":
        return _pairs(a, b, a2, b2)
    return _tiles(a, b, a2, b2)


def _pairs(a, b, a2, b2):
    n, t, _ = a.shape
    m, s, _ = a2.shape
    out = a.new_zeros(n, m)
    if 0 in (n, m, t, s):
        return out
    a_flat, b_flat = a2.flatten(0, 1), b2.flatten(0, 1)
    for lo, hi in chunks(n, 2 * t * m * s * a.element_size()):
        pair = (a[lo:hi].flatten(0, 1) @ a_flat.T) * (b[lo:hi].flatten(0, 1) @ b_flat.T)
        out[lo:hi] = pair.view(hi - lo, t, m, s).sum((1, 3))
    return out


def _tiles(a, b, a2, b2):
    n, m = a.shape[0], a2.shape[0]
    out = a.new_zeros(n, m)
    if 0 in (n, m):
        return out
    for lo, hi in chunks(b.shape[2], (n + m) * a.shape[2] * a.element_size()):
        tile = per_sample.linear(a, b[:, :, lo:hi]).flatten(1)
        other = tile if a2 is a and b2 is b else per_sample.linear(a2, b2[:, :, lo:hi]).flatten(1)
        out += tile @ other.T
    return out


def gram_layers(a: list[Tensor], b: list[Tensor], a2: list[Tensor], b2: list[Tensor]) -> Tensor:
    """Gram of many one-position layers at once: a[l] (n,d_in_l), b[l] (n,d_out_l); a2, b2 the other side or empty → (n, m)."""
    none = [None] * len(a)
    return sum(gram(*layer, route="rows") for layer in zip(a, b, a2 or none, b2 or none, strict=True))


def gram_conv(
    x: Tensor, g: Tensor, kernel_size, stride, padding, dilation, groups: int,
    x2: Tensor | None = None, g2: Tensor | None = None, route: str = "tiles",
) -> Tensor:  # fmt: skip
    """Gram of a convolution's per-sample weight gradients, (n, m).

    x (n, C_in, *size), g (n, C_out, *out_size); x2, g2 the other side or None for the symmetric case.
    route "pairs" contracts positions of the unfolded input, "tiles" goes over output channels.
    """
    n, group_out = x.shape[0], g.shape[1] // groups
    symmetric = x2 is None
    x2, g2 = (x, g) if symmetric else (x2, g2)
    dtype = accumulate_dtype(x, g)
    out = torch.zeros(n, x2.shape[0], dtype=dtype, device=x.device)
    if 0 in out.shape:
        return out
    shape = (kernel_size, stride, padding, dilation)
    c_in = x.shape[1] // groups
    if route == "pairs":
        for k in range(groups):
            into, outof = slice(k * c_in, (k + 1) * c_in), slice(k * group_out, (k + 1) * group_out)
            out += _pairs(
                _unfold(x[:, into].to(dtype), g, shape), g[:, outof].to(dtype).flatten(2).mT,
                _unfold(x2[:, into].to(dtype), g2, shape), g2[:, outof].to(dtype).flatten(2).mT,
            )  # fmt: skip
        return out
    each = c_in * _volume(kernel_size) * out.element_size() * (n + x2.shape[0])
    for k in range(groups):
        into, base = slice(k * c_in, (k + 1) * c_in), k * group_out
        for lo, hi in chunks(group_out, each):
            rows = slice(base + lo, base + hi)
            tile = per_sample.conv(x[:, into], g[:, rows], *shape, 1).flatten(1)
            other = tile if symmetric else per_sample.conv(x2[:, into], g2[:, rows], *shape, 1).flatten(1)
            out += tile @ other.T
    return out


def _volume(kernel_size) -> int:
    volume = 1
    for k in kernel_size:
        volume *= k
    return volume


def _unfold(x, g, shape):
    cols = per_sample.windows(x, *shape)
    keep = [slice(None)] * (2 + len(shape[0])) + [slice(0, s) for s in g.shape[2:]]
    return cols[tuple(keep)].flatten(1, 1 + len(shape[0])).flatten(2).mT  # (n, T, C·k)


def gram_embedding(
    ids: Tensor, b: Tensor, ids2: Tensor | None = None, b2: Tensor | None = None, padding_idx: int = -1
) -> Tensor:
    """Gram of a lookup table's per-sample gradients: Σ over equal ids of <b_it, b'_js>, (n, m).

    ids (n, t) integers, b (n, t, d). Rows of padding_idx carry no gradient.
    """
    dtype = accumulate_dtype(b)
    ids2, b2 = (ids.long(), b) if ids2 is None else (ids2.long(), b2)
    ids = ids.long()
    n, t = ids.shape
    m, s = ids2.shape
    out = torch.zeros(n, m, dtype=dtype, device=b.device)
    if 0 in (n, m, t, s):
        return out
    left, right = without_padding(ids, b, padding_idx).to(dtype), without_padding(ids2, b2, padding_idx).to(dtype).flatten(0, 1)
    for lo, hi in chunks(n, 2 * t * m * s * out.element_size()):
        same = ids[lo:hi].reshape(-1, 1) == ids2.reshape(1, -1)
        pair = (left[lo:hi].flatten(0, 1) @ right.T) * same
        out[lo:hi] = pair.view(hi - lo, t, m, s).sum((1, 3))
    return out
