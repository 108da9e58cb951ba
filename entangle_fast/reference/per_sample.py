"""Per-sample gradients of one layer, formed explicitly: what every contraction is a contraction of.

Also the few helpers that all reference operations share: accumulation dtype and sample chunks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 64 << 20  # scratch of one chunk of per-sample gradients; large enough for full GEMM rate


def accumulate_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 stays float64; everything else is accumulated in float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def with_positions(x: Tensor) -> Tensor:
    """(n, d) → (n, 1, d); (n, t, d) as it is."""
    return x.unsqueeze(1) if x.dim() == 2 else x


def chunks(count: int, bytes_each: int) -> Iterator[tuple[int, int]]:
    """Ranges [start, stop) over ``count`` items whose scratch stays below CHUNK_BYTES."""
    size = max(1, CHUNK_BYTES // max(1, bytes_each))
    for start in range(0, count, size):
        yield start, min(start + size, count)


def linear(a: Tensor, b: Tensor) -> Tensor:
    """G_i = Σ_t b_it a_itᵀ.  a (n,t,d_in), b (n,t,d_out) → (n, d_out, d_in)."""
    dtype = accumulate_dtype(a, b)
    return torch.einsum("nto,nti->noi", with_positions(b).to(dtype), with_positions(a).to(dtype))


def windows(x: Tensor, kernel_size, stride, padding, dilation) -> Tensor:
    """The receptive fields of a convolution as a strided view of the padded input.

    x (n, C, *size) → (n, C, *kernel_size, *out_size); nothing but the padding is copied.
    """
    pad = [p for d in reversed(padding) for p in (d, d)]
    x = F.pad(x, pad) if any(pad) else x
    size, steps = x.shape[2:], x.stride()[2:]
    out = [(s - d * (k - 1) - 1) // st + 1 for s, k, st, d in zip(size, kernel_size, stride, dilation)]
    shape = (*x.shape[:2], *kernel_size, *out)
    strides = (*x.stride()[:2], *(s * d for s, d in zip(steps, dilation)), *(s * st for s, st in zip(steps, stride)))
    return x.as_strided(shape, strides, x.storage_offset())


def conv(x: Tensor, g: Tensor, kernel_size, stride, padding, dilation, groups: int) -> Tensor:
    """Per-sample gradient of a convolution's weight.

    x (n, C_in, *size), g (n, C_out, *out_size) → (n, C_out, C_in/groups, *kernel_size)
    """
    n, c_in, c_out = x.shape[0], x.shape[1], g.shape[1]
    dtype = accumulate_dtype(x, g)
    positions, width = g.shape[2:].numel(), c_in // groups * torch.Size(kernel_size).numel()
    cols = windows(x.to(dtype), kernel_size, stride, padding, dilation)
    extra = [slice(None)] * (2 + len(kernel_size)) + [slice(0, s) for s in g.shape[2:]]
    cols = cols[tuple(extra)].reshape(n, groups, width, positions)  # (n, G, C_in/G·k, T)
    g = g.to(dtype).reshape(n, groups, c_out // groups, positions)
    out = torch.einsum("ngot,ngkt->ngok", g, cols)
    return out.reshape(n, c_out, c_in // groups, *kernel_size)


def without_padding(ids: Tensor, b: Tensor, padding_idx: int) -> Tensor:
    """b (n,t,d), or what is made of it, with zeros where ids (n,t) are padding_idx (< 0: nowhere), NaN or infinite as it may be there."""
    return b if padding_idx < 0 else b.masked_fill((ids == padding_idx).unsqueeze(-1), 0)


def embedding(ids: Tensor, b: Tensor, num_embeddings: int, padding_idx: int = -1) -> Tensor:
    """Per-sample gradient of a lookup table.  ids (n, t), b (n, t, d) → (n, num_embeddings, d)."""
    n, d = ids.shape[0], b.shape[-1]
    t = ids.shape[1:].numel()
    ids, b = ids.reshape(n, t).long(), b.reshape(n, t, d)
    b = without_padding(ids, b, padding_idx).to(accumulate_dtype(b))
    out = b.new_zeros(n, num_embeddings, d)
    return out.scatter_add_(1, ids.unsqueeze(-1).expand_as(b), b)
