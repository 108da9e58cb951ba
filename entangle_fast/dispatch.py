"""Which backend serves a call, and why the others do not.

Order on the CPU: cpp, reference; the other way round where cpp was measured to be slower (backends.py). On CUDA and
HIP: triton, reference; before triton comes cuda where dispatch_table.json, which bench/dispatch_table.py makes from committed
measurements, says that it is faster. ENTANGLE_FAST_BACKEND names the backends that may be used, in order ("reference", "cpp",
"cuda,triton,reference", …); a named one that cannot serve a call is an error. ENTANGLE_FAST_ISA lowers the instruction set of cpp.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import reference
from .backends import BACKENDS, EXTENSION, NAMESPACE, NOT_DEFAULT, REFUSE, UNBUILT, kernel_module, tensors_of, unknown_isa

ENV = "ENTANGLE_FAST_BACKEND"
_SCHEMA_FILE = "schema.inc"


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


_explaining: ContextVar[bool] = ContextVar("explaining", default=False)  # of this thread


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


def _choose(op: str, args) -> Explanation:
    named = [b.strip() for b in os.environ.get(ENV, "").split(",") if b.strip() not in ("", "auto")]
    if unknown := [b for b in named if b not in BACKENDS]:
        raise BackendError(f"{ENV}={os.environ[ENV]}: unknown backend {unknown[0]!r}; known: {', '.join(BACKENDS)}")
    if isa := unknown_isa():
        raise BackendError(isa)
    found = Explanation(op, None)
    for name in named or BACKENDS:
        if found.backend is not None and not _explaining.get():
            break  # reasons are for those who ask
        why = REFUSE[name](op, args)
        if not (why or named) and name in NOT_DEFAULT:
            why = NOT_DEFAULT[name](op, args)
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
    if _explaining.get():
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

    fn: a function of entangle_fast.ops; any other is refused (TypeError), uncalled. Raises ValueError if the call is itself invalid.

    >>> import torch, entangle_fast as ef
    >>> found = ef.explain(ef.ops.gram, torch.randn(4, 3), torch.randn(4, 2))
    >>> found.backend in ("cpp", "reference") and "triton" in found.reasons  # print(found) says why
    True
    """
    if not callable(fn):
        raise TypeError(f"fn: got {fn!r}; give a function of entangle_fast.ops, as in ef.explain(ef.ops.gram, a, b)")
    name, room = getattr(fn, "__name__", repr(fn)), getattr(fn, "__module__", None) or ""
    if not room.startswith(f"{__package__}.ops.") or name not in ops():
        raise TypeError(f"fn: {name!r} is no function of entangle_fast.ops; give one, as in ef.explain(ef.ops.gram, a, b)")
    asked = _explaining.set(True)
    try:
        fn(*args, **kwargs)
    except _Explained as found:
        return found.args[0]
    finally:
        _explaining.reset(asked)
    raise AssertionError(f"{name} came to no choice of a backend")


def table() -> dict[str, dict[str, tuple[bool, str]]]:
    """For doctor: op → backend → (there on this machine, reason)."""
    out = {}
    for op in ops():
        module = f"{__package__}.kernels.{kernel_module(op)}"
        try:
            kernel = hasattr(importlib.import_module(module), op)
            why = "" if kernel else "no Triton kernel yet"
        except ModuleNotFoundError as error:
            kernel, why = False, "no Triton kernel yet" if error.name == module else f"{error.name} is not installed"
        if kernel and not torch.cuda.is_available():
            kernel, why = False, "no GPU"
        cpp, cuda = REFUSE["cpp"](op, ()), REFUSE["cuda"](op, ()) or (None if torch.cuda.is_available() else "no GPU")
        out[op] = {
            "cpp": (cpp is None, cpp or ""),
            "cuda": (cuda is None, cuda or ""),
            "triton": (kernel, why),
            "reference": (True, ""),
        }
    return out


def _serve_gpu(op: str):
    def run(*args):
        devices = sorted({str(x.device) for x in tensors_of(args)})
        if len(devices) > 1:
            raise ValueError(f"{op}: tensors on {', '.join(devices)}; all must be on one device: move them with .to(...)")
        found = _choose(op, args)
        if found.backend is None:
            raise BackendError(f"{ENV}={os.environ.get(ENV)}: nothing can serve this call\n{found}")
        if found.backend == "cuda":
            return getattr(getattr(torch.ops, f"{NAMESPACE}_cuda"), op)(*args)
        if found.backend == "triton":
            module = importlib.import_module(f"{__package__}.kernels.{kernel_module(op)}")
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
