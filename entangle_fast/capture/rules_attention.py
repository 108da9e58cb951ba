"""nn.MultiheadAttention: torch's own function, its linear layers seen one by one.

F.multi_head_attention_forward hands itself to a torch-function mode as a whole. Here its source runs with that check
switched off, so that the mode sees the projections inside; scaled_dot_product_attention stays what it is.
"""

from __future__ import annotations

import types

import torch.nn.functional as F

from .errors import CaptureError


def _transparent():
    scope = dict(F.__dict__)
    scope["has_torch_function"] = lambda *_: False
    code = F.multi_head_attention_forward
    inner = types.FunctionType(code.__code__, scope, code.__name__, code.__defaults__)
    inner.__kwdefaults__ = code.__kwdefaults__
    return inner


def _attention(tape, func, args, kwargs):
    query = args[0] if args else kwargs["query"]
    if query.dim() != 3:
        raise CaptureError(f"nn.MultiheadAttention: query of shape {tuple(query.shape)} has no batch; needs three dimensions")
    with tape.positions_first(), tape.mode:
        return _transparent()(*args, **kwargs)


RULES = {F.multi_head_attention_forward: _attention}
