import pytest
import torch

pytest.importorskip("triton")

from interpreter import mend

mend()


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN (integers: the largest), so that what a kernel forgets to write is seen."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
