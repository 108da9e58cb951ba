"""What every kernel's wrapper needs: device guard, accumulation dtype, split counts, refusals."""

import contextlib
import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

LOW = (torch.bfloat16, torch.float16, torch.float32)  # what the matrix kernels take; float64 has no tensor-core path
FLOATS = (*LOW, torch.float64)
TL = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32, torch.float64: tl.float64}


def tensors(args) -> list[Tensor]:
    flat = []
    for a in args:
        flat += [a] if isinstance(a, Tensor) else tensors(a) if isinstance(a, (list, tuple)) else []
    return flat


def on_device(fn):
    """Run ``fn`` with its first tensor's device current: Triton launches on the current device's stream."""

    @functools.wraps(fn)
    def run(*args, **kwargs):
        first = next(iter(tensors(args)), None)
        there = first is not None and first.device.type == "cuda"
        with torch.cuda.device(first.device) if there else contextlib.nullcontext():
            return fn(*args, **kwargs)

    return run


def accumulate_dtype(*xs: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in xs) else torch.float32


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(x: int, low: int = 1, high: int = 1 << 30) -> int:
    """The smallest power of two ≥ x, kept within [low, high]."""
    return min(max(triton.next_power_of_2(max(x, 1)), low), high)


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors(x: Tensor) -> int:
    """Multiprocessors (compute units) of the device of ``x``; few for the interpreter, which pays by program."""
    return _multiprocessors(x.device.index) if x.device.type == "cuda" else 2


def splits(programs: int, work: int, x: Tensor) -> int:
    """How many ways to split ``work`` pieces so that ``programs`` output tiles fill the device twice over."""
    return max(1, min(work, cdiv(2 * processors(x), max(programs, 1))))


def precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: float32 follows torch.set_float32_matmul_precision, as plain PyTorch does."""
    exact = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def refuse_factors(*xs, dtypes=LOW) -> str | None:
    """The common reasons against a call: an unserved dtype, mixed dtypes, tensors on two devices."""
    there = [x for x in xs if x is not None]
    floats = [x for x in there if x.is_floating_point()]
    if len({x.device for x in there}) > 1:
        return f"tensors are on {', '.join(sorted({str(x.device) for x in there}))}; all must be on one device"
    for x in floats:
        if x.dtype not in dtypes:
            return f"dtype {x.dtype} is not one of {', '.join(map(str, dtypes))}"
    if len({x.dtype for x in floats}) > 1:
        return f"factors of two dtypes: {', '.join(sorted({str(x.dtype) for x in floats}))}"
    return None


def vector(*counts: int) -> int:
    """Elements that are surely together and aligned when every count is a multiple of them: 1 to 16."""
    return math.gcd(16, *counts)
