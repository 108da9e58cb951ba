"""The checks that operations share. Each error names the argument, what it got, what it needs and the mend."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def same_device(**tensors: Tensor | None) -> None:
    there = {name: x.device for name, x in tensors.items() if x is not None}
    if len(set(there.values())) > 1:
        got = ", ".join(f"{name} on {device}" for name, device in there.items())
        raise ValueError(f"{next(iter(there))}: {got}; all must be on one device: move them with .to(...)")


def same_dtype(**tensors: Tensor | None) -> None:
    there = {name: x.dtype for name, x in tensors.items() if x is not None}
    if len(set(there.values())) > 1:
        got = ", ".join(f"{name} {dtype}" for name, dtype in there.items())
        raise ValueError(f"{next(iter(there))}: {got}; all must have one dtype: convert with .to(dtype)")


def floating(**tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and not x.is_floating_point():
            raise ValueError(f"{name}: dtype {x.dtype} is not a real floating-point one; convert with .float()")


def real(**tensors: Tensor | None) -> None:
    """Integers and booleans too: what is converted without a loss."""
    for name, x in tensors.items():
        if x is not None and x.is_complex():
            raise ValueError(f"{name}: dtype {x.dtype} is complex; needs a real one: take .real")


def per_sample(**losses: Tensor) -> None:
    """(n,), n >= 1, of a real floating-point dtype."""
    for name, x in losses.items():
        if x.dim() != 1 or not len(x):
            raise ValueError(f"{name}: shape {tuple(x.shape)}; needs per-sample losses (n,), n >= 1")
    floating(**losses)


def whole(x) -> bool:
    """Is it a whole number? True and False are none."""
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)


def ridge(value: float) -> None:
    require(0 <= value < math.inf, f"ridge: got {value}; needs a finite number >= 0")


def factors(a: Tensor, b: Tensor, names: str = "a b") -> None:
    """Layer factors a (n,d_in) or (n,t,d_in), b (n,d_out) or (n,t,d_out)."""
    x, y = names.split()
    if a.dim() not in (2, 3) or a.dim() != b.dim():  # not by require: each layer's call would write both messages
        raise ValueError(
            f"{x}, {y}: got shapes {tuple(a.shape)} and {tuple(b.shape)}; need (n,d_in) with (n,d_out), or (n,t,d_in) with (n,t,d_out)"
        )
    if a.shape[:-1] != b.shape[:-1]:
        raise ValueError(
            f"{y}: shape {tuple(b.shape)} does not go with {x} {tuple(a.shape)}: both need the same n{' and t' if a.dim() == 3 else ''}"
        )
    same_device(**{x: a, y: b})
    same_dtype(**{x: a, y: b})
    floating(**{x: a})


def both_or_none(**pair: Tensor | None) -> None:
    if len({x is None for x in pair.values()}) > 1:
        raise ValueError(f"{' and '.join(pair)}: give both (a cross-Gram), or none (the symmetric Gram)")


def conv_arguments(x: Tensor, g: Tensor, kernel_size, stride, padding, dilation, groups: int):
    """Broadcast integers to one per spatial dimension and check them against the shapes."""
    require(x.dim() in (3, 4, 5) and g.dim() == x.dim(),
            f"x, g: got shapes {tuple(x.shape)} and {tuple(g.shape)}; need (n, channels, *size) with 1 to 3 sizes")  # fmt: skip
    same_device(x=x, g=g)
    same_dtype(x=x, g=g)
    floating(x=x)
    nd = x.dim() - 2
    spread = []
    for name, value in (("kernel_size", kernel_size), ("stride", stride), ("padding", padding), ("dilation", dilation)):
        if isinstance(value, str):
            same = " of dilation·(kernel_size − 1)/2 for 'same', 0 for 'valid'" if name == "padding" else ""
            raise TypeError(f"{name}: got {value!r}, which is no {name} here; needs {nd} integers{same}")
        value = list(value) if isinstance(value, (tuple, list)) else [value] * nd
        require(len(value) == nd and all(map(whole, value)), f"{name}: got {value}; needs {nd} integers for an input of {nd} sizes")
        least = 0 if name == "padding" else 1
        require(min(value) >= least, f"{name}: got {value}; needs integers >= {least}")
        spread.append(value)
    require(x.shape[0] == g.shape[0], f"g: {g.shape[0]} samples against {x.shape[0]} in x; both need the same n")
    require(groups >= 1 and x.shape[1] % groups == 0 and g.shape[1] % groups == 0,
            f"groups: {groups} does not divide the channels {x.shape[1]} and {g.shape[1]}")  # fmt: skip
    for d in range(nd):
        kernel, step, pad, dil = (s[d] for s in spread)
        out = (x.shape[2 + d] + 2 * pad - dil * (kernel - 1) - 1) // step + 1
        require(out == g.shape[2 + d],
                f"g: size {g.shape[2 + d]} in dimension {2 + d}; a convolution with these arguments gives {out}")  # fmt: skip
    return spread


def lookup(ids: Tensor, b: Tensor, names: str = "ids b") -> None:
    """ids (n,t) integers, b (n,t,d)."""
    i, y = names.split()
    integers = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    require(integers and ids.dim() == 2 and b.dim() == 3 and ids.shape == b.shape[:2],
            f"{i}, {y}: got {tuple(ids.shape)} {ids.dtype} and {tuple(b.shape)}; need integers (n,t) and (n,t,d)")  # fmt: skip
    same_device(**{i: ids, y: b})
    floating(**{y: b})


def like(params: Sequence[Tensor], name: str, tensors: Sequence[Tensor]) -> None:
    """tensors has one of the same shape on the same device for each of params, all of real floating-point dtypes."""
    if len(tensors) != len(params):
        raise ValueError(f"{name}: {len(tensors)} tensors for {len(params)} parameters; needs one for each")
    if [p.shape for p in params] == [x.shape for x in tensors] and [p.device for p in params] == [x.device for x in tensors]:
        if all(dtype.is_floating_point for dtype in {x.dtype for xs in (params, tensors) for x in xs}):
            return
    for i, (p, x) in enumerate(zip(params, tensors)):  # which one it is
        tensor(f"{name}[{i}]", x)
        if p.shape != x.shape or p.device != x.device:
            raise ValueError(f"{name}[{i}]: {tuple(x.shape)} on {x.device}; needs {tuple(p.shape)} on {p.device}")
        if not (x.dtype.is_floating_point and p.dtype.is_floating_point):
            raise ValueError(f"{name}[{i}]: {x.dtype} for a tensor of {p.dtype}; both need a real floating-point dtype")


def betas(pair: tuple[float, float]) -> None:
    """AdamW's two shares of the old moments."""
    several = isinstance(pair, (tuple, list)) and len(pair) == 2
    if not (several and all(isinstance(b, numbers.Real) and 0 <= b < 1 for b in pair)):
        raise ValueError(f"betas: got {pair}; needs two numbers in [0, 1)")


