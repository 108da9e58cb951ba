"""Shapes for fake tensors, and derivatives, of torch.ops.entangle_fast.*"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from .. import reference
from ..dispatch import _LIBRARIES, NAMESPACE

_LIBRARY = _LIBRARIES[0]


def _dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _matrix(a: Tensor, n: int, m: int) -> Tensor:
    return a.new_empty((n, m), dtype=_dtype(a))


def _fake_loss(logits, target, *_):
    acc = _dtype(logits)
    row = target.new_empty(target.shape[:1], dtype=acc)
    return row, torch.empty_like(row), target.new_empty((2, *target.shape), dtype=acc)


def _fake_linear_backward(grad, h, weight, bias, *_):
    return torch.empty_like(h), torch.empty_like(weight), weight.new_empty(0 if bias is None else weight.shape[0])


def _fake_w2(x, y):
    return x.new_empty((), dtype=_dtype(x)), x.new_empty(x.shape, dtype=_dtype(x))


def _fake_project(directions, momentum, grads, *_):
    k = len(directions) // len(grads)
    lists = k + (2 if momentum else 1)
    return grads[0].new_empty((lists, lists), dtype=torch.float64), grads[0].new_empty(k, dtype=torch.float64)


def _fake_lookahead(params, grads, alpha, capacity=None):
    count = torch.library.get_ctx().new_dynamic_size() if capacity is None else capacity
    ulps = [torch.empty_like(p, dtype=torch.int8) for p in params]
    return ulps, params[0].new_empty((count, 2), dtype=torch.int64), params[0].new_empty(count, dtype=torch.float64)


FAKES = {
    "gram": lambda a, b, a2=None, b2=None, route="tiles": _matrix(a, a.shape[0], (a if a2 is None else a2).shape[0]),
    "gram_layers": lambda a, b, a2, b2: _matrix(a[0], a[0].shape[0], (a2 or a)[0].shape[0]),
    "gram_conv": lambda x, g, k, s, p, d, groups, x2=None, g2=None, route="tiles": _matrix(
        x, x.shape[0], (x if x2 is None else x2).shape[0]
    ),
    "gram_embedding": lambda ids, b, ids2=None, b2=None, padding_idx=-1: _matrix(
        b, b.shape[0], (b if b2 is None else b2).shape[0]
    ),
    "sqnorm": lambda a, b: a.new_empty(a.shape[0], dtype=_dtype(a)),
    "sqnorm_conv": lambda x, g, *_: x.new_empty(x.shape[0], dtype=_dtype(x)),
    "sqnorm_embedding": lambda ids, b, padding_idx=-1: b.new_empty(b.shape[0], dtype=_dtype(b)),
    "project": lambda a, b, basis: _matrix(a, a.shape[0], basis.shape[0]),
    "project_conv": lambda x, g, basis, *_: _matrix(x, x.shape[0], basis.shape[0]),
    "project_embedding": lambda ids, b, basis, padding_idx=-1: _matrix(b, b.shape[0], basis.shape[0]),
    "project_random": lambda a, b, k, seed, offset=0, kind="sign": _matrix(a, a.shape[0], k),
    "project_random_conv": lambda x, g, k, *_: _matrix(x, x.shape[0], k),
    "project_random_embedding": lambda ids, b, k, *_: _matrix(b, b.shape[0], k),
    "combine": lambda a, b, w: a.new_empty((w.shape[0], b.shape[-1], a.shape[-1]), dtype=_dtype(a, b, w)),
    "combine_conv": lambda x, g, w, kernel, s, p, d, groups: x.new_empty(
        (w.shape[0], g.shape[1], x.shape[1] // groups, *kernel), dtype=_dtype(x, g, w)
    ),
    "combine_embedding": lambda ids, b, w, num, padding_idx=-1: b.new_empty(
        (w.shape[0], num, b.shape[-1]), dtype=_dtype(b, w)
    ),
    "sample_loss": _fake_loss,
    "sample_loss_backward": lambda grad, logits, *_: torch.empty_like(logits),
    "linear_sample_loss": lambda h, weight, bias, target, *_: _fake_loss(h, target),
    "linear_sample_loss_backward": _fake_linear_backward,
    "w2_sorted": _fake_w2,
    "w2_moments": _fake_w2,
    "w2_features": _fake_w2,
    "step_gram": lambda tensors, k: tensors[0].new_empty((k, k), dtype=torch.float64),
    "step_project": _fake_project,
    "step_update": lambda *_: None,
    "step_adamw": lambda *_: None,
    "step_lookahead": _fake_lookahead,
    "step_lookahead_undo": lambda *_: None,
}


def _through_reference(op: str, inputs: tuple[int, ...]):
    """Derivative of ``op`` in the tensors, and lists of tensors, at positions ``inputs``: recompute through the reference."""

    def setup_context(ctx, inputs, output):
        flat, ctx.spec = tree_flatten(inputs)
        ctx.flat = [None if isinstance(x, Tensor) else x for x in flat]
        ctx.tensors = [k for k, x in enumerate(flat) if isinstance(x, Tensor)]
        ctx.save_for_backward(*(flat[k] for k in ctx.tensors))

    def backward(ctx, *grads):
        flat = list(ctx.flat)
        again = torch.is_grad_enabled()  # create_graph: this derivative will have one
        for k, x in zip(ctx.tensors, ctx.saved_tensors):
            flat[k] = x.view_as(x) if again else x.detach()
        args = tree_unflatten(flat, ctx.spec)
        given = [i for i in inputs if i < len(ctx.needs_input_grad)]  # the dispatcher leaves defaults out
        needed = tree_leaves([ctx.needs_input_grad[i] for i in given])
        wanted = [x for x, needs in zip(tree_leaves([args[i] for i in given]), needed) if needs]
        with torch.enable_grad():
            for x in wanted:
                x.requires_grad_()
            out = getattr(reference, op)(*args)
        out, grads = (out, grads) if isinstance(out, tuple) else ((out,), grads)
        pairs = [(o, g) for o, g in zip(out, grads) if g is not None and o.requires_grad]
        found = torch.autograd.grad(
            [o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=again, materialize_grads=True
        )
        by_id = {id(x): g for x, g in zip(wanted, found)}
        return tuple(tree_map(lambda x: by_id.get(id(x)), x) if i in inputs else None for i, x in enumerate(args))

    torch.library.register_autograd(f"{NAMESPACE}::{op}", backward, setup_context=setup_context, lib=_LIBRARY)


def _sample_loss_setup(ctx, inputs, output):
    logits, target, *ctx.options = inputs
    _, ce, lse = output
    ctx.mark_non_differentiable(ce, lse)
    ctx.save_for_backward(logits, target, ce, lse)


def _sample_loss_backward(ctx, grad, _ce, _lse):
    logits, target, ce, lse = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph: the kernel has no derivative
        loss = reference.sample_loss(logits, target, *ctx.options)[0]
        return (*torch.autograd.grad(loss, logits, grad, create_graph=True), None, *(None for _ in ctx.options))
    d = torch.ops.entangle_fast.sample_loss_backward(grad, logits, target, ce, lse, *ctx.options)
    return (d, None, *(None for _ in ctx.options))


def _linear_loss_setup(ctx, inputs, output):
    h, weight, bias, target, *ctx.options = inputs
    _, ce, lse = output
    ctx.mark_non_differentiable(ce, lse)
    ctx.biased = bias is not None
    ctx.save_for_backward(h, weight, target, ce, lse, *([bias] if ctx.biased else []))


def _linear_loss_backward(ctx, grad, _ce, _lse):
    h, weight, target, ce, lse, *bias = ctx.saved_tensors
    dh, dw, db = torch.ops.entangle_fast.linear_sample_loss_backward(
        grad, h, weight, bias[0] if ctx.biased else None, target, ce, lse, *ctx.options
    )
    return (dh, dw, db if ctx.biased else None, None, *(None for _ in ctx.options))


for _name, _fake in FAKES.items():
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_LIBRARY)
for _name, _inputs in {
    "gram": (0, 1, 2, 3),
    "gram_layers": (0, 1, 2, 3),
    "gram_conv": (0, 1, 7, 8),
    "gram_embedding": (1, 3),
    "sqnorm": (0, 1),
    "sqnorm_conv": (0, 1),
    "sqnorm_embedding": (1,),
    "project": (0, 1, 2),
    "project_conv": (0, 1, 2),
    "project_embedding": (1, 2),
    "project_random": (0, 1),
    "project_random_conv": (0, 1),
    "project_random_embedding": (1,),
    "combine": (0, 1, 2),
    "combine_conv": (0, 1, 2),
    "combine_embedding": (1, 2),
    "w2_sorted": (0, 1),
    "w2_moments": (0, 1),
    "w2_features": (0, 1),
}.items():
    _through_reference(_name, _inputs)
torch.library.register_autograd(
    f"{NAMESPACE}::sample_loss", _sample_loss_backward, setup_context=_sample_loss_setup, lib=_LIBRARY
)
torch.library.register_autograd(
    f"{NAMESPACE}::linear_sample_loss", _linear_loss_backward, setup_context=_linear_loss_setup, lib=_LIBRARY
)
