"""What accesses cost, counted on nvcc's PTX: see tests/cuda/test_nvcc_runs.py."""

import ctypes

import pytest
import torch
from bound import COMPILED, begin, control
from calls import MMA, gram, project_random

pytestmark = pytest.mark.skipif(not COMPILED, reason="of what nvcc made: run by tests/cuda/test_nvcc_runs.py")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kernel", ["gram_mma", "project_random"])
def test_banks_do_not_conflict_and_sectors_are_full(kernel, dtype):
    a, b = torch.randn(66, 40, 64).to(dtype), torch.randn(66, 40, 128).to(dtype)
    begin()
    gram(MMA, a, b) if kernel == "gram_mma" else project_random(a, b, 64, 1)
    control().cuda_host_counts.restype = ctypes.c_char_p
    lines = [line.split() for line in control().cuda_host_counts().decode().splitlines()]
    (counts,) = ([int(x) for x in line[1:]] for line in lines if kernel in line[0])
    _, _, sectors, asked, passes, taken = counts
    assert passes and taken <= 1.12 * passes, f"{taken / passes:.2f} passes over the banks for one"
    assert asked >= 0.9 * 32 * sectors, f"{asked / (32 * sectors):.2f} of the sectors' bytes are asked for"
