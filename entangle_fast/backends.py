"""What each backend can serve, and where one that could is not the default because it was measured to be slower.

A refusal is a function (op, its schema arguments) → a reason, or None.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

NAMESPACE = "entangle_fast"
ISA, ISAS = "ENTANGLE_FAST_ISA", ("plain", "avx2", "avx512")  # csrc/cpu/isa.cpp reads it, once

try:
    from . import _C  # noqa: F401  loading it registers the schemas and the C++ kernels

    EXTENSION = None  # why the compiled library is missing; None when it is there
except ImportError as error:
    EXTENSION = f"{error}; build it with `pip install --no-build-isolation -e .` where a C++ compiler is"
UNBUILT: set[str] = set()  # operations without a C++ kernel in it: all where it is missing, new ones where it is an older build

_FLOATS = (torch.float32, torch.float64, torch.bfloat16)
# what the C++ kernels take on the CPU; an op that is not here has no C++ kernel
CPP: dict[str, tuple[torch.dtype, ...]] = {
    "gram": _FLOATS,
    "gram_layers": _FLOATS,
    "gram_conv": _FLOATS,
    "gram_embedding": _FLOATS,
    "sqnorm": _FLOATS,
    "sqnorm_conv": _FLOATS,
    "sqnorm_embedding": _FLOATS,
    "project": _FLOATS,
    "project_conv": _FLOATS,
    "project_embedding": _FLOATS,
    "project_random": _FLOATS,
    "project_random_conv": _FLOATS,
    "project_random_embedding": _FLOATS,
    "step_gram": _FLOATS,
    "step_project": _FLOATS,
    "step_update": _FLOATS,
    "step_adamw": _FLOATS,
    "step_lookahead": _FLOATS,
    "step_lookahead_undo": _FLOATS,
    "sample_loss": _FLOATS,
    "sample_loss_backward": _FLOATS,
    "w2_sorted": _FLOATS,
    "w2_moments": _FLOATS,
}
_LOW = (torch.float32, torch.bfloat16, torch.float16)
# what the CUDA C++ kernels take (csrc/cuda, library entangle_fast_cuda); an op that is not here has none
CUDA: dict[str, tuple[torch.dtype, ...]] = {
    "gram": _LOW,
    "project_random": _LOW,
    "step_gram": (*_LOW, torch.float64),
    "step_project": (*_LOW, torch.float64),
    "step_update": (*_LOW, torch.float64),
    "step_adamw": (*_LOW, torch.float64),
    "step_lookahead": (*_LOW, torch.float64),
    "step_lookahead_undo": (*_LOW, torch.float64),
    "w2_sorted": _LOW,
    "sample_loss": (*_LOW, torch.float64),
    "sample_loss_backward": (*_LOW, torch.float64),
}
BACKENDS = ("cpp", "cuda", "triton", "reference")
_DEFAULTS = Path(__file__).with_name("dispatch_table.json")
_ROOMS = (
    "step_project", "step_adamw", "step_lookahead", "step", "gram", "sqnorm", "project_random", "project", "combine", "sample_loss", "w2",
)  # fmt: skip


def kernel_module(op: str) -> str:
    """The file of an operation: its name without the variant (gram_conv → gram)."""
    return next(room for room in _ROOMS if room in op)


def tensors_of(args) -> list[torch.Tensor]:
    flat = []
    for a in args:
        if isinstance(a, torch.Tensor):
            flat.append(a)
        elif isinstance(a, (list, tuple)):
            flat += tensors_of(a)
    return flat


def unknown_isa() -> str:
    """What is wrong with ENTANGLE_FAST_ISA; "" if nothing is."""
    wish = os.environ.get(ISA, "")
    return "" if wish in ("", *ISAS) else f"{ISA}={wish}: unknown instruction set {wish!r}; known: {', '.join(ISAS)}"


def _refuse_cpp(op: str, args) -> str | None:
    if EXTENSION is not None:
        return f"the compiled library is not loaded ({EXTENSION})"
    if op not in CPP:
        return "no C++ kernel for this operation"
    if op in UNBUILT:
        return "the compiled library is older than its kernel; build it again with `pip install --no-build-isolation -e .`"
    tensors = tensors_of(args)
    if away := [x for x in tensors if not x.is_cpu]:
        return f"its kernels run on the CPU, a tensor is on {away[0].device}"
    if other := [d for d in {x.dtype for x in tensors} if d.is_floating_point and d not in CPP[op]]:
        return f"dtype {other[0]} is not one of {', '.join(map(str, CPP[op]))}"
    return None


def _cpp_not_default(op: str, args) -> str | None:
    """Why the C++ kernel, which could serve the call, was measured to be slower for it."""
    if op == "step_project" and (k := len(args[0]) // max(1, len(args[2]))) > 64:
        return f"{k} directions: its Jacobi took 23 times LAPACK's time for 128 (36 ms, one thread, AMD EPYC Zen 4)"
    if op == "project_conv":
        basis, groups = args[2], args[-1]
        k, rows = len(basis), max(1, basis.shape[1] // groups)
        if k == 1 or k * min(rows, 32) <= 8:  # a register tile holds 32 rows of one group
            return (f"{k} direction{'s' * (k > 1)}, {rows} channels a group: torch's convolution with the directions took 0.15 to 1.7 of "
                    "its time for one, 0.5 for four of a depthwise one (one thread, AMD EPYC Zen 4)")  # fmt: skip
    if op != "sqnorm":
        return None
    a, b = args
    t, wide, area = a.shape[-2] if a.dim() == 3 else 1, a.shape[-1] + b.shape[-1], a.shape[-1] * b.shape[-1]
    if a.dtype == torch.float32 and 1 < t <= 16 and t * wide <= area:
        return f"float32 with {t} positions: torch's bmm took 0.77 of its time (n 256, t 16, 512 to 512, AMD EPYC Zen 4)"
    return None


def _refuse_cuda(op: str, args) -> str | None:
    if op not in CUDA:
        return "no CUDA C++ kernel for this operation"
    if EXTENSION is not None:
        return f"the compiled library is not loaded ({EXTENSION})"
    if not hasattr(getattr(torch.ops, f"{NAMESPACE}_cuda"), op):  # a library built without them does not know the name
        return "built without CUDA: no nvcc then, or ENTANGLE_FAST_CUDA=0"
    for x in tensors_of(args):
        if not x.is_cuda:
            return f"its kernels run on a GPU, a tensor is on {x.device}"
        if x.dtype not in CUDA[op] and x.dtype.is_floating_point and not (op == "step_lookahead_undo" and x.dtype == torch.float64):
            return f"dtype {x.dtype} is not one of {', '.join(map(str, CUDA[op]))}"
    if torch.version.hip is not None:
        return "its kernels are for NVIDIA GPUs"
    if op == "gram" and args and args[-1] != "tiles":
        return f'its kernel takes the route "tiles", not "{args[-1]}"'
    if op == "step_project" and args and (k := len(args[0]) // max(1, len(args[2]))) > 32:
        return f"{k} directions; its solve takes up to 32"
    return None


@functools.cache
def _measured() -> list[dict]:
    """Rows {op, device, dtype, least, most, speedup}: elements from least to most, where cuda was faster than triton."""
    return json.loads(_DEFAULTS.read_text())


def _cuda_not_default(op: str, args) -> str | None:
    """Why the CUDA C++ kernel, which could serve the call, is not the default for it."""
    tensors = tensors_of(args)
    rows = [r for r in _measured() if r["op"] == op]
    if not rows:
        return "compiled; not the default: never measured on a GPU"
    x, elements = tensors[0], sum(t.numel() for t in tensors)
    device = torch.cuda.get_device_name(x.device)
    for r in rows:
        if r["device"] == device and r["dtype"] == str(x.dtype) and r["least"] <= elements <= r["most"]:
            return None
    return f"compiled; not the default: no measurement on {device} says that it is faster for {elements} elements of {x.dtype}"


def _refuse_triton(op: str, args) -> str | None:
    if away := [x for x in tensors_of(args) if not x.is_cuda]:  # HIP devices are called "cuda" too
        return f"its kernels run on a GPU, a tensor is on {away[0].device}"
    try:
        module = importlib.import_module(f"{__package__}.kernels.{kernel_module(op)}")
    except ModuleNotFoundError as error:
        return f"{error.name} is not there"
    if not hasattr(module, op):
        return "no Triton kernel for this operation"
    return module.refuse(op, *args)


NOT_DEFAULT: dict[str, Callable] = {"cpp": _cpp_not_default, "cuda": _cuda_not_default}  # could serve, and was measured
REFUSE: dict[str, Callable] = {
    "cpp": _refuse_cpp,
    "cuda": _refuse_cuda,
    "triton": _refuse_triton,
    "reference": lambda op, args: None,
}
