"""nn.MultiheadAttention: torch's own function, its linear layers seen one by one.

F.multi_head_attention_forward hands itself to a torch-function mode as a whole. Here its source runs with that check
switched off, so that the mode sees the projections inside; scaled_dot_product_attention stays what it is.
"""

from __future__ import annotations

import types

import torch
import torch.nn.functional as F

from .errors import CaptureError
from .place import Place
from .rules_elementwise import aligned


def _transparent():
    scope = dict(F.__dict__)
    scope["has_torch_function"] = lambda *_: False
    code = F.multi_head_attention_forward
    inner = types.FunctionType(code.__code__, scope, code.__name__, code.__defaults__)
    inner.__kwdefaults__ = code.__kwdefaults__
    return inner


def _attention(recorder, func, args, kwargs):
    query = args[0] if args else kwargs["query"]
    if query.dim() != 3:
        raise CaptureError(f"nn.MultiheadAttention: query of shape {tuple(query.shape)} has no batch; needs three dimensions")
    place = recorder.places.of(query)
    if isinstance(place, Place) and place.axis != 1 and recorder.n > 1:
        raise CaptureError(
            f"nn.MultiheadAttention: query of shape {tuple(query.shape)} has its samples in dimension {place.axis}, attention takes "
            "dimension 1 for them: the samples would attend to each other; if the model's inputs have positions before samples, "
            "say ef.capture(model, batch_dim=1)"
        )
    with recorder.positions_first(), recorder.mode:
        return _transparent()(*args, **kwargs)


def _scaled_dot_product(recorder, func, args, kwargs):
    """A learned bias on the scores (T5's relative positions): a copy for each sample."""
    def bind(query, key, value, attn_mask=None, *rest, **options):
        return query, key, value, attn_mask, rest, options

    query, key, value, mask, rest, options = bind(*args, **kwargs)
    if mask is None or mask not in recorder.sources or any(x in recorder.sources for x in (query, key, value)):
        return NotImplemented
    scores = torch.broadcast_shapes(mask.shape, (*query.shape[:-1], key.shape[-2]))
    rows = aligned(recorder, mask, recorder.layout(query, "scaled_dot_product_attention"), scores)
    return func(query, key, value, rows, *rest, **options)


RULES = {F.multi_head_attention_forward: _attention, F.scaled_dot_product_attention: _scaled_dot_product}