def in_table(ids: Tensor, rows: int) -> None:
    """Every id names a row. Looked at where that costs no synchronisation; elsewhere the kernels' own bounds hold."""
    if type(ids) is not Tensor or ids.device.type != "cpu" or torch.compiler.is_compiling() or not ids.numel():
        return
    low, high = (int(x) for x in ids.aminmax())
    require(0 <= low and high < rows, f"ids: got {low if low < 0 else high}; needs row numbers in [0, {rows})")


def padding(row: int | None) -> int:
    """padding_idx as the operations take it: -1 for none."""
    require(row is None or row >= 0, f"padding_idx: got {row}; needs a row number >= 0, not counted from the end: add num_embeddings")
    return -1 if row is None else row


def losses_mend(got) -> str:
    """How what is no tensor becomes per-sample losses."""
    if isinstance(got, (int, float)):
        return "use reduction='none', and no .item()"
    if hasattr(got, "__array__"):
        return "compute them with torch"
    return "return them" if got is None else "torch.stack them, if they are one for each sample"


def logits_mend(output) -> str:
    """How what is no logits of two classes or more becomes them."""
    if isinstance(output, Tensor) and (output.dim() == 1 or output.dim() == 2 and output.shape[1] == 1):
        both = f"torch.{'stack' if output.dim() == 1 else 'cat'}([torch.zeros_like(z), z], 1)"
        return f"wrap it in a module that returns {both} of its one logit z, whose cross-entropy is the binary one"
    return "wrap it in a module that returns them"


