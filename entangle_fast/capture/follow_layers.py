"""Followers of whole layers and their losses: linear, convolutions and norms, lookups, attention, recurrences, cross-entropies."""

from __future__ import annotations

from torch import Tensor

from .follow import _before_last, _broadcast, _kept, _same, follows
from .place import Place


@follows("multi_head_attention_forward")
def _attention(c):
    if any(x.dim() != 3 or p.axis != 1 for x, p in c.placed if any(x is z for z in c.args[:3])) and c.n > 1:
        return c.mixed("takes the samples for positions")
    return Place(1 if c.k == 0 else 0)


@follows("lstm", "gru", "rnn_tanh", "rnn_relu")
def _recurrent(c):
    packed = isinstance(c.args[1], Tensor) and c.args[1].dim() == 1
    if packed or c.place.axis != (0 if c.args[-1] else 1):
        return c.lost("has a packed batch") if packed else c.mixed("takes the samples for positions")
    return c.place.at(c.place.axis if c.k == 0 else 1)


@follows("ctc_loss")
def _ctc(c):
    return c.place.at(0) if c.y.dim() else c.mixed("reduces over the samples")


@follows("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "conv_tbc", "group_norm",
         "instance_norm", "interpolate", "upsample", "upsample_nearest", "upsample_bilinear", "local_response_norm", "grid_sample",
         "affine_grid", "fold", "channel_shuffle", "embedding_bag", "multi_margin_loss", "multilabel_margin_loss",
         "multilabel_soft_margin_loss", "sample_loss", "linear_sample_loss")  # fmt: skip
def _one_a_row(c):
    """Each entry of dimension 0 on its own, all other dimensions together; a weight made from the batch is none."""
    if any(p.axis or x.dim() < 2 and c.name != "affine_grid" for x, p in c.placed[:1]) or not _same(c, [p for _, p in c.placed]):
        return c.mixed("goes over the samples")
    if c.name.endswith("_norm") and len(c.placed) > 1:
        return c.mixed("takes a weight from the samples")
    if c.name == "conv_tbc" or c.name.startswith("conv") and (len(c.placed) > 1 or c.x.dim() != int(c.name[-2]) + 2):
        return c.mixed("takes a weight or channels from the samples")
    return _kept(c)


@follows("embedding", "batch_norm", "prelu", "one_hot")
def _entry_by_entry(c):
    """Any dimension may be the samples'; a table or weight made from the batch is none."""
    own = c.args[0] if c.args else c.kwargs.get("input")
    if c.name == "embedding":  # torch's own takes the table first
        own = next(x for x in (*c.args, *c.kwargs.values()) if isinstance(x, Tensor) and not x.is_floating_point())
    if len(c.placed) > 1 or c.x is not own:
        return c.mixed("takes a weight from the samples")
    return c.place


@follows("linear")
def _linear(c):
    place = _entry_by_entry(c)
    return place if place is not c.place else _before_last(c, 1)


@follows("cross_entropy", "nll_loss")
def _classes(c):
    """Dimension 1 counts the classes, or the only one."""
    if any(p.axis == min(1, x.dim() - 1) for x, p in c.placed if x.dim() == max(z.dim() for z, _ in c.placed)):
        if c.x.dim() > 1 or c.y.dim() == 0:
            return c.mixed("goes over the samples")
    places = [p.at(p.axis - (x.dim() > c.y.dim() and p.axis > 1)) for x, p in c.placed]
    return places[0] if _same(c, places) or c.n == 1 else c.mixed("meets samples in different dimensions")


@follows("scaled_dot_product_attention")
def _attended(c):
    """Queries, keys and values are (…, positions, d)."""
    if any(x.dim() - p.axis < 3 for x, p in c.placed) and c.n > 1:
        return c.mixed("lets the samples attend to each other")
    return _broadcast(c)
