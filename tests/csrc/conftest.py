"""Every C++ kernel against the reference in float64: its error is at most twice that of plain PyTorch in the same dtype."""

import pytest
import torch

from entangle_fast import dispatch

if dispatch.EXTENSION is not None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _poison(poisoned_memory):
    """Every output must be written in full."""


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float64], ids=str)
def dtype(request):
    return request.param


@pytest.fixture
def cpp():
    """The registered operations: on CPU tensors these are the C++ kernels."""
    return torch.ops.entangle_fast


@pytest.fixture
def assert_as_good():
    """assert_as_good(ours, plain, truth): error against float64 truth at most twice plain PyTorch's, 1e-12 in float64."""

    def check(ours, plain, truth):
        assert ours.shape == truth.shape
        if truth.numel() == 0:
            return
        scale = truth.double().norm().clamp(min=1e-300)
        error, allowed = ((x.double() - truth.double()).norm() / scale for x in (ours, plain))
        floor = 1e-12 if ours.dtype == torch.float64 else 1e-6  # on the smallest shapes plain error is luck
        assert error <= max(2 * allowed, floor), f"error {error:.2e}, plain PyTorch {allowed:.2e}"

    return check
