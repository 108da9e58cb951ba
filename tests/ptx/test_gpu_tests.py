"""The GPU's own tests of the operations (tests/gpu/test_gpu_ops.py), of what Triton compiles, on the machine: minutes."""

import importlib

import gpu
import pytest
import torch
from plain import plain_precision

pytest.importorskip("triton")

from test_gpu_ops import compare, moved, test_convolutions, test_distances, test_linear, test_lookups, test_losses  # noqa: E402, F401

from entangle_fast import dispatch, reference  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(params=["sm_80", "sm_90"])
def check(request, poisoned_memory):
    def run(op, *args, eps=0.0):
        with plain_precision():
            plain = getattr(reference, op)(*args)
        want = getattr(reference, op)(*moved(args, "cpu", torch.float64))
        floor = max([eps, *(torch.finfo(x.dtype).eps / 16 for x in args if isinstance(x, torch.Tensor) and x.is_floating_point())])
        module = importlib.import_module(f"entangle_fast.kernels.{dispatch.kernel_module(op)}")
        assert module.refuse(op, *args) is None
        with gpu.running(request.param):
            got = getattr(module, op)(*args)
        with gpu.running(request.param, seed=2, eager=True):
            again = getattr(module, op)(*args)
        compare(f"{op} on {request.param}", got, again, plain, want, floor)

    return run
