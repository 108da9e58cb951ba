"""What is compiled for a GPU, run: the PTX of every workload in the machine of tests/ptx, against the reference."""

import os

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="kernels were imported to be interpreted; nothing can be compiled"
)

import gpu  # noqa: E402
import workloads  # noqa: E402
from looking import check_every_capacity  # noqa: E402
from rule import check  # noqa: E402

QUICK = ("bf16", "sm_90")


def cases():
    for workload in workloads.NAMES:
        for target in ("sm_80", "sm_90"):
            slow = () if workload.endswith(QUICK[0]) and target == QUICK[1] else (pytest.mark.slow,)
            yield pytest.param(workload, target, marks=slow, id=f"{workload}-{target}")


@pytest.mark.parametrize("workload, target", list(cases()))
def test_compiled_kernels_agree_with_the_reference(workload, target, poisoned_memory):
    with gpu.running(target):
        for module, op, *args in workloads.calls(workload):
            if "lookahead" not in op:  # undone to the bit by the backend that looked ahead: below
                check(module, op, *args)


@pytest.mark.parametrize("target", [pytest.param("sm_80", marks=pytest.mark.slow), "sm_90"])
def test_a_compiled_look_ahead_is_undone_to_the_bit(target, poisoned_memory):
    from entangle_fast.kernels import step_lookahead

    with gpu.running(target):
        check_every_capacity(step_lookahead.step_lookahead, step_lookahead.step_lookahead_undo, (torch.bfloat16, torch.float32))
