"""Σ_i w_i G_i: one weighted gradient for each row of w."""

from __future__ import annotations

import torch
from torch import Tensor

from .per_sample import accumulate_dtype, with_positions


def combine(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    """a (n,t,d_in), b (n,t,d_out), w (m, n) → (m, d_out, d_in).

    Equivalent to: torch.einsum("mn,nto,nti->moi", w, b, a)
    """
    dtype = accumulate_dtype(a, b, w)
    a, b, w = with_positions(a).to(dtype).flatten(0, 1), with_positions(b).to(dtype), w.to(dtype)
    rows = [(b * v[:, None, None]).flatten(0, 1).T @ a for v in w]
    return torch.stack(rows) if rows else a.new_zeros(0, b.shape[2], a.shape[1])


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
    return torch.stack([
        torch.ops.aten.convolution_backward(
            g * v.view(spread), x, like, None, stride, padding, dilation, False, [0] * len(kernel_size), groups,
            [False, True, False],
        )[1]
        for v in w
    ])  # fmt: skip


def combine_embedding(ids: Tensor, b: Tensor, w: Tensor, num_embeddings: int, padding_idx: int = -1) -> Tensor:
    """ids (n,t), b (n,t,d), w (m, n) → (m, num_embeddings, d)."""
    dtype = accumulate_dtype(b, w)
    b, w = (b * (ids != padding_idx).unsqueeze(-1)).to(dtype), w.to(dtype)
    out = b.new_zeros(len(w), num_embeddings, b.shape[-1])
    for row, v in zip(out, w):
        row.index_add_(0, ids.flatten(), (b * v[:, None, None]).flatten(0, 1))
    return out


