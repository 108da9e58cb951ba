"""What every test of a whole job shares."""

import pytest
import torch

from entangle_fast.result import Result


@pytest.fixture(autouse=True, scope="module")
def _one_thread_and_no_figures():
    """Figures have their own tests; here they would be most of the time."""
    threads, draw = torch.get_num_threads(), Result.plot
    torch.set_num_threads(1)
    Result.plot = lambda self, folder: []
    yield
    torch.set_num_threads(threads)
    Result.plot = draw
