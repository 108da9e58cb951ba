import contextlib
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from entangle_fast import dispatch

sys.path.append(str(Path(__file__).parents[2] / "bench"))
NEEDS_NO_GPU = "test_without_a_gpu.py"
RAN: set[str] = set()  # "op/backend" of the test at hand
END = float(os.environ.get("ENTANGLE_FAST_GPU_TESTS_END", "inf"))  # seconds since 1970, bench/gpu.sh: no test begins later


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "/gpu/" in str(item.path) and item.path.name != NEEDS_NO_GPU:
                item.add_marker(pytest.mark.skip(reason="no GPU on this machine"))


@pytest.fixture(autouse=True)
def device_that_answers():
    """After a fault every call on the device fails: with xdist a new worker takes over, else no further test is worth its time."""
    if time.time() > END:
        pytest.skip("no time left")
    yield
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            if "PYTEST_XDIST_WORKER" in os.environ:
                os._exit(70)
            pytest.exit(f"the device answers with errors only: {error}")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN (integers: the largest), so that what a kernel forgets to write is seen."""
    torch.manual_seed(0)
    kept = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(kept[0], warn_only=kept[1])


@pytest.fixture(autouse=True)
def remembered(record_property):
    """Which operation ran on which backend goes into the JUnit file, for doctor (bench/gpu_matrix.py reads it)."""
    RAN.clear()
    yield
    for name in sorted(RAN):
        record_property("ran", name)


@pytest.fixture
def served():
    """with served(backend) as remember: dispatch takes this backend or raises BackendError; remember(op): it ran there."""

    @contextlib.contextmanager
    def by(backend: str):
        kept = os.environ.get(dispatch.ENV)
        os.environ[dispatch.ENV] = backend
        try:
            yield lambda *ops: RAN.update(f"{op}/{backend}" for op in ops)
        finally:
            os.environ.pop(dispatch.ENV)
            if kept is not None:
                os.environ[dispatch.ENV] = kept

    return by


@pytest.fixture(params=["triton", "cuda"])
def backend(request, served):
    """The test runs once with each backend alone."""
    if request.param == "cuda" and not torch.version.hip and dispatch.EXTENSION is None:
        if not hasattr(torch.ops.entangle_fast_cuda, "step_gram"):
            pytest.skip("built without CUDA: no nvcc then, or ENTANGLE_FAST_CUDA=0")
    elif request.param == "cuda":
        pytest.skip(f"no CUDA C++ kernels: {dispatch.EXTENSION or 'this is ROCm'}")
    with served(request.param):
        yield request.param
