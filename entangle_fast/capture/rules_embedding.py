"""Lookup tables: F.embedding, and indexing a parameter with integer tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .errors import CaptureError
from .factors import EmbeddingFactor
from .layout import no_view
from .rules_elementwise import like
from .sources import tensors_in


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, weight, ids, layout, padding_idx, use):
        ctx.layout, ctx.padding_idx, ctx.use, ctx.num = layout, padding_idx, use, weight.shape[0]
        ctx.save_for_backward(ids)
        return no_view(F.embedding(ids, weight))

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (ids,) = ctx.saved_tensors
        ids = ctx.layout.positions(ids.unsqueeze(-1)).squeeze(-1)
        ctx.use.record(EmbeddingFactor(ids, ctx.layout.positions(g), ctx.num, ctx.padding_idx))
        return (None,) * 6


def lookup(recorder, weight: Tensor, ids: Tensor, padding_idx: int | None) -> Tensor:
    """weight (num, d) watched, ids integers of any shape."""
    layout = recorder.layout(ids, "embedding")
    w, use = recorder.use(weight, weight.dtype)
    return _Lookup.apply(recorder.anchor, w, ids, layout, padding_idx, use)


def embedding(recorder, func, args, kwargs):
    def bind(input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False):
        return input, weight, padding_idx, max_norm, scale_grad_by_freq

    ids, weight, padding_idx, max_norm, by_freq = bind(*args, **kwargs)
    _refuse_batch_options(recorder, weight, max_norm, by_freq)
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    if not recorder.carries_samples(ids):
        return _shared_rows(recorder, weight, ids, padding_idx)
    return lookup(recorder, weight, ids, padding_idx)


def _refuse_batch_options(recorder, weight: Tensor, max_norm, by_freq: bool) -> None:
    if max_norm is not None or by_freq:
        raise CaptureError(
            f"{recorder.describe(weight)}: max_norm and scale_grad_by_freq make an embedding depend on the whole batch; unset "
            "them, or freeze it with requires_grad_(False)"
        )


def embedding_bag(recorder, func, args, kwargs):
    """What the general paths would not notice: these options change the gradient alone, not the values."""
    def bind(input, weight, offsets=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, mode="mean", sparse=False, *_, **__):
        return weight, max_norm, scale_grad_by_freq, sparse

    weight, max_norm, by_freq, sparse = bind(*args, **kwargs)
    if weight in recorder.sources and sparse:
        raise CaptureError(
            f"{recorder.describe(weight)}: embedding_bag with sparse=True; capture has rules for dense gradients only; unset it"
        )
    if weight in recorder.sources and any(recorder.carries_samples(x) for x in tensors_in(args, kwargs)):
        _refuse_batch_options(recorder, weight, max_norm, by_freq)
    return NotImplemented


def _shared_rows(recorder, weight, ids, padding_idx):
    """The same rows for every sample (positions of shape (t,), a relative-position table): parameters alone."""
    out = F.embedding(ids, weight, padding_idx)  # whatever ``sparse`` says: sources have dense gradients
    recorder.sources.derive(F.embedding, [weight, ids], out)
    distinct = ids.unique().numel() == ids.numel() and (padding_idx is None or not (ids == padding_idx).any())
    if distinct and recorder.sources[weight].isometric:
        recorder.sources[out].isometric = True  # rows are selected, none twice
    return out


def _getitem(recorder, func, args, kwargs):
    table, index = args
    if isinstance(index, Tensor) and not index.is_floating_point() and index.dtype != torch.bool and table in recorder.sources:
        if recorder.carries_samples(index) and table.dim() == 2:
            return lookup(recorder, table, like(recorder, index, torch.where(index < 0, index + len(table), index)), None)
    return NotImplemented


RULES = {F.embedding: embedding, F.embedding_bag: embedding_bag, Tensor.__getitem__: _getitem}
