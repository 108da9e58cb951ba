"""The CUDA sources run by g++: skipped, visibly, where there is none."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))  # rule.py


@pytest.fixture(autouse=True, scope="session")
def _compiler():
    if shutil.which("g++") is None:
        pytest.skip("g++ not found: the CUDA sources cannot run on this CPU")


@pytest.fixture
def cuda(_compiler, poisoned_memory):
    """torch.ops.entangle_fast_cuda_host: the bindings and kernels of csrc/cuda on CPU tensors; outputs start as NaN."""
    import bound

    bound.begin(seed=int(torch.randint(1, 1 << 20, ())))
    return bound.ops()


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def dtype(request):
    return request.param
