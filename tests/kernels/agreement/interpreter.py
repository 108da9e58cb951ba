"""Mends two faults of Triton's interpreter (3.6 to 3.9) that no GPU has, both in bfloat16, and its slow calls."""

from types import SimpleNamespace

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter

_Handle, _Builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
_dot, _cast = _Builder.create_dot, _Builder.cast_impl


def _widen(data, dtype):
    """bfloat16 bits (uint16) as float32; anything else as it is."""
    if dtype == tl.bfloat16 and data.dtype == np.uint16:
        return (data.astype(np.uint32) << 16).view(np.float32)
    return data


def _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """The interpreter multiplies the raw bits."""
    if tl.bfloat16 in (a.dtype.scalar, b.dtype.scalar):
        product = np.matmul(_widen(a.data, a.dtype.scalar), _widen(b.data, b.dtype.scalar), dtype=np.float32)
        return _Handle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)
    return _dot(self, a, b, d, input_precision, max_num_imprecise_acc)


def _cast_impl(self, src, dst_type):
    """The interpreter truncates to bfloat16, and from float64 it converts to an integer."""
    to, of = dst_type.scalar, src.dtype.scalar
    if to == tl.bfloat16 and of in (tl.float16, tl.float32, tl.float64):
        rounded = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16).view(torch.int16)
        return _Handle(rounded.numpy().view(np.uint16).reshape(src.data.shape), to)
    if of == tl.bfloat16 and to in (tl.float16, tl.float32, tl.float64):
        return _Handle(_widen(src.data, of).astype(interpreter._get_np_dtype(dst_type)), to)
    return _cast(self, src, dst_type)


def mend() -> None:
    _Builder.create_dot, _Builder.cast_impl = _create_dot, _cast_impl
    # it takes triton.language over anew for each call of a function in a kernel, half of all its time; here once for good
    scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda fn: type(scope)()
    tl.tensor.__index__ = lambda self: int(self.handle.data.item())  # 3.6 converts an array of one element, as numpy no longer does
