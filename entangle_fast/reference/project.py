"""c_ik = <G_i, D_k>: per-sample gradients onto k given directions, or onto a random basis made on the fly."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import per_sample, philox
from .per_sample import accumulate_dtype, chunks, with_positions, without_padding


def project(a: Tensor, b: Tensor, basis: Tensor) -> Tensor:
    """a (n,t,d_in), b (n,t,d_out), basis (k, d_out, d_in) → (n, k)."""
    dtype = accumulate_dtype(a, b)
    a, b, basis = with_positions(a).to(dtype), with_positions(b).to(dtype), basis.to(dtype)
    return torch.stack([((a @ d.T) * b).sum((1, 2)) for d in basis], 1) if len(basis) else a.new_zeros(len(a), 0)


def project_conv(x: Tensor, g: Tensor, basis: Tensor, stride, padding, dilation, groups: int) -> Tensor:
    """x (n,C_in,*size), g (n,C_out,*out), basis (k, C_out, C_in/groups, *kernel) → (n, k).

    <G_i, D_k> is the convolution of x_i with D_k against g_i: nothing is unfolded.
    """
    dtype = accumulate_dtype(x, g)
    x, g, basis = x.to(dtype), g.to(dtype), basis.to(dtype)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
    columns = []
    for d in basis:
        y = convolve(x, d, None, tuple(stride), tuple(padding), tuple(dilation), groups)
        columns.append((y * g).flatten(1).sum(1))
    return torch.stack(columns, 1) if columns else x.new_zeros(len(x), 0)


def project_embedding(ids: Tensor, b: Tensor, basis: Tensor, padding_idx: int = -1) -> Tensor:
    """ids (n,t), b (n,t,d), basis (k, num_embeddings, d) → (n, k)."""
    ids, dtype = ids.long(), accumulate_dtype(b)  # uint8 takes -1 for 255
    b = b.to(dtype)
    columns = [without_padding(ids, b * F.embedding(ids, d.to(dtype)), padding_idx).sum((1, 2)) for d in basis]
    return torch.stack(columns, 1) if columns else b.new_zeros(len(b), 0)


_STRETCH = 1 << 16  # elements that are drawn at a time: their words are 32 bytes each, and as many again are at work


def _onto_drawn(grads: Tensor, out: Tensor, seed: int, offset: int, kind: str) -> None:
    """out (n, k) += grads (n, P) · Dᵀ, D (k, P) as in philox.directions; one direction at a time."""
    size = grads.shape[1]
    for at in range(0, size, _STRETCH):
        elements = torch.arange(at, min(at + _STRETCH, size), device=grads.device)
        for j, d in enumerate(philox.each_direction(out.shape[1], elements, size, seed, offset, kind)):
            out[:, j] += grads[:, at : at + _STRETCH] @ d.to(grads.dtype)


def project_random(a: Tensor, b: Tensor, k: int, seed: int, offset: int = 0, kind: str = "sign") -> Tensor:
    """Per-sample gradients of a linear layer onto k random directions, (n, k).

    The basis is never stored: D[j, e] of direction j and flat weight element e is defined in reference/philox.py, numel being
    d_out·d_in. kind: "sign" (±1) or "gaussian".
    """
    dtype = accumulate_dtype(a, b)
    a, b = with_positions(a).to(dtype), with_positions(b).to(dtype)
    n, _, d_in = a.shape
    out = a.new_zeros(n, k)
    for lo, hi in chunks(n, b.shape[2] * d_in * a.element_size()):
        _onto_drawn(per_sample.linear(a[lo:hi], b[lo:hi]).flatten(1), out[lo:hi], seed, offset, kind)
    return out


def project_random_conv(
    x: Tensor, g: Tensor, k: int, kernel_size, stride, padding, dilation, groups: int, seed: int, offset: int = 0, kind: str = "sign",
) -> Tensor:  # fmt: skip
    """x (n,C_in,*size), g (n,C_out,*out) → (n, k): the directions of project_random over a weight (C_out, C_in/groups, *kernel)."""
    n, volume = x.shape[0], torch.Size(kernel_size).numel()
    out = torch.zeros(n, k, dtype=accumulate_dtype(x, g), device=x.device)
    unfolded, weight = x.shape[1] * g.shape[2:].numel() * volume, g.shape[1] * (x.shape[1] // groups) * volume
    for lo, hi in chunks(n, (unfolded + weight) * out.element_size()):
        grads = per_sample.conv(x[lo:hi], g[lo:hi], kernel_size, stride, padding, dilation, groups)
        _onto_drawn(grads.flatten(1), out[lo:hi], seed, offset, kind)
    return out


_DRAWN_BYTES = 80  # at work on an element, Philox's int64 words


def project_random_embedding(
    ids: Tensor, b: Tensor, k: int, num_embeddings: int, seed: int, offset: int = 0, kind: str = "sign", padding_idx: int = -1
) -> Tensor:
    """ids (n,t), b (n,t,d) → (n, k): the directions of project_random over a (num_embeddings, d) table, in the rows that occur."""
    (n, t, d), ids = b.shape, ids.long()
    b = without_padding(ids, b, padding_idx).to(accumulate_dtype(b))
    out = b.new_zeros(n, k)
    for lo, hi in chunks(n, t * d * _DRAWN_BYTES):
        rows, at = ids[lo:hi].unique(return_inverse=True)
        elements = rows.unsqueeze(1) * d + torch.arange(d, device=b.device)
        for j, drawn in enumerate(philox.each_direction(k, elements, num_embeddings * d, seed, offset, kind)):
            out[lo:hi, j] = (b[lo:hi] * F.embedding(at, drawn.to(b.dtype))).sum((1, 2))
    return out
