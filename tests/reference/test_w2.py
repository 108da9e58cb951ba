"""Wasserstein-2 against brute force, textbook formulas and special cases."""

import itertools
import math

import pytest
import torch

from entangle_fast.reference import w2_features, w2_moments, w2_sorted


def brute_force(x, y):
    """The best matching of samples repeated to a common length."""
    length = math.lcm(len(x), len(y))
    x, y = x.repeat_interleave(length // len(x)), y.repeat_interleave(length // len(y))
    return min((x - y[list(p)]).square().mean().item() for p in itertools.permutations(range(length)))


@pytest.mark.parametrize("n, m", [(3, 3), (2, 3), (3, 6), (6, 2), (1, 4), (5, 1)])
def test_sorted_is_the_best_matching(generator, n, m):
    x, y = (torch.randn(k, dtype=torch.float64, generator=generator) for k in (n, m))
    assert w2_sorted(x, y)[0].item() == pytest.approx(brute_force(x, y))


@pytest.mark.parametrize("n, m", [(7, 7), (7, 4), (129, 151), (151, 129), (372, 2)])
def test_sorted_weights_are_its_gradient(generator, n, m):
    x, y = (torch.randn(k, dtype=torch.float64, generator=generator) for k in (n, m))
    weights = w2_sorted(x, y)[1]
    for i in (0, n // 2, n - 1):
        step = torch.zeros_like(x)
        step[i] = 1e-6
        slope = (w2_sorted(x + step, y)[0] - w2_sorted(x - step, y)[0]) / 2e-6
        assert weights[i].item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-8)


def test_sorted_with_equal_sizes_is_the_papers_form(generator):
    x, y = (torch.randn(9, dtype=torch.float64, generator=generator) for _ in range(2))
    value, weights = w2_sorted(x, y)
    torch.testing.assert_close(value, (x.sort().values - y.sort().values).square().mean())
    torch.testing.assert_close(weights, 2 / 9 * (x - y.sort().values[x.argsort().argsort()]))


def test_sorted_of_itself_and_shifted(generator):
    x = torch.randn(12, dtype=torch.float64, generator=generator)
    assert w2_sorted(x, x[torch.randperm(12, generator=generator)])[0] == 0
    assert w2_sorted(x + 2, x)[0].item() == pytest.approx(4)


def test_moments(generator):
    x, y = (torch.randn(k, dtype=torch.float64, generator=generator) for k in (8, 5))
    want = (x.mean() - y.mean()) ** 2 + (x.std(correction=0) - y.std(correction=0)) ** 2
    value, weights = w2_moments(x, y)
    torch.testing.assert_close(value, want)
    leaf = x.clone().requires_grad_()
    ((leaf.mean() - y.mean()) ** 2 + (leaf.std(correction=0) - y.std(correction=0)) ** 2).backward()
    torch.testing.assert_close(weights, leaf.grad)


def test_moments_of_equal_losses_has_no_nan():
    value, weights = w2_moments(torch.ones(4), torch.tensor([1.0, 3.0]))
    assert value == 2 and weights.isfinite().all()


def root(s):
    values, vectors = torch.linalg.eigh(s)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


@pytest.mark.parametrize("n, m, d", [(9, 7, 3), (7, 9, 3), (4, 5, 8), (30, 1, 2), (1, 1, 4)])
def test_features_against_matrix_roots(generator, n, m, d):
    x, y = (torch.randn(k, d, dtype=torch.float64, generator=generator) for k in (n, m))
    s, t = (z.T.cov(correction=0).reshape(d, d) if len(z) > 1 else torch.zeros(d, d, dtype=z.dtype) for z in (x, y))
    r = root(s)
    want = (x.mean(0) - y.mean(0)).square().sum() + s.trace() + t.trace() - 2 * root(r @ t @ r).trace()
    assert w2_features(x, y)[0].item() == pytest.approx(want.item(), abs=1e-6)


def test_features_weights_are_its_gradient(generator):
    x, y = (torch.randn(k, 3, dtype=torch.float64, generator=generator) for k in (9, 7))
    weights = w2_features(x, y)[1]
    for i, j in ((0, 0), (4, 2), (8, 1)):
        step = torch.zeros_like(x)
        step[i, j] = 1e-6
        slope = (w2_features(x + step, y)[0] - w2_features(x - step, y)[0]) / 2e-6
        assert weights[i, j].item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-8)


def test_features_of_itself_is_zero(generator):
    x = torch.randn(20, 4, dtype=torch.float64, generator=generator)
    value, weights = w2_features(x, x)
    assert value < 1e-12 and weights.abs().max() < 1e-12
