"""Tensors of awkward shapes, and how good is good enough."""

import torch

SIZES = [(3,), (5, 7), (129, 151), (9001,), (0,), (1,), (372, 4)]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def some(dtype, sizes=SIZES):
    return [torch.randn(*s).to(dtype) for s in sizes]


def misaligned(xs):
    """The same tensors, each one element away from where a 16-byte access may begin."""
    out = []
    for x in xs:
        room = torch.empty(x.numel() + 1, dtype=x.dtype)
        view = room[1:].view(x.shape)
        out.append(view.copy_(x))
    return out


def bits(tensors):
    return [x.contiguous().view(INTEGERS[x.element_size()]) for x in tensors]


def assert_as_good(ours, plain, truth):
    """Error against the float64 truth at most twice plain PyTorch's in the same dtype."""
    assert ours.shape == truth.shape
    if truth.numel():
        scale = truth.double().norm().clamp(min=1e-300)
        error, allowed = ((x.double() - truth.double()).norm() / scale for x in (ours, plain))
        floor = 1e-12 if ours.dtype == torch.float64 else 1e-6
        assert error <= max(2 * allowed, floor), f"error {error:.2e}, plain PyTorch {allowed:.2e}"