def choice(name: str, value: str, known: tuple[str, ...]) -> None:
    require(value in known, f"{name}: got {value!r}; needs one of {', '.join(map(repr, known))}")


def directions(k: int, seed: int, kind: str, offset: int = 0) -> None:
    """Random directions."""
    require(k >= 0, f"k: got {k}; needs a number of directions >= 0")
    for name, x in (("seed", seed), ("offset", offset)):  # 2**63 itself: no tensor compares with it
        require(-(2**63) <= x <= 2**63 - 1, f"{name}: got {x}; needs an integer of 64 bits, in [-2**63, 2**63)")
    choice("kind", kind, ("sign", "gaussian"))


# ---- kinds ----


def kinds(function: Callable) -> Callable:
    """Where ``function`` fails on an argument that is not what its annotation says, raise TypeError naming that argument, what it
    got, what it needs and the mend.

    Looked at after a failure only, so that a call that works pays nothing for it; but a boolean is no number, and would serve as one:
    it is refused before. Annotations that no row of _KINDS knows pass, and so does what the caller's own code raised: a model, a loss,
    a check. Of a class its __init__.
    """
    if isinstance(function, type):
        function.__init__ = kinds(function.__init__)
        return function

    @functools.wraps(function)
    def checked(*args, **kwargs):
        if bool in map(type, args) or bool in map(type, kwargs.values()):
            _refuse_booleans(function, args, kwargs)
        try:
            return function(*args, **kwargs)
        except _OF_KIND as error:
            name, wrong = _wrong_argument(function, args, kwargs, error)
            named = isinstance(error, (TypeError, ValueError)) and str(error).startswith(name)
            if not wrong or named or _of_others(error.__traceback__.tb_next):
                raise
            raise TypeError(wrong) from error

    return checked


_OF_KIND = (TypeError, AttributeError, LookupError, ValueError, RuntimeError)  # what a wrong kind brings about
_OURS, _TORCH, _STDLIB = str(Path(__file__).parents[1]), str(Path(torch.__file__).parent), sysconfig.get_path("stdlib")


def _of_others(frame) -> bool:
    """Whether an error passed through code that is neither ours nor torch's nor Python's."""
    while frame is not None:
        file = frame.tb_frame.f_code.co_filename
        if not file.startswith((_OURS, _TORCH, "<")) and not (file.startswith(_STDLIB) and "site-packages" not in file):
            return True
        frame = frame.tb_next
    return False


def _known(function: Callable, args: tuple, kwargs: dict) -> Iterator[tuple[str, object, list[str]]]:
    """Each argument whose kinds are known: its name, its value, and what is wrong with it as each of the kinds, "" if nothing is."""
    try:
        given = inspect.signature(function).bind(*args, **kwargs).arguments
    except TypeError:  # an argument is missing or unknown: Python says so
        return
    for name, value in given.items():
        wanted = str(function.__annotations__.get(name, "")).split(" | ")
        if all(kind in _KINDS for kind in wanted):
            yield name, value, [_KINDS[kind](name, value) for kind in wanted]


def _refuse_booleans(function: Callable, args: tuple, kwargs: dict) -> None:
    for _, value, wrong in _known(function, args, kwargs):
        if isinstance(value, bool) and all(wrong):
            raise TypeError(wrong[0])


def _wrong_argument(function: Callable, args: tuple, kwargs: dict, error: Exception) -> tuple[str, str]:
    """The first argument of a wrong kind, and what is wrong with it."""
    for name, value, wrong in _known(function, args, kwargs):
        if all(wrong):
            return name, wrong[0]
        if isinstance(error, TypeError) and (once := _iterator(name, value, str(error))):
            return name, once
    return "", ""


