"""Contractions over all uses of all parameters: cross terms of shared parameters are exact, never dropped.

Parameters that meet in one source (LoRA's B @ A, weight norm) form a component with all their uses. Then:
  direct   one factored use, or uses that merge into one or touch disjoint parts of the weight: contract the factors;
           linear layers of one position together, in one call; so are biases and norms
  rows     uses of different forms (an embedding tied to the output layer): add them row tile by row tile
  samples  anything else: explicit gradients of a chunk of samples, pulled back through the source
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..reference.per_sample import CHUNK_BYTES, chunks
from .factors import ConvFactor, DenseFactor, Factor, LinearFactor
from .sources import Source

Use = tuple[Source, Factor]


@dataclass
class Component:
    """Parameters (positions in Tape.params) that share sources, and the recorded uses of them."""

    params: list[int]
    uses: list[Use]


def components(uses: list[Use]) -> list[Component]:
    """Group uses by the parameters they reach."""
    of: dict[int, Component] = {}  # of each parameter
    for use in uses:
        touching = list({id(c): c for i in use[0].params if (c := of.get(i)) is not None}.values())
        mine = touching[0] if touching else Component([], [])
        for other in touching[1:]:
            mine.uses += other.uses
        mine.uses.append(use)
        mine.params = sorted({*use[0].params, *(i for c in (mine, *touching) for i in c.params)})
        of.update(dict.fromkeys(mine.params, mine))
    return list({id(c): c for c in of.values()}.values())


def _merged(uses: list[Use]) -> list[Use]:
    """Uses of the very same source added up where their sum has a factored form."""
    out: list[Use] = []
    for source, factor in uses:
        for k, (seen, before) in enumerate(out):
            same = seen is source or (seen.identity and source.identity and seen.params == source.params)
            if same and (both := before.merge(factor)) is not None:
                out[k] = (seen, both)
                break
        else:
            out.append((source, factor))
    return out


def _independent(uses: list[Use]) -> bool:
    """No cross terms: one use, or uses of disjoint parts of the same parameter."""
    if not all(source.isometric for source, _ in uses):
        return False
    spans = sorted(source.region or (0, 1 << 62) for source, _ in uses)
    return all(left[1] <= right[0] for left, right in zip(spans, spans[1:]))


def _aligned(left: list[Use], right: list[Use]) -> bool:
    """Both sides of a cross-Gram pair up use by use, on the same parts of the parameter."""
    return len(left) == len(right) and all(
        a.region == b.region and a.value.stride() == b.value.stride() and a.value.shape == b.value.shape
        and (a.identity == b.identity) and type(f) is type(g)
        and getattr(f, "kernel_size", None) == getattr(g, "kernel_size", None)
        for (a, f), (b, g) in zip(left, right)
    )  # fmt: skip


class Contraction:
    """One component's contractions; params are Tape.params."""

    def __init__(self, component: Component, params: list[Tensor], n: int):
        self.params, self.n = params, n
        self.indices = component.params
        self.uses = _merged(component.uses)

    @property
    def direct(self) -> bool:
        return _independent(self.uses)

    def _tileable(self) -> bool:
        return all(source.identity for source, _ in self.uses)

    def _pairs_up(self, other: Contraction | None) -> bool:
        return self.direct and (other is None or (other.direct and _aligned(self.uses, other.uses)))

    def sides(self, other: Contraction | None) -> list[Factor] | None:
        """The one factor of a parameter used once, on this side and the other; else None."""
        if len(self.uses) > 1 or not self._pairs_up(other):
            return None
        return [f for side in (self, other) if side is not None for _, f in side.uses]

    def gram(self, other: Contraction | None = None) -> Tensor:
        if self._pairs_up(other):
            pairs = [None] * len(self.uses) if other is None else [f for _, f in other.uses]
            return sum(f.gram(g) for (_, f), g in zip(self.uses, pairs))
        if self._tileable() and (other is None or other._tileable()):
            return self._gram_by_rows(other)
        return self._gram_by_samples(other)

    def _gram_by_rows(self, other):
        shape = self.params[self.indices[0]].shape
        rows, each = self.uses[0][1].rows, max(1, shape.numel() // max(1, shape[0] if shape else 1))
        out = None
        for lo, hi in chunks(rows, each * (self.n + (other.n if other else 0)) * 4):
            left = sum(f.row_tile(lo, hi) for _, f in self.uses).flatten(1)
            right = left if other is None else sum(f.row_tile(lo, hi) for _, f in other.uses).flatten(1)
            out = left @ right.mT if out is None else out.addmm_(left, right.mT)
        return out

    def _gram_by_samples(self, other):
        m = self.n if other is None else other.n
        spans = list(self._sample_chunks())
        other_spans = spans if other is None else list(other._sample_chunks())
        blocks = []
        for i, (lo, hi) in enumerate(spans):
            left = self.flat_per_sample(lo, hi)
            row = left.new_zeros(hi - lo, m)
            for j, (lo2, hi2) in enumerate(other_spans):
                if other is None and j > i:
                    break  # symmetric: the lower triangle, mirrored below
                right = left if other is None and i == j else (other or self).flat_per_sample(lo2, hi2)
                row[:, lo2:hi2] = left @ right.mT
            blocks.append(row)
        out = torch.cat(blocks) if blocks else torch.zeros(self.n, m)
        return out if other is not None else out.tril() + out.tril(-1).mT

    def _sample_chunks(self):
        size = sum(self.params[i].numel() for i in self.indices) * 4
        size += sum(source.value.numel() for source, _ in self.uses) * 4
        return chunks(self.n, min(size, CHUNK_BYTES))

    def per_sample(self, lo: int, hi: int) -> dict[int, Tensor]:
        """Explicit gradients of samples [lo, hi): position → (hi − lo, *shape)."""
        out: dict[int, Tensor] = {}
        for source, factor in self.uses:
            grads = factor.per_sample(lo, hi).view(hi - lo, *source.value.shape)
            for i, g in zip(source.params, source.pull(grads, self.params, batched=True)):
                if g is not None:
                    out[i] = out[i] + g if i in out else g
        return out

    def flat_per_sample(self, lo: int, hi: int) -> Tensor:
        found = self.per_sample(lo, hi)
        rows = [found[i].reshape(hi - lo, -1) for i in self.indices if i in found]  # a 0-d parameter is one column
        return torch.cat([r.float() if r.element_size() < 4 else r for r in rows], 1)

    def sqnorm(self) -> Tensor:
        if self.direct:
            return sum(f.sqnorm() for _, f in self.uses)
        return torch.cat([self.flat_per_sample(lo, hi).square().sum(1) for lo, hi in self._sample_chunks()])

    def project(self, directions: list[dict[int, Tensor]]) -> Tensor:
        """directions: k of position → tensor like that parameter → (n, k). Linear in the uses: nothing to add first."""
        total = None
        for source, factor in self.uses:
            basis = torch.stack([source.push(d, self.params) for d in directions])
            part = factor.project(basis)
            total = part if total is None else total + part
        return total

    def project_random(self, k: int, seed: int, kind: str) -> Tensor:
        """(n, k): parameter i onto the directions of stream (seed, i). Linear in the uses: nothing to add first."""
        whole = [(source, self._whole(source, factor)) for source, factor in self.uses]
        parts = [factor.project_random(k, seed, source.params[0], kind) for source, factor in whole if factor is not None]
        pulled = [use for use, (_, factor) in zip(self.uses, whole) if factor is None]
        if pulled:
            reach = sorted({i for source, _ in pulled for i in source.params})
            rest = Contraction(Component(reach, pulled), self.params, self.n)
            parts.append(rest._pulled_onto_random(k, seed, kind))
        return sum(parts[1:], parts[0])

    def _whole(self, source: Source, factor: Factor) -> Factor | None:
        """The factor with the parameter's elements in their order; None for a source that has none: copies, parts, products."""
        if source.identity:
            return factor
        x, p = source.value, self.params[source.params[0]]
        if not (source.isometric and source.region and x.numel() == p.numel() and p.is_contiguous()):
            return None
        if x.is_contiguous():  # a view of all of it
            return factor
        return LinearFactor(factor.b, factor.a) if isinstance(factor, LinearFactor) and x.mT.is_contiguous() else None

    def _pulled_onto_random(self, k: int, seed: int, kind: str) -> Tensor:
        """Explicit gradients: as many samples at a time as a chunk holds, since each chunk draws anew; formed by fewer, where the
        source is larger than its parameters (LoRA)."""
        out = []
        kept = 4 * sum(self.params[i].numel() for i in self.indices)
        for lo, hi in chunks(self.n, kept):
            rows: dict[int, Tensor] = {}
            for start, stop in chunks(hi - lo, self.bytes_of_a_sample()):
                for i, g in self.per_sample(lo + start, lo + stop).items():
                    if i not in rows:
                        rows[i] = g.new_empty(hi - lo, *g.shape[1:])
                    rows[i][start:stop] = g
            none = torch.zeros(hi - lo, k, device=self.params[self.indices[0]].device)
            out.append(sum((DenseFactor(g).project_random(k, seed, i, kind) for i, g in rows.items()), none))
        return torch.cat(out)

    def bytes_of_a_sample(self) -> int:
        """Of explicit gradients in float32, of the sources and of the parameters, and what a convolution unfolds to form them."""
        count = sum(source.value.numel() for source, _ in self.uses) + sum(self.params[i].numel() for i in self.indices)
        for _, factor in self.uses:
            if isinstance(factor, ConvFactor):
                count += factor.x.shape[1] * torch.Size(factor.kernel_size).numel() * factor.g.shape[2:].numel()
        return 4 * count

    def combine(self, w: Tensor) -> dict[int, Tensor]:
        """w (m, n) → position → (m, *shape)."""
        out: dict[int, Tensor] = {}
        for source, factor in self.uses:
            grads = factor.combine(w).view(len(w), *source.value.shape)
            pulled = source.pull(grads, self.params, batched=True) if not source.identity else [grads]
            for i, g in zip(source.params, pulled):
                if g is not None:
                    out[i] = out[i] + g if i in out else g
        return out


_COLUMNS = 4096  # of explicit gradients that are copied together


def grams(pairs: Iterable[tuple[Contraction, Contraction | None]]) -> list[Tensor]:
    """Summands of the Gram, or cross-Gram, over all components.

    Layers of one position make one for each dtype and device, in one call; explicit gradients one, in products of many columns.
    """
    parts, layers, dense = [], {}, {}
    for mine, other in pairs:
        factors = mine.sides(other)
        kind = type(factors[0]) if factors else None
        if kind is LinearFactor and all(f.a.shape[1] == 1 for f in factors):
            layers.setdefault((factors[0].a.dtype, factors[0].a.device), []).append([f.pair() for f in factors])
        elif kind is DenseFactor:
            first = factors[0].flat
            dense.setdefault((first.dtype, first.device), []).append([first, *(f.flat.to(first.dtype) for f in factors[1:])])
        else:
            parts.append(mine.gram(other))
    parts += [ops.gram_layers(*zip(*group)) for group in layers.values()]
    return parts + [_gram_of_columns(group) for group in dense.values()]


def _gram_of_columns(group: list[list[Tensor]]) -> Tensor:
    """Σ left @ rightᵀ of (n, d) and (m, d); one side: the symmetric form."""
    out, some = None, []
    for k, flat in enumerate(group):
        some.append(flat)
        if k + 1 == len(group) or sum(x[0].shape[1] for x in some) >= _COLUMNS:
            sides = [x[0] if len(x) == 1 else torch.cat(x, 1) for x in zip(*some)]
            left, right = sides[0], sides[-1].mT
            out, some = left @ right if out is None else out.addmm_(left, right), []
    return out


def listed(found: dict[int, Tensor], params: list[Tensor], m: int, single: bool) -> list:
    """position → (m, *shape) as m lists of tensors like the parameters, zeros where none was found; single: the only list."""
    lists = [[found[i][k].to(p.dtype).view(p.shape) if i in found else torch.zeros_like(p)
              for i, p in enumerate(params)] for k in range(m)]  # fmt: skip
    return lists[0] if single else lists


def bytes_held(uses: list[Use]) -> int:
    """Memory of the factors, counting each storage once."""
    seen = {}
    for _, factor in uses:
        for x in vars(factor).values():
            if isinstance(x, Tensor):
                seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return sum(seen.values())


