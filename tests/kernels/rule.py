"""The error rule: at most twice the error that plain PyTorch makes in the same dtype, both against float64."""

import torch
from plain import plain_precision
from torch import Tensor
from torch.utils._pytree import tree_leaves

from entangle_fast import reference

FLOOR = 4  # roundings of the output's own dtype that are always allowed: plain PyTorch may be exact by luck


def exact(x):
    """Floats as float64, through lists."""
    if isinstance(x, (list, tuple)):
        return [exact(y) for y in x]
    return x.to(torch.float64, copy=True) if isinstance(x, Tensor) and x.is_floating_point() else x


def error(x: Tensor, want: Tensor, plain: bool = False) -> float:
    if not want.numel():
        return 0.0
    finite = torch.isfinite(want)
    if plain and not torch.equal(torch.isfinite(x), finite):
        return float("inf")  # plain PyTorch overflows in this dtype
    assert torch.equal(torch.isfinite(x), finite), "not finite where the exact result is, or the other way round"
    return float(torch.where(finite, x.double() - want, 0).abs().max())


def agree(got, plain, want, what: str = "", eps: float = 0.0) -> None:
    """got, plain: outputs or lists of them; want: the same from float64; eps: of the dtype that limits them, if wider."""
    many = isinstance(want, (list, tuple))
    for part, (x, y, z) in enumerate(zip(got, plain, want) if many else [(got, plain, want)]):
        assert x.shape == z.shape, f"{what}[{part}]: shape {tuple(x.shape)}, needs {tuple(z.shape)}"
        if not x.is_floating_point():
            assert torch.equal(x, z), f"{what}[{part}]: {x} where {z} is exact"
            continue
        size = float(torch.where(torch.isfinite(z), z, 0).abs().max()) if z.numel() else 0.0
        allowed = 2 * error(y.to(x.dtype), z, plain=True) + FLOOR * max(eps, torch.finfo(x.dtype).eps) * size
        assert error(x, z) <= allowed, f"{what}[{part}]: error {error(x, z):.2e}, allowed {allowed:.2e}, size {size:.2e}"


def check(module, op: str, *args) -> None:
    """kernels.<module>.<op> on ``args`` obeys the rule, in what it returns and in what a step writes, and has the reference's dtypes."""
    assert module.refuse(op, *args) is None
    steps = op.startswith("step_")

    def outcome(f, turn):
        held = turn(args)
        out = f(*held)
        return [x for x in tree_leaves([out, held if steps else None]) if isinstance(x, Tensor)]

    got, ordinary = outcome(getattr(module, op), copies), outcome(getattr(reference, op), copies)
    with plain_precision():
        plain = outcome(getattr(reference, op), copies)
    for x, y in zip(got, ordinary):
        assert x.dtype == y.dtype
    given = [x for x in tree_leaves(args) if isinstance(x, Tensor) and x.is_floating_point()]
    # where plain PyTorch is right by luck, on outputs of few elements: a sixteenth of its input's rounding, four times;
    # a step has its own dtypes throughout, but for its noise
    eps = max(torch.finfo(x.dtype).eps for x in given) / 16 if not steps else torch.finfo(torch.float32).eps
    agree(got, plain, outcome(getattr(reference, op), exact), op, eps)


def copies(x):
    """Tensors copied, through lists."""
    if isinstance(x, (list, tuple)):
        return [copies(y) for y in x]
    return x.clone() if isinstance(x, Tensor) else x
