"""The rule of the k×k solve: what is left out, what is no ridge, and that nothing that is not finite is dropped in silence."""

import math

import pytest
import torch

from entangle_fast.reference.solve import LEAST, least_norm

F64 = torch.float64


def gram_and_inner(k, lengths=()):
    """The Gram of k directions, in float64, and their products with another; lengths: of the first ones."""
    generator = torch.Generator().manual_seed(k)
    d, g = torch.randn(k, 20, generator=generator, dtype=F64), torch.randn(20, generator=generator, dtype=F64)
    for i, length in enumerate(lengths):
        d[i] *= length / d[i].norm()
    return d @ d.T, d @ g


@pytest.mark.parametrize("ridge", [0.0, 0.5])
@pytest.mark.parametrize("k", [1, 2, 3, 6])
@pytest.mark.parametrize("length", [0.0, 1e-38, 0.99e-30])
def test_what_is_too_short_is_left_out(k, ridge, length):
    gram, inner = gram_and_inner(k, [length])
    c = least_norm(gram, inner, ridge, 1e-12)
    assert c[0] == 0
    torch.testing.assert_close(c[1:], least_norm(gram[1:, 1:], inner[1:], ridge, 1e-12), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_what_is_just_long_enough_is_not(k):
    gram, inner = gram_and_inner(k, [1.01e-30])
    torch.testing.assert_close(gram @ least_norm(gram, inner, 0.0, 1e-12), inner, rtol=1e-9, atol=1e-9 * inner[0].abs().item())


@pytest.mark.parametrize("ridge", [0.0, 0.5])
@pytest.mark.parametrize("k", [1, 2, 3, 6])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_dropped(k, ridge, bad):
    for place in ((0, 0), (0, k - 1), (k - 1, k - 1)):
        gram, inner = gram_and_inner(k, [0.0])
        gram[place] = gram[place[::-1]] = bad
        assert least_norm(gram, inner, ridge, 1e-12).isnan().all()
    gram, inner = gram_and_inner(k, [0.0])
    for i in (0, k - 1):  # also beside a direction that is left out
        spoilt = inner.clone()
        spoilt[i] = bad
        assert least_norm(gram, spoilt, ridge, 1e-12).isnan().all()
        both = least_norm(gram, torch.stack([inner, spoilt], 1), ridge, 1e-12)
        torch.testing.assert_close(both[:, 0], least_norm(gram, inner, ridge, 1e-12), rtol=1e-12, atol=1e-12)
        assert both[:, 1].isnan().all()


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_a_ridge_below_all_that_counts_is_none(k):
    gram, inner = gram_and_inner(k)
    gram[-1], gram[:, -1], inner[-1] = gram[0], gram[:, 0], inner[0]  # singular, as of twice the same direction
    gram[-1, -1] = gram[0, 0]
    for ridge in (5e-324, 1e-310, 0.99 * LEAST):
        assert torch.equal(least_norm(gram, inner, ridge, 1e-12), least_norm(gram, inner, 0.0, 1e-12))
    assert least_norm(gram, inner, LEAST, 1e-12).isfinite().all()
