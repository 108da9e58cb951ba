"""The Woodbury step against a dense P×P solve."""

import math

import pytest
import torch
from stepping import F64, begin, clipped_gradient, each_gradient, follow, forget_batch, resumes_to_the_bit, retain_batch

from entangle_fast.methods import Woodbury

SIZES = dict(batch=8, retain_batch=12, lr=0.05)


@pytest.mark.parametrize("options", [
    {}, {"damping": 1e-6, "lr": 1e-6}, {"damping": 10.0}, {"alpha": 0.0}, {"alpha": 1.0}, {"clip": 1.0}, {"max_norm": 0.1},
], ids=str)  # fmt: skip
def test_the_step_is_that_of_a_dense_solve(options):
    c = Woodbury(**{**SIZES, "max_norm": 0.0, **options})

    def direction(model, d, k):
        g = each_gradient(model, *retain_batch(d, k, 12))
        v = c.alpha * g.mean(0) - (1 - c.alpha) * clipped_gradient(model, *forget_batch(d, k, 8), c.clip)
        return torch.linalg.solve(c.damping * torch.eye(g.shape[1], dtype=F64) + g.T @ g / len(g), v)

    follow(c, direction, tolerance=1e-7 if c.damping < 1e-3 else 1e-9)


def test_without_damping_it_is_a_projection():
    process = begin(Woodbury(**SIZES, alpha=0.0, damping=1e-12))
    found = torch.cat([g.flatten() for g in process.direction(0, {})])
    g = each_gradient(process.model, *retain_batch(process.data, 0, 12))
    assert (g @ found).abs().max() < 1e-6 * g.norm(dim=1).max() * found.norm()


def test_resume(tmp_path):
    resumes_to_the_bit(Woodbury(**SIZES, momentum=0.5), tmp_path)


@pytest.mark.parametrize("change, message", [
    ({"damping": 0.0}, "damping: got 0.0; needs a finite number > 0"), ({"damping": math.nan}, "damping: got nan"),
    ({"alpha": -0.1}, "alpha: got -0.1"), ({"retain_batch": 1}, "retain_batch: got 1"), ({"clip": -1.0}, "clip: got -1"),
])  # fmt: skip
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        Woodbury(**change)
