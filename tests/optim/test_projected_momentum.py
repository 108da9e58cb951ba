"""Projected momentum, against the same formulas on one flat vector in float64."""

import pytest
import torch
from optimising import F64, flat, span, tensors

from entangle_fast.optim import ProjectedMomentum


@pytest.mark.parametrize("project", ["momentum", "gradient"])
@pytest.mark.parametrize("case", ["two", "one", "none", "collinear", "zero", "ridge", "three"])
def test_projected_momentum(project, case):
    params = tensors(0)
    theta, v = flat(params), torch.zeros(23, dtype=F64)
    ridge = 0.5 if case == "ridge" else 0.0
    sgd = ProjectedMomentum(params, lr=0.1, momentum=0.9, weight_decay=0.2, ridge=ridge, project=project)
    for k in range(4):
        g, a, b, c = (tensors(10 * k + i) for i in range(1, 5))
        directions = {"one": [a], "none": [], "collinear": [a, [-2 * x for x in a]], "three": [a, b, c],
                      "zero": [a, [0 * x for x in a]]}.get(case, [a, b])  # fmt: skip
        found = sgd.step(g, directions)
        p = span(directions, ridge) if directions else torch.zeros(23, 23, dtype=F64)
        moved = 0.9 * v + flat(g)
        v = moved - p @ (moved if project == "momentum" else flat(g))
        theta = theta * (1 - 0.1 * 0.2) - 0.1 * v
        torch.testing.assert_close(flat(params), theta, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(flat(sgd.buffers), v, rtol=1e-9, atol=1e-10)
        if project == "momentum":
            torch.testing.assert_close(found["step_norm"], 0.1 * v.norm(), rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(
                found["removed"].square(), 1 - (v.norm() / moved.norm()).square(), rtol=1e-6, atol=1e-9
            )
            if not ridge and directions:
                assert max(abs(flat(d) @ v) for d in directions) < 1e-8
        if case in ("two", "ridge"):
            cosine = torch.nn.functional.cosine_similarity(flat(a), flat(b), dim=0)
            torch.testing.assert_close(found["cosine"], cosine)
        assert all(torch.isfinite(x) for x in found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_stays_orthogonal(dtype):
    params = tensors(0, dtype)
    sgd = ProjectedMomentum(params, lr=0.1)
    for k in range(3):
        directions = [tensors(10 * k + 1, dtype), tensors(10 * k + 2, dtype)]
        sgd.step(tensors(10 * k + 3, dtype), directions)
        v = flat(sgd.buffers)
        assert sgd.buffers[0].dtype == dtype
        for d in directions:
            assert abs(flat(d) @ v) < 4 * torch.finfo(dtype).eps * flat(d).norm() * v.norm()


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_a_given_coefficient_is_used(dtype):
    params, d, g = tensors(0), tensors(1), tensors(2)
    theta = flat(params)
    ProjectedMomentum(params, lr=0.5).step(g, [d], coef=torch.tensor([0.25], dtype=dtype))
    torch.testing.assert_close(flat(params), theta - 0.5 * (flat(g) - 0.25 * flat(d)))


def test_project_is_named():
    with pytest.raises(ValueError, match="project: got 'v'; needs one of 'momentum', 'gradient'"):
        ProjectedMomentum(tensors(0), lr=0.1, project="v")


def test_a_direction_too_short_for_its_coefficient():
    optimiser = ProjectedMomentum([torch.zeros(3)], lr=1.0)
    optimiser.step([torch.ones(3)], [[torch.full((3,), 1e-39)]])
    torch.testing.assert_close(optimiser.params[0], -torch.ones(3))


@pytest.mark.parametrize("backend", ["", "reference"])
@pytest.mark.parametrize("ridge", [0.0, 1e-9])
def test_a_direction_too_short_does_not_disturb_the_others(ridge, backend, monkeypatch):
    monkeypatch.setenv("ENTANGLE_FAST_BACKEND", backend)
    a, b = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([1e-35, 1e-35, 0.0])
    for directions in ([[a], [b]], [[b], [a]], [[b], [a], [b]]):
        optimiser = ProjectedMomentum([torch.zeros(3)], lr=1.0, ridge=ridge)
        optimiser.step([torch.tensor([1.0, 2.0, 3.0])], directions)
        torch.testing.assert_close(optimiser.buffers[0], torch.tensor([0.0, 2.0, 3.0]))


@pytest.mark.parametrize("backend", ["", "reference"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_direction_that_is_not_finite_is_not_dropped(k, backend, monkeypatch):
    monkeypatch.setenv("ENTANGLE_FAST_BACKEND", backend)
    directions = [[torch.randn(3)] for _ in range(k - 1)] + [[torch.tensor([0.0, torch.nan, 0.0])]]
    optimiser = ProjectedMomentum([torch.zeros(3)], lr=1.0)
    optimiser.step([torch.ones(3)], directions)
    assert optimiser.params[0].isnan().all()


def test_nothing_was_removed_of_nothing():
    found = ProjectedMomentum([torch.zeros(3)], lr=0.1).step([torch.zeros(3)], [[torch.ones(3)]])
    assert found["removed"] == 0


def test_nearly_equal_directions_count_as_one():
    torch.manual_seed(275)
    a = torch.randn(8)
    d, g = a * (1 + 2e-7 * torch.randn(8)), torch.randn(8)
    optimiser = ProjectedMomentum([torch.zeros(8)], lr=1.0)
    optimiser.step([g], [[a], [d]])
    assert abs(torch.cosine_similarity(optimiser.buffers[0].double(), a.double(), 0)) < 1e-5
