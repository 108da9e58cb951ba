"""ROSU's step against the model moved to θ + δ in plain autograd."""

import math

import pytest
import torch
import torch.nn.functional as F
from small import flat
from stepping import begin, clipped_gradient, follow, forget_batch, gradient, put, resumes_to_the_bit, retain_batch

from entangle_fast.methods import Rosu
from entangle_fast.methods.process import NonFinite

SIZES = dict(batch=8, retain_batch=12, lr=0.05)


def mean_gradient(model, x, y):
    return gradient(F.cross_entropy(model(x), y), model)


@pytest.mark.parametrize("options", [
    {}, {"rho": 1.0}, {"amplify": 0.0}, {"amplify": 5.0, "max_norm": 0.1}, {"clip": 1.0}, {"momentum": 0.5},
], ids=str)  # fmt: skip
def test_the_step_is_taken_from_the_perturbed_point(options):
    c = Rosu(**{**SIZES, "max_norm": 0.0, **options})

    def direction(model, d, k):
        batch = retain_batch(d, k, 12)
        g_r, g_f = mean_gradient(model, *batch), clipped_gradient(model, *forget_batch(d, k, 8), c.clip)
        free = g_f - (g_f @ g_r) / (g_r @ g_r) * g_r
        unit, theta = free / free.norm(), flat(model)
        assert abs(unit @ g_r) < 1e-12 * g_r.norm()
        put(model, theta + c.rho * unit)
        there = mean_gradient(model, *batch)
        put(model, theta)
        return there - c.amplify * unit

    follow(c, direction)


def test_the_perturbation_is_retain_neutral_and_of_length_rho():
    process = begin(Rosu(**SIZES, rho=0.3))
    x, y = retain_batch(process.data, 0, 12)
    g_r = process.gradient(F.cross_entropy(process.model(x), y))
    g_f = process.gradient(F.cross_entropy(process.model(process.data.forget.tensors[0]), process.data.forget.tensors[1]))
    delta = process.perturbation(g_f, g_r)
    assert torch.cat([d.flatten() for d in delta]).norm().item() == pytest.approx(0.3)
    assert abs(sum((a * b).sum() for a, b in zip(delta, g_r))) < 1e-12
    assert sum((a * b).sum() for a, b in zip(delta, g_f)) > 0


def test_without_a_forget_gradient_it_descends_on_the_retain_set():
    process = begin(Rosu(**SIZES, clip=1e-9))
    found = torch.cat([g.flatten() for g in process.direction(0, {})])
    torch.testing.assert_close(found, mean_gradient(process.model, *retain_batch(process.data, 0, 12)))


def test_the_parameters_are_back_when_the_perturbed_point_fails():
    process = begin(Rosu(**SIZES, rho=1e39), torch.float32)
    before = [p.clone() for p in process.params]
    with pytest.raises(NonFinite):
        process.step()
    assert all(torch.equal(a, b) for a, b in zip(before, process.params))


def test_resume(tmp_path):
    resumes_to_the_bit(Rosu(**SIZES, momentum=0.5), tmp_path)


@pytest.mark.parametrize("change, message", [
    ({"rho": 0.0}, "rho: got 0.0; needs a finite number > 0"), ({"rho": math.inf}, "rho: got inf"),
    ({"amplify": -1.0}, "amplify: got -1"), ({"amplify": math.inf}, "amplify: got inf"), ({"retain_batch": 0}, "retain_batch: got 0"),
])  # fmt: skip
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        Rosu(**change)
