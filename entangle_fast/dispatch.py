"""Which backend serves a call, and why the others do not.

Order on the CPU: cpp, reference; the other way round where cpp was measured to be slower (_cpp_not_default). On CUDA and
HIP: triton, reference; before triton comes cuda where dispatch_table.json, which bench/dispatch_table.py makes from committed
measurements, says that it is faster. ENTANGLE_FAST_BACKEND names the backends that may be used, in order ("reference", "cpp",
"cuda,triton,reference", …); a named one that cannot serve a call is an error.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import reference

NAMESPACE = "entangle_fast"
ENV = "ENTANGLE_FAST_BACKEND"
_SCHEMA_FILE = "schema.inc"

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


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot serve the call."""


@dataclass
class Explanation:
    """What ``explain`` found: the operation, the backend that serves it, and a reason for each that does not."""

    op: str
    backend: str | None
    reasons: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend or 'no backend'}"]
        return "\n".join(lines + [f"  not {name}: {why}" for name, why in self.reasons.items()])


class _Explained(BaseException):
    """Carries an Explanation out of the call that would have run."""


_explaining = False


def ops() -> dict[str, str]:
    """Name → schema of every operation, read from csrc/schema.inc."""
    return {line.partition("(")[0]: line for line in _schemas()}


def _schemas() -> list[str]:
    text = next(
        (Path(p) / "csrc" / _SCHEMA_FILE for p in importlib.import_module(__package__).__path__
         if (Path(p) / "csrc" / _SCHEMA_FILE).exists()), None,
    )  # fmt: skip
    if text is None:
        raise ImportError(f"entangle_fast: {_SCHEMA_FILE} is not where it was installed; reinstall the package")
    found = re.findall(r'^EF_OP\("(.*)"\)$', text.read_text(), re.MULTILINE)
    return [line.replace('\\"', '"') for line in found]


_ROOMS = (
    "step_project", "step_adamw", "step_lookahead", "step", "gram", "sqnorm", "project_random", "project", "combine", "sample_loss", "w2",
)  # fmt: skip


def _kernel_module(op: str) -> str:
    """The file of an operation: its name without the variant (gram_conv → gram)."""
    return next(room for room in _ROOMS if room in op)


def _tensors(args) -> list[torch.Tensor]:
    flat = []
    for a in args:
        if isinstance(a, torch.Tensor):
            flat.append(a)
        elif isinstance(a, (list, tuple)):
            flat += _tensors(a)
    return flat


def _refuse_cpp(op: str, args) -> str | None:
    if EXTENSION is not None:
        return f"the compiled library is not loaded ({EXTENSION})"
    if op not in CPP:
        return "no C++ kernel for this operation"
    if op in UNBUILT:
        return "the compiled library is older than its kernel; build it again with `pip install --no-build-isolation -e .`"
    tensors = _tensors(args)
    if away := [x for x in tensors if not x.is_cpu]:
        return f"its kernels run on the CPU, a tensor is on {away[0].device}"
    if other := [d for d in {x.dtype for x in tensors} if d.is_floating_point and d not in CPP[op]]:
        return f"dtype {other[0]} is not one of {', '.join(map(str, CPP[op]))}"
    return None


def _cpp_not_default(op: str, args) -> str | None:
    """Where t×t products of float32 positions are so small that packing them costs more than torch's bmm; many directions."""
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
    for x in _tensors(args):
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
    tensors = _tensors(args)
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
    if away := [x for x in _tensors(args) if not x.is_cuda]:  # HIP devices are called "cuda" too
        return f"its kernels run on a GPU, a tensor is on {away[0].device}"
    try:
        module = importlib.import_module(f"{__package__}.kernels.{_kernel_module(op)}")
    except ModuleNotFoundError as error:
        return f"{error.name} is not there"
    if not hasattr(module, op):
        return "no Triton kernel for this operation"
    return module.refuse(op, *args)


_NOT_DEFAULT: dict[str, Callable] = {"cpp": _cpp_not_default, "cuda": _cuda_not_default}  # could serve, and was measured
_REFUSE: dict[str, Callable] = {
    "cpp": _refuse_cpp,
    "cuda": _refuse_cuda,
    "triton": _refuse_triton,
    "reference": lambda op, args: None,
}


