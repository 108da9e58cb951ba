"""The factored per-sample gradients of one use of one weight, and their contractions.

A factor knows n samples of a weight's gradient without holding n copies of the weight:
gram(other), sqnorm(), project(basis), project_random(k, …), combine(w), and slices of the explicit gradients for the cases
where uses of one parameter have to be added before they are contracted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..reference import per_sample


@dataclass
class LinearFactor:
    """G_i = Σ_t b_it a_itᵀ.  a (n,t,d_in), b (n,t,d_out); the weight is (d_out, d_in)."""

    a: Tensor
    b: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.a.dtype

    @property
    def rows(self) -> int:
        return self.b.shape[2]

    def pair(self) -> tuple[Tensor, Tensor]:
        """(n,d) and (n,d) where there is one position."""
        return (self.a[:, 0], self.b[:, 0]) if self.a.shape[1] == 1 else (self.a, self.b)

    def merge(self, other):
        """The factor of the sum of both uses, or None when it has no factored form."""
        if not isinstance(other, LinearFactor):
            return None
        return LinearFactor(torch.cat([self.a, other.a], 1), torch.cat([self.b, other.b], 1))

    def gram(self, other=None) -> Tensor:
        if other is not None and self.a.shape[1] != other.a.shape[1]:
            return ops.gram(self.a, self.b, other.a, other.b)
        return ops.gram(*self.pair()) if other is None else ops.gram(*self.pair(), *other.pair())

    def sqnorm(self) -> Tensor:
        return ops.sqnorm(*self.pair())

    def project(self, basis: Tensor) -> Tensor:
        return ops.project(*self.pair(), basis.to(self.a.dtype))

    def project_random(self, k: int, seed: int, offset: int, kind: str) -> Tensor:
        return ops.project_random(*self.pair(), k, seed=seed, offset=offset, kind=kind)

    def combine(self, w: Tensor) -> Tensor:
        return ops.combine(*self.pair(), w)

    def per_sample(self, lo: int, hi: int) -> Tensor:
        return per_sample.linear(self.a[lo:hi], self.b[lo:hi])

    def row_tile(self, lo: int, hi: int) -> Tensor:
        return per_sample.linear(self.a, self.b[:, :, lo:hi])


@dataclass
class ConvFactor:
    """Gradient of a convolution's weight.  x (n,C_in,*size), g (n,C_out,*out_size)."""

    x: Tensor
    g: Tensor
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    def _shape(self):
        return dict(stride=self.stride, padding=self.padding, dilation=self.dilation, groups=self.groups)

    @property
    def rows(self) -> int:
        return self.g.shape[1]

    def merge(self, other):
        return None

    def gram(self, other=None) -> Tensor:
        x2, g2 = (None, None) if other is None else (other.x, other.g)
        return ops.gram_conv(self.x, self.g, self.kernel_size, **self._shape(), x2=x2, g2=g2)

    def sqnorm(self) -> Tensor:
        return ops.sqnorm_conv(self.x, self.g, self.kernel_size, **self._shape())

    def project(self, basis: Tensor) -> Tensor:
        basis = basis.reshape(len(basis), self.g.shape[1], self.x.shape[1] // self.groups, *self.kernel_size)
        return ops.project_conv(self.x, self.g, basis.to(self.x.dtype), **self._shape())

    def project_random(self, k: int, seed: int, offset: int, kind: str) -> Tensor:
        return ops.project_random_conv(self.x, self.g, k, self.kernel_size, seed=seed, offset=offset, kind=kind, **self._shape())

    def combine(self, w: Tensor) -> Tensor:
        return ops.combine_conv(self.x, self.g, w, self.kernel_size, **self._shape())

    def per_sample(self, lo: int, hi: int) -> Tensor:
        shape = (self.kernel_size, self.stride, self.padding, self.dilation, self.groups)
        return per_sample.conv(self.x[lo:hi], self.g[lo:hi], *shape)

    def row_tile(self, lo: int, hi: int) -> Tensor:
        shape = (self.kernel_size, self.stride, self.padding, self.dilation)
        into, outof = self.x.shape[1] // self.groups, self.g.shape[1] // self.groups
        parts = []
        for k in range(lo // outof, (hi - 1) // outof + 1):  # the groups that these rows belong to
            start, stop = max(lo, k * outof), min(hi, (k + 1) * outof)
            x = self.x[:, k * into : (k + 1) * into]
            parts.append(per_sample.conv(x, self.g[:, start:stop], *shape, 1))
        return torch.cat(parts, 1)


@dataclass
class EmbeddingFactor:
    """Gradient of a lookup table.  ids (n,t), b (n,t,d); the weight is (num_embeddings, d)."""

    ids: Tensor
    b: Tensor
    num_embeddings: int
    padding_idx: int | None

    @property
    def rows(self) -> int:
        return self.num_embeddings

    def merge(self, other):
        if not isinstance(other, EmbeddingFactor) or self.padding_idx != other.padding_idx:
            return None
        ids, b = torch.cat([self.ids, other.ids], 1), torch.cat([self.b, other.b], 1)
        return EmbeddingFactor(ids, b, self.num_embeddings, self.padding_idx)

    def gram(self, other=None) -> Tensor:
        pair = () if other is None else (other.ids, other.b)
        return ops.gram_embedding(self.ids, self.b, *pair, padding_idx=self.padding_idx)

    def sqnorm(self) -> Tensor:
        return ops.sqnorm_embedding(self.ids, self.b, padding_idx=self.padding_idx)

    def project(self, basis: Tensor) -> Tensor:
        return ops.project_embedding(self.ids, self.b, basis, padding_idx=self.padding_idx)

    def project_random(self, k: int, seed: int, offset: int, kind: str) -> Tensor:
        return ops.project_random_embedding(
            self.ids, self.b, k, self.num_embeddings, seed=seed, offset=offset, kind=kind, padding_idx=self.padding_idx
        )

    def combine(self, w: Tensor) -> Tensor:
        return ops.combine_embedding(self.ids, self.b, w, self.num_embeddings, padding_idx=self.padding_idx)

    def _padding(self) -> int:
        return -1 if self.padding_idx is None else self.padding_idx

    def per_sample(self, lo: int, hi: int) -> Tensor:
        return per_sample.embedding(self.ids[lo:hi], self.b[lo:hi], self.num_embeddings, self._padding())

    def row_tile(self, lo: int, hi: int) -> Tensor:
        inside = (self.ids >= lo) & (self.ids < hi) & (self.ids != self._padding())
        ids = torch.where(inside, self.ids - lo, 0)
        return per_sample.embedding(ids, self.b.masked_fill(~inside.unsqueeze(-1), 0), hi - lo)


@dataclass
class DenseFactor:
    """Explicit per-sample gradients v (n, *shape): biases, norms, positional embeddings: no larger than an activation."""

    v: Tensor

    @property
    def rows(self) -> int:
        return self.v.shape[1] if self.v.dim() > 1 else 1

    def merge(self, other):
        return DenseFactor(self.v + other.v) if isinstance(other, DenseFactor) else None

    @property
    def flat(self) -> Tensor:
        """(n, d) in the dtype of sums."""
        x = self.v.flatten(1) if self.v.dim() > 1 else self.v.unsqueeze(1)
        return x.to(per_sample.accumulate_dtype(self.v))

    def gram(self, other=None) -> Tensor:
        # an outer product with ones: the rows route of gram with d_out = 1 would do the same work twice
        left = self.flat
        return left @ (left if other is None else other.flat.to(left.dtype)).mT

    def sqnorm(self) -> Tensor:
        return self.flat.square().sum(1)

    def project(self, basis: Tensor) -> Tensor:
        flat = self.flat
        return flat @ basis.reshape(len(basis), flat.shape[1]).to(flat.dtype).mT

    def project_random(self, k: int, seed: int, offset: int, kind: str) -> Tensor:
        flat = self.flat  # a layer with one output, whose gradient is 1
        return ops.project_random(flat, flat.new_ones(len(flat), 1), k, seed=seed, offset=offset, kind=kind)

    def combine(self, w: Tensor) -> Tensor:
        flat = self.flat.to(per_sample.accumulate_dtype(self.v, w))
        return (w.to(flat.dtype) @ flat).view(len(w), *self.v.shape[1:])

    def per_sample(self, lo: int, hi: int) -> Tensor:
        return self.v[lo:hi].to(per_sample.accumulate_dtype(self.v))

    def row_tile(self, lo: int, hi: int) -> Tensor:
        v = self.v.to(per_sample.accumulate_dtype(self.v))
        return v[:, lo:hi] if v.dim() > 1 else v.unsqueeze(1)


Factor = LinearFactor | ConvFactor | EmbeddingFactor | DenseFactor
