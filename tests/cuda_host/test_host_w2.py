import pytest
import torch

from entangle_fast import reference

# the last: several tiles of the sort
PAIRS = [(1, 1), (2, 2), (129, 129), (151, 372), (372, 151), (1, 7), (7, 1), (1000, 999), (20011, 9001)]


@pytest.mark.parametrize("n, m", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sorted(cuda, dtype, n, m):
    x, y = (torch.randn(n) * 3).to(dtype), torch.randn(m).to(dtype)
    value, weights = cuda.w2_sorted(x, y)
    plain, exact = reference.w2_sorted(x, y), reference.w2_sorted(x.double(), y.double())
    for ours, theirs, truth in zip((value, weights), plain, exact):
        assert ours.dtype == torch.float32 and ours.shape == truth.shape
        error, allowed = ((z.double() - truth).norm() for z in (ours, theirs))
        assert error <= max(2 * allowed, 1e-6 * truth.norm())


def test_ties_zeros_and_infinities_keep_the_order_of_the_samples(cuda):
    x = torch.tensor([0.0, -0.0, 1.0, 1.0, -0.0, -5.0, 3e38, 0.0])
    y = torch.randn(8)
    torch.testing.assert_close(cuda.w2_sorted(x, y)[1], reference.w2_sorted(x, y)[1])


def test_nan_is_largest_as_in_torch_sort(cuda):
    x, y = torch.tensor([2.0, float("nan"), 1.0]), torch.tensor([0.0, 1.0, 2.0])
    value, weights = cuda.w2_sorted(x, y)
    torch.testing.assert_close(weights, reference.w2_sorted(x, y)[1], equal_nan=True)
    assert value.isnan()


def test_strided_losses_and_refusals(cuda):
    x, y = torch.randn(40)[::2], torch.randn(20)
    torch.testing.assert_close(cuda.w2_sorted(x, y)[1], reference.w2_sorted(x, y)[1])
    with pytest.raises(RuntimeError, match="not float32"):
        cuda.w2_sorted(x.double(), y.double())
    with pytest.raises(RuntimeError, match="n, m >= 1"):
        cuda.w2_sorted(x, y[:0])