def _iterator(name: str, x, error: str) -> str:
    """An argument, or an entry of it, that Python's error names since it is no list: it can be looked at once only."""
    if isinstance(x, (list, tuple)):
        return next(filter(None, (_iterator(f"{name}[{i}]", y, error) for i, y in enumerate(x))), "")
    named = f"'{type(x).__name__}'" in error or f"got {_got(x)};" in error  # by Python, or by a function that this one called
    once = named and isinstance(x, Iterable) and not isinstance(x, (Tensor, str, dict))
    return f"{name}: got {_got(x)}; needs a list: list(...)" if once else ""


def _kind(types: type | tuple[type, ...], needs: str) -> Callable:
    return lambda name, x: "" if isinstance(x, types) and not isinstance(x, bool) else f"{name}: got {_got(x)}; needs {needs}"


def _got(x) -> str:
    return repr(x) if x is None or isinstance(x, bool) else f"{type(x).__module__}.{type(x).__qualname__}".removeprefix("builtins.")


def _tensor(name: str, x) -> str:
    if isinstance(x, Tensor):
        return ""
    mend = "give one" if x is None else "torch.from_numpy(...)" if hasattr(x, "__array__") else "torch.stack or torch.tensor(...)"
    return f"{name}: got {_got(x)}; needs a torch.Tensor: {mend}"


def _several(item: Callable, needs: str, exactly: int | None = None) -> Callable:
    def find(name: str, xs) -> str:
        listed = isinstance(xs, (list, tuple))
        if not listed and (exactly or isinstance(xs, (str, dict)) or hasattr(xs, "__array__") or not isinstance(xs, Iterable)):
            return f"{name}: got {_got(xs)}; needs {needs}"
        if not listed:
            return ""  # an iterator is used up by now
        if exactly and len(xs) != exactly:
            return f"{name}: got {len(xs)} values; needs {needs}"
        return next(filter(None, (item(f"{name}[{i}]", x) for i, x in enumerate(xs))), "")

    return find


def tensor(name: str, x) -> None:
    """Raise TypeError unless x is a tensor."""
    if wrong := _tensor(name, x):
        raise TypeError(wrong)


def samples(name: str, x) -> None:
    """Raise TypeError unless x is a tensor, ValueError unless it holds samples (n, ...), n >= 1."""
    tensor(name, x)
    require(x.dim() > 0, f"{name}: got a 0-d tensor; needs samples (n, ...)")
    require(len(x) > 0, f"{name}: got 0 samples, needs at least one")


_tensors = _several(_tensor, "a list of tensors")
_pair = _several(_tensor, "a pair of tensors", 2)
_number = _kind((numbers.Real, Tensor), "a number")
_whole = _kind((numbers.Integral, Tensor), "a whole number")
_KINDS: dict[str, Callable] = {
    "Tensor": _tensor,
    "torch.Tensor": _tensor,
    "Tensors": _tensors,
    "Sequence[Tensors]": _several(_tensors, "a list of lists of tensors"),
    "Sequence[Sequence[Tensor]]": _several(_tensors, "a list of lists of tensors"),
    "tuple[Tensor, Tensor]": _pair,
    "Layers": _several(_pair, "a list of pairs (a, b) of tensors"),
    "float": _number,
    "int": _whole,
    "Sequence[int]": _several(_whole, "a list of whole numbers"),
    "tuple[float, float]": _several(_number, "two numbers", 2),
    "str": _kind(str, "a string"),
    "torch.Generator": _kind(torch.Generator, "a torch.Generator, as torch.Generator().manual_seed(0) is"),
    "Callable": lambda name, x: "" if callable(x) else f"{name}: got {_got(x)}; needs a function",
    "nn.Module": _kind(nn.Module, "a torch.nn.Module"),
    "None": lambda name, x: "" if x is None else f"{name}: got {_got(x)}; needs None",
}
