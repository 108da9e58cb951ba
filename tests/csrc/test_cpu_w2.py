import math

import pytest
import torch

from entangle_fast import reference

KINDS = ("w2_sorted", "w2_moments")
SIZES = [(1, 1), (2, 2), (97, 97), (5, 3), (64, 129), (1, 40), (5000, 5000), (4100, 12300), (40_000, 33_000)]


@pytest.mark.parametrize("n,m", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_weights(cpp, assert_as_good, dtype, kind, n, m):
    x, y = (torch.randn(n) * 3 - 1).to(dtype), (torch.randn(m).abs() * 50).to(dtype)
    ours, plain = getattr(cpp, kind)(x, y), getattr(reference, kind)(x, y)
    for found in zip(ours, plain, getattr(reference, kind)(x.double(), y.double())):
        assert_as_good(*found)


@pytest.mark.parametrize("spread", [1, 3, 40])
def test_ties_share_ranks_in_the_order_of_the_samples(cpp, dtype, spread):
    x = torch.randint(-spread, spread + 1, (600,)).to(dtype) / 8
    x[::7] = -0.0
    y = torch.randn(600, dtype=torch.float64).to(dtype)
    want = reference.w2_sorted(x.double(), y.double())[1]
    torch.testing.assert_close(cpp.w2_sorted(x, y)[1].double(), want, rtol=1e-5, atol=1e-9)


def test_every_order_of_magnitude(cpp):
    x = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38, 1.0, -1.0, 3e38, -3e38, math.inf, -math.inf], dtype=torch.float64)
    mixed = torch.cat([x, x * 0.9])[torch.randperm(24, generator=torch.Generator().manual_seed(0))]
    finite = mixed[mixed.isfinite()]
    for dtype in (torch.float32, torch.float64):
        got = cpp.w2_sorted(finite.to(dtype), torch.zeros(len(finite), dtype=dtype))[1]  # weights are the values themselves
        torch.testing.assert_close(got, finite.to(dtype) * (2 / len(finite)), rtol=1e-6, atol=0)
        assert cpp.w2_sorted(mixed.to(dtype), torch.zeros(24, dtype=dtype))[0].isinf()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["losses", "reference"])
def test_nan_is_never_lost(cpp, kind, where):
    x, y = torch.randn(50), torch.randn(50)
    (x if where == "losses" else y)[3] = math.nan
    value, weights = getattr(cpp, kind)(x, y)
    want = getattr(reference, kind)(x, y)
    assert value.isnan() and torch.equal(weights.isnan(), want[1].isnan())


def test_moments_of_equal_losses(cpp):
    x = torch.full((9,), 2.5)
    value, weights = cpp.w2_moments(x, torch.tensor([1.0, 2.0]))
    torch.testing.assert_close((value, weights), reference.w2_moments(x, torch.tensor([1.0, 2.0])))


@pytest.mark.parametrize("n", [3, 1000])
def test_moments_of_equal_losses_that_are_not_short_binary_fractions(cpp, n):
    value, weights = cpp.w2_moments(torch.full((n,), 0.1, dtype=torch.float64), torch.arange(7).double())
    torch.testing.assert_close(value, torch.tensor(2.9**2 + 4, dtype=torch.float64))
    torch.testing.assert_close(weights, torch.full((n,), 2 / n * -2.9, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_threads_do_not_change_a_bit(cpp, kind):
    x, y, before = torch.randn(100_000), torch.randn(70_000), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(getattr(cpp, kind)(x, y))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@pytest.mark.parametrize("kind", KINDS)
def test_strides(cpp, kind):
    x, y = torch.randn(40, 3)[:, 1], torch.randn(30, 2)[:, 0]
    torch.testing.assert_close(getattr(cpp, kind)(x, y), getattr(cpp, kind)(x.contiguous(), y.contiguous()), rtol=0, atol=0)
