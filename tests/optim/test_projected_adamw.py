"""Projected AdamW, against the same formulas on one flat vector in float64."""

import copy

import pytest
import torch
from optimising import BOTH, F64, flat, pair, span, stepped, tensors

from entangle_fast.optim import ProjectedAdamW
from entangle_fast.reference import philox


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_adamw_without_directions_is_torch_s(dtype):
    mine, theirs = tensors(0, dtype), tensors(0, dtype)
    adamw = ProjectedAdamW(mine, lr=0.02, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.3)
    plain = torch.optim.AdamW(theirs, lr=0.02, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.3)
    for k in range(5):
        grads = tensors(k + 1, dtype)
        assert adamw.step(grads) == {}
        for p, g in zip(theirs, grads):
            p.grad = g
        plain.step()
        torch.testing.assert_close(flat(mine), flat(theirs), rtol=1e-12 if dtype == F64 else 1e-5, atol=1e-13 if dtype == F64 else 1e-6)


@pytest.mark.parametrize("ridge", [0.0, 0.5])
def test_adamw_projects_the_gradient_first(ridge):
    mine, theirs = tensors(0), tensors(0)
    adamw = ProjectedAdamW(mine, lr=0.02, ridge=ridge)
    plain = torch.optim.AdamW(theirs, lr=0.02)
    for k in range(4):
        g, a, b = (tensors(10 * k + i) for i in (1, 2, 3))
        found = adamw.step(g, [a, b])
        kept = flat(g) - span([a, b], ridge) @ flat(g)
        for p, part in zip(theirs, kept.split([x.numel() for x in theirs])):
            p.grad = part.view(p.shape)
        plain.step()
        torch.testing.assert_close(flat(mine), flat(theirs), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(found["removed"].square(), 1 - (kept.norm() / flat(g).norm()).square(), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(found["cosine"], torch.nn.functional.cosine_similarity(flat(a), flat(b), dim=0))
    moved = flat(tensors(0)) - flat(mine)
    assert abs(moved @ flat(a)) > 1e-3 * moved.norm() * flat(a).norm()  # as its docstring says: not orthogonal


def test_adamw_takes_a_given_coefficient_and_draws_by_its_count():
    params, d, g = tensors(0), tensors(1), tensors(2)
    theta = flat(params)
    adamw = ProjectedAdamW(params, lr=0.0, noise=0.5, seed=7)
    assert adamw.step(g, [d], coef=torch.tensor([0.25])) == {}
    torch.testing.assert_close(flat(adamw.exp_avg), 0.1 * (flat(g) - 0.25 * flat(d)))
    torch.testing.assert_close(flat(params) - theta, 0.5 * philox.normal(23, 7, 1).double(), rtol=1e-6, atol=1e-6)
    adamw.step(g)
    both = philox.normal(23, 7, 1) + philox.normal(23, 7, 2)
    torch.testing.assert_close(flat(params) - theta, 0.5 * both.double(), rtol=1e-6, atol=1e-6)


def test_adamw_without_parameters_is_refused():
    with pytest.raises(ValueError, match="params: got no tensor"):
        ProjectedAdamW([])


def test_a_refused_step_counts_no_step():
    optimiser = ProjectedAdamW([torch.zeros(3)])
    with pytest.raises(ValueError, match=r"grads\[0\]"):
        optimiser.step([torch.zeros(4)])
    assert optimiser.count == 0


def test_adamws_options_are_checked():
    for betas in ((1.0, 0.9), (0.9,), (0.9, -0.1)):
        with pytest.raises(ValueError, match="betas: got"):
            ProjectedAdamW(tensors(0), betas=betas)


@BOTH
def test_each_parameter_counts_its_own_steps(make):
    own, mine, theirs, plain = pair(make)
    stepped(own, mine, theirs, plain, 8, lambda i, k: (i == 1 and k < 5) or (i == 2 and k % 2))
    torch.testing.assert_close(own, theirs, rtol=1e-12, atol=1e-13)
    again = make([{"params": own[:2]}, {"params": own[2:]}])
    again.load_state_dict(copy.deepcopy(mine.state_dict()))
    stepped(own, again, theirs, plain, 2)
    torch.testing.assert_close(own, theirs, rtol=1e-12, atol=1e-13)


def test_each_count_draws_its_own_noise():
    params, d = [torch.zeros(64) for _ in range(3)], philox.normal
    adamw = ProjectedAdamW(params, lr=0.0, noise=1.0, seed=7)
    for taken in ((0,), (1, 2), (0, 1, 2)):
        for i, p in enumerate(params):
            p.grad = torch.zeros(64) if i in taken else None
        adamw.step()
    torch.testing.assert_close(params[0], d(64, 7, 1) + d(64, 7, 2))
    torch.testing.assert_close(torch.cat(params[1:]), d(128, 7, 1 + 2**32) + d(128, 7, 2 + 2**32))


@pytest.mark.parametrize("seed, error", [("a", TypeError), (1.5, TypeError), (2**62, ValueError)])
def test_a_seed_is_a_whole_number(seed, error):
    with pytest.raises(error, match="^seed: got"):
        ProjectedAdamW(tensors(0), seed=seed)