def _choose(op: str, args) -> Explanation:
    named = [b.strip() for b in os.environ.get(ENV, "").split(",") if b.strip() not in ("", "auto")]
    if unknown := [b for b in named if b not in BACKENDS]:
        raise BackendError(f"{ENV}={os.environ[ENV]}: unknown backend {unknown[0]!r}; known: {', '.join(BACKENDS)}")
    found = Explanation(op, None)
    for name in named or BACKENDS:
        if found.backend is not None and not _explaining:
            break  # reasons are for those who ask
        why = _REFUSE[name](op, args)
        if not (why or named) and name in _NOT_DEFAULT:
            why = _NOT_DEFAULT[name](op, args)
        if why:
            found.reasons[name] = why
        elif found.backend is None:
            found.backend = name
        else:
            found.reasons[name] = f"{found.backend} comes first"
    for name in BACKENDS:
        if named and name not in named:
            found.reasons[name] = f"not named in {ENV}"
    return found


def call(op: str, *args):
    """Run operation ``op`` (schema arguments, positional) on the backend that serves it."""
    if torch.compiler.is_compiling():
        return registered(op)(*args)
    found = _choose(op, args)
    if _explaining:
        raise _Explained(found)
    if found.backend is None:
        raise BackendError(f"{ENV}={os.environ.get(ENV)}: nothing can serve this call\n{found}")
    # torch differentiates the reference itself, but would keep all the logits that linear_sample_loss makes a few at a time
    if found.backend == "reference" and op != "linear_sample_loss":
        return getattr(reference, op)(*args)
    return registered(op)(*args)


def registered(op: str):
    """The operation as torch knows it."""
    return getattr(torch.ops.entangle_fast, op)


def explain(fn: Callable, *args, **kwargs) -> Explanation:
    """Which backend would serve ``fn(*args, **kwargs)``, and why each other would not. Nothing is computed.

    fn: a function of entangle_fast.ops. Raises ValueError if the call is itself invalid.

    >>> import torch, entangle_fast as ef
    >>> found = ef.explain(ef.ops.gram, torch.randn(4, 3), torch.randn(4, 2))
    >>> found.backend in ("cpp", "reference") and "triton" in found.reasons  # print(found) says why
    True
    """
    global _explaining
    if not callable(fn):
        raise TypeError(f"fn: got {fn!r}; give a function of entangle_fast.ops, as in ef.explain(ef.ops.gram, a, b)")
    _explaining = True
    try:
        fn(*args, **kwargs)
    except _Explained as found:
        return found.args[0]
    finally:
        _explaining = False
    raise TypeError(f"fn: {getattr(fn, '__name__', fn)!r} dispatches nothing; give a function of entangle_fast.ops")


def table() -> dict[str, dict[str, tuple[bool, str]]]:
    """For doctor: op → backend → (there on this machine, reason)."""
    out = {}
    for op in ops():
        module = f"{__package__}.kernels.{_kernel_module(op)}"
        try:
            kernel = hasattr(importlib.import_module(module), op)
            why = "" if kernel else "no Triton kernel yet"
        except ModuleNotFoundError as error:
            kernel, why = False, "no Triton kernel yet" if error.name == module else f"{error.name} is not installed"
        if kernel and not torch.cuda.is_available():
            kernel, why = False, "no GPU"
        cpp, cuda = _refuse_cpp(op, ()), _refuse_cuda(op, ()) or (None if torch.cuda.is_available() else "no GPU")
        out[op] = {
            "cpp": (cpp is None, cpp or ""),
            "cuda": (cuda is None, cuda or ""),
            "triton": (kernel, why),
            "reference": (True, ""),
        }
    return out


def _serve_gpu(op: str):
    def run(*args):
        devices = sorted({str(x.device) for x in _tensors(args)})
        if len(devices) > 1:
            raise ValueError(f"{op}: tensors on {', '.join(devices)}; all must be on one device: move them with .to(...)")
        found = _choose(op, args)
        if found.backend is None:
            raise BackendError(f"{ENV}={os.environ.get(ENV)}: nothing can serve this call\n{found}")
        if found.backend == "cuda":
            return getattr(getattr(torch.ops, f"{NAMESPACE}_cuda"), op)(*args)
        if found.backend == "triton":
            module = importlib.import_module(f"{__package__}.kernels.{_kernel_module(op)}")
            return getattr(module, op)(*args)
        return getattr(reference, op)(*args)

    return run


def _register() -> list[torch.library.Library]:
    """Give every operation an implementation for each device that the C++ library did not bring."""
    library = torch.library.Library(NAMESPACE, "FRAGMENT" if EXTENSION is None else "DEF")
    for name, schema in ops().items():
        if not hasattr(getattr(torch.ops, NAMESPACE), name):
            library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CPU"):
            UNBUILT.add(name)
            library.impl(name, getattr(reference, name), "CPU")
        library.impl(name, _serve_gpu(name), "CUDA")
    return [library]


_LIBRARIES = _register()  # kept alive: dropping a Library unregisters it
