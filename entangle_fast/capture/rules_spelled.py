"""Other spellings of what has a rule: its arguments in another order, or a function made of functions that have one."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import CaptureError
from .rules_elementwise import rounded
from .rules_embedding import embedding, embedding_bag
from .rules_linear import addmm, not_cast_on_a_cpu
from .rules_norm import batch_norm, instance_norm
from .sources import function_name, tensors_in


def _batch_norm(recorder, func, args, kwargs):
    def bind(input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled):
        return input, running_mean, running_var, weight, bias, training, momentum, eps

    return batch_norm(recorder, F.batch_norm, bind(*args, **kwargs), {})


def _instance_norm(recorder, func, args, kwargs):
    def bind(input, weight, bias, running_mean, running_var, use_input_stats, momentum, eps, cudnn_enabled):
        return input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps

    return instance_norm(recorder, F.instance_norm, bind(*args, **kwargs), {})


def _embedding(recorder, func, args, kwargs):
    def bind(weight, indices, padding_idx=-1, scale_grad_by_freq=False, sparse=False):
        return indices, weight, None if padding_idx < 0 else padding_idx, None, 2.0, scale_grad_by_freq, sparse

    return embedding(recorder, F.embedding, bind(*args, **kwargs), {})


def _embedding_bag(recorder, func, args, kwargs):
    def bind(weight, indices, offsets, scale_grad_by_freq=False, mode=0, sparse=False, *_, **__):
        return indices, weight, offsets, None, 2.0, scale_grad_by_freq, mode, sparse

    return embedding_bag(recorder, F.embedding_bag, bind(*args, **kwargs), {})


def _index_select(recorder, func, args, kwargs):
    def bind(input, dim, index, *, out=None):
        return input, dim, index, out

    table, dim, index, out = bind(*args, **kwargs)
    if out is not None or dim or table.dim() != 2 or index.dim() != 1 or table not in recorder.sources:
        return NotImplemented
    return embedding(recorder, F.embedding, (index, table), {})


def made_of(form: Callable) -> Callable:
    """The rule of a function that is ``form``, whose own functions meet their rules."""

    def rule(recorder, func, args, kwargs):
        if kwargs.get("out") is not None:
            return NotImplemented
        try:
            with recorder.mode:
                return form(*args, **{k: v for k, v in kwargs.items() if k != "out"})
        except CaptureError as error:
            raise CaptureError(f"{function_name(func)}(…): {error}") from error

    return rule


def _plus(input, product, beta, alpha):
    product = product if alpha == 1 else alpha * product
    return product if beta == 0 else (input if beta == 1 else beta * input) + product


def _added_product(input, left, right, *, beta=1, alpha=1):
    return _plus(input, left @ right, beta, alpha)


def _added_outer(input, vec1, vec2, *, beta=1, alpha=1):
    return _plus(input, vec1.unsqueeze(1) * vec2, beta, alpha)


def _contracted(a: Tensor, b: Tensor, first, second) -> Tensor:
    """Σ over dimensions ``first`` of a and ``second`` of b, in pairs."""
    left = [chr(ord("a") + d) for d in range(a.dim())]
    right = [chr(ord("A") + d) for d in range(b.dim())]
    for d, e in zip(first, second, strict=True):
        right[e] = left[d]
    kept = [c for c in left if c not in right] + [c for c in right if c not in left]
    return torch.einsum(f"{''.join(left)},{''.join(right)}->{''.join(kept)}", a, b).contiguous()  # as torch's own, of which views are taken


def _tensordot(a, b, dims=2):
    dims = dims.tolist() if isinstance(dims, Tensor) else dims
    if isinstance(dims, int):
        return _contracted(a, b, range(a.dim() - dims, a.dim()), range(dims))
    return _contracted(a, b, *([d] if isinstance(d, int) else d for d in dims))


def _inner(recorder, func, args, kwargs):
    return (_dots if all(x.dim() for x in tensors_in(args, kwargs)) else _scaled)(recorder, func, args, kwargs)


def _convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    if transposed:
        functions = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
        return functions[weight.dim() - 3](input, weight, bias, stride, padding, output_padding, groups, dilation)
    return (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3](input, weight, bias, stride, padding, dilation, groups)


_outer = made_of(lambda input, vec2: input.unsqueeze(1) * vec2)
_scaled = made_of(lambda input, other: input * other)
_dots = rounded(made_of(lambda input, other: _contracted(input, other, [-1], [-1])))
_added = rounded(made_of(_added_product))


def _addmm(recorder, func, args, kwargs):
    out = addmm(recorder, func, args, kwargs)
    return _added(recorder, func, args, kwargs) if out is NotImplemented else out


RULES = {
    torch.batch_norm: _batch_norm,
    torch.instance_norm: _instance_norm,
    torch.embedding: _embedding,
    torch.embedding_bag: _embedding_bag,
    torch.index_select: _index_select, Tensor.index_select: _index_select,
    **dict.fromkeys((torch.addmm, Tensor.addmm), rounded(_addmm)),
    **dict.fromkeys((torch.addmv, Tensor.addmv), not_cast_on_a_cpu(_added)),
    torch.baddbmm: _added, Tensor.baddbmm: _added,
    **dict.fromkeys((torch.addr, Tensor.addr), not_cast_on_a_cpu(rounded(made_of(_added_outer)))),
    **dict.fromkeys((torch.outer, Tensor.outer, torch.ger, Tensor.ger), _outer),
    **dict.fromkeys((torch.inner, Tensor.inner), _inner),
    torch.tensordot: rounded(made_of(_tensordot)),
    torch.chain_matmul: made_of(lambda *matrices: functools.reduce(torch.matmul, matrices)),
    torch.linalg.multi_dot: made_of(lambda tensors: functools.reduce(torch.matmul, tensors)),
    torch.linalg.vecdot: rounded(made_of(lambda x, y, *, dim=-1: (x * y).sum(dim))),
    torch.convolution: not_cast_on_a_cpu(made_of(_convolution)),
}  # fmt: skip
