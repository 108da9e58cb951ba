"""The same tests twice: interpreted, in a process of their own (test_interpreter.py), and compiled, their PTX run by tests/ptx (slow)."""

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from entangle_fast.kernels import combine, gram, project, project_random, tiles

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from interpreter import mend

    mend()
    # the interpreter's cost is by operation, whatever its size: blocks as deep as they come
    for configs in (
        gram.PAIRS, gram.LOOKUP, tiles.FORM, tiles.ACCUMULATE, combine.COMBINE, project.ROWS, project_random.SIGNS, project_random.NORMALS,
    ):  # fmt: skip
        for first, *_ in configs.values():
            first.update({name: 128 for name in ("BK", "BT", "BR") if name in first})
else:

    @pytest.fixture(autouse=True, params=["sm_80", "sm_90"])
    def compiled(request):
        import gpu

        with gpu.running(request.param):
            yield


def pytest_collection_modifyitems(items):
    for item in items:
        if not INTERPRETED and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN (integers: the largest), so that what a kernel forgets to write is seen."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
