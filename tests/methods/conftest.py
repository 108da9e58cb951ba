import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """The models are tiny: a second thread would only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
