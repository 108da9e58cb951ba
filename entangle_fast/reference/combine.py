"""Σ_i w_i G_i: one weighted gradient for each row of w."""

from __future__ import annotations

import torch
from torch import Tensor

from .per_sample import accumulate_dtype, with_positions, without_padding


def _support(v: Tensor) -> slice:
    """From the first to the last sample whose weight is not zero: m rows on disjoint segments cost one gradient, not m.

    Only where reading the weights costs no synchronisation and nobody asks for their gradient; elsewhere all samples.
    """
    if v.device.type != "cpu" or v.requires_grad or torch.compiler.is_compiling():
        return slice(None)
    kept = v.detach().nonzero()
    return slice(int(kept[0]), int(kept[-1]) + 1) if len(kept) else slice(0, 0)


def combine(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    """a (n,t,d_in), b (n,t,d_out), w (m, n) → (m, d_out, d_in).

    Equivalent to: torch.einsum("mn,nto,nti->moi", w, b, a)
    """
    dtype = accumulate_dtype(a, b, w)
    a, b, w = with_positions(a).to(dtype), with_positions(b).to(dtype), w.to(dtype)
    rows = []
    for v in w:
        s = _support(v)
        rows.append((b[s] * v[s, None, None]).flatten(0, 1).T @ a[s].flatten(0, 1))
    return torch.stack(rows) if rows else a.new_zeros(0, b.shape[2], a.shape[2])


def combine_conv(x: Tensor, g: Tensor, w: Tensor, kernel_size, stride, padding, dilation, groups: int) -> Tensor:
    """x (n,C_in,*size), g (n,C_out,*out), w (m, n) → (m, C_out, C_in/groups, *kernel_size).

    The weight gradient of an ordinary convolution backward, its output gradient scaled per sample.
    """
    dtype = accumulate_dtype(x, g, w)
    shape = (g.shape[1], x.shape[1] // groups, *kernel_size)
    x, g, w = x.to(dtype), g.to(dtype), w.to(dtype)
    if 0 in (len(w), len(x)):
        return x.new_zeros(len(w), *shape)
    like = x.new_empty(()).expand(shape)
    spread = (-1,) + (1,) * (g.dim() - 1)
    rows = []
    for v in w:
        s = _support(v)
        scaled = g[s] * v[s].view(spread)
        rows.append(x.new_zeros(shape) if len(scaled) == 0 else torch.ops.aten.convolution_backward(
            scaled, x[s], like, None, stride, padding, dilation, False, [0] * len(kernel_size), groups,
            [False, True, False],
        )[1])  # fmt: skip
    return torch.stack(rows)


def combine_embedding(ids: Tensor, b: Tensor, w: Tensor, num_embeddings: int, padding_idx: int = -1) -> Tensor:
    """ids (n,t), b (n,t,d), w (m, n) → (m, num_embeddings, d)."""
    ids, dtype = ids.long(), accumulate_dtype(b, w)
    b, w = b.to(dtype), w.to(dtype)
    out = b.new_zeros(len(w), num_embeddings, b.shape[-1])
    # rows of their own where autograd looks: it refuses views that were written to
    tables = [torch.zeros_like(row) for row in out] if torch.is_grad_enabled() and (b.requires_grad or w.requires_grad) else out
    for table, v in zip(tables, w):
        s = _support(v)
        table.index_add_(0, ids[s].flatten(), without_padding(ids[s], b[s] * v[s, None, None], padding_idx).flatten(0, 1))
    return torch.stack(tables) if tables is not out and len(w) else out
