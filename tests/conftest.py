"""What every test shares: two threads, fixed seeds, and memory that is never silently zero."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: processes that share cores must not wait for threads by spinning

import pytest  # noqa: E402
import torch  # noqa: E402

LONGEST = ("test_nvcc_runs.py", "test_interpreter.py")


def pytest_collection_modifyitems(items):
    """The longest first, so that processes which share the tests end together."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True, scope="session")
def _two_threads():
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def generator():
    """A generator of this test's own."""
    return torch.Generator().manual_seed(1)


@pytest.fixture
def poisoned_memory():
    """torch.empty and its kin, also those that C++ calls, return NaN (integers: their largest value).

    torch fills uninitialised memory itself under deterministic algorithms; the cpp kernels allocate through the same
    dispatcher, so an element that a kernel forgets to write shows up as NaN.
    """
    fill, mode = torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(mode)
