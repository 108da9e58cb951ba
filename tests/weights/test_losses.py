"""Weights that depend on losses or norms: each is the gradient of the scalar that its formula names."""

import math

import pytest
import torch

from entangle_fast import weights


def losses(n, seed=0, high=12.0):
    generator = torch.Generator().manual_seed(seed)
    return high * torch.rand(n, generator=generator, dtype=torch.float64)


def test_means():
    w = weights.means(torch.ones(4, requires_grad=True))
    assert w.tolist() == [0.25] * 4 and not w.requires_grad
    assert weights.means(losses(3)).dtype == torch.float64


@pytest.mark.parametrize("bad", [torch.tensor(1.0), torch.zeros(0), torch.zeros(2, 2)])
def test_means_need_one_loss_per_sample(bad):
    with pytest.raises(ValueError, match="losses: shape"):
        weights.means(bad)


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_clipped_is_the_gradient_of_the_clipped_mean(penalty):
    ce = losses(9).requires_grad_()
    kept = torch.where(ce < 5.0, ce, ce.detach())
    value = (kept - penalty / (kept + 1e-3)).mean()
    torch.testing.assert_close(weights.clipped(ce, 5.0, penalty), torch.autograd.grad(value, ce)[0], rtol=1e-14, atol=0)


def test_clipped_cuts_from_the_clip_on():
    assert weights.clipped(torch.tensor([1.0, 5.0, math.inf, math.nan]), 5.0).tolist() == [0.25, 0, 0, 0]
    assert weights.clipped(torch.tensor([1.0, 5.0]), math.inf).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("penalty, mu, gamma", [(0.0, 10.0, 1.0), (1.0, 3.0, 0.5), (0.0, 0.0, 2.0)])
def test_lagrangian_is_autograd_of_the_augmented_lagrangian(penalty, mu, gamma):
    forget, remote = losses(5, 1).requires_grad_(), losses(7, 2).requires_grad_()
    start, multiplier = 4.0, torch.tensor(-0.7, dtype=torch.float64)
    kept = torch.where(forget < 6.0, forget, forget.detach())
    h = remote.mean() - start
    value = -gamma * (kept - penalty / (kept + 1e-3)).mean() + multiplier * h + mu / 2 * h**2
    expected = torch.autograd.grad(value, (forget, remote))
    found = weights.lagrangian(forget, remote, start, multiplier, mu=mu, gamma=gamma, clip=6.0, penalty=penalty)
    torch.testing.assert_close((found.forget, found.remote), expected, rtol=1e-13, atol=1e-16)
    assert not found.forget.requires_grad and not found.remote.requires_grad and not found.multiplier.requires_grad
    assert found.constraint == h.detach() and found.multiplier == multiplier + mu * h.detach()


def test_the_multiplier_is_not_clamped():
    found = weights.lagrangian(torch.ones(2), torch.ones(2), 3.0, torch.tensor(0.0), mu=10.0)
    assert found.multiplier == -20.0 and (found.remote == -10.0).all()


@pytest.mark.parametrize("kind", ["sorted", "moments", "features"])
@pytest.mark.parametrize("n, m", [(6, 6), (5, 8), (1, 1)])
def test_w2_weights_are_the_gradient_of_its_value(kind, n, m):
    values, reference = losses(4 * n, 3).view(n, 4), losses(4 * m, 4).view(m, 4)
    if kind != "features":
        values, reference = values[:, 0].contiguous(), reference[:, 0].contiguous()
    value, w = weights.w2(values, reference, kind)
    assert value.dim() == 0 and w.shape == values.shape and value >= 0
    step, numeric = 1e-5, torch.zeros_like(values)
    for i in range(values.numel()):
        move = torch.zeros_like(values)
        move.view(-1)[i] = step
        up, down = (weights.w2(values + s * move, reference, kind)[0] for s in (1, -1))
        numeric.view(-1)[i] = (up - down) / (2 * step)
    torch.testing.assert_close(w, numeric, rtol=1e-6, atol=1e-6)


def test_w2_sorted_is_the_papers_closed_form():
    values, reference = losses(7, 5), losses(7, 6)
    value, w = weights.w2(values, reference)
    rank = values.argsort().argsort()
    torch.testing.assert_close(value, (values.sort().values - reference.sort().values).square().mean())
    torch.testing.assert_close(w, 2 / 7 * (values - reference.sort().values[rank]))


@pytest.mark.parametrize("kind", ["sorted", "moments", "features"])
def test_w2_to_itself_is_zero(kind):
    x = losses(12, 7).view(6, 2) if kind == "features" else losses(6, 7)
    value, w = weights.w2(x, x.flip(0), kind)
    assert abs(value) < 1e-9 and w.abs().max() < 1e-6


def test_w2_names_its_kinds():
    with pytest.raises(ValueError, match="kind: got 'sort'; needs one of sorted, moments, features"):
        weights.w2(losses(3), losses(3), "sort")


def test_clipped_norms():
    w = weights.clipped_norms(torch.tensor([0.0, 1.0, 4.0, 16.0, -1e-9]), 2.0)
    torch.testing.assert_close(w, torch.tensor([1.0, 1.0, 1.0, 0.5, 1.0]))


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan])
def test_clipped_norms_need_a_positive_bound(bound):
    with pytest.raises(ValueError, match="bound: got"):
        weights.clipped_norms(torch.ones(2), bound)


def test_integers_are_refused():
    x = torch.tensor([1, 2])
    for name, call in {"losses": lambda: weights.means(x), "sqnorms": lambda: weights.clipped_norms(x, 1.0),
                       "remote": lambda: weights.lagrangian(x.float(), x, 0.0, torch.tensor(0.0))}.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name}: dtype torch.int64 is not a real floating-point one; convert"):
            call()
