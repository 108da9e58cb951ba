"""OrthoGrad's step against QR of the materialised per-sample gradients."""

import math

import pytest
import torch
from stepping import F64, begin, clipped_gradient, each_gradient, follow, forget_batch, resumes_to_the_bit, retain_batch

from entangle_fast.methods import OrthoGrad
from entangle_fast.methods.process import NonFinite

SIZES = dict(batch=8, retain_batch=12, lr=0.05)


@pytest.mark.parametrize("options", [
    {}, {"alpha": 0.0}, {"alpha": 1.0}, {"clip": 1.0}, {"max_norm": 0.1}, {"momentum": 0.5, "lr": 0.02},
], ids=str)  # fmt: skip
def test_the_step_is_that_of_qr(options):
    c = OrthoGrad(**{**SIZES, "max_norm": 0.0, **options})

    def direction(model, d, k):
        g_r = each_gradient(model, *retain_batch(d, k, 12))
        g_f = clipped_gradient(model, *forget_batch(d, k, 8), c.clip)
        q = torch.linalg.qr(g_r.T).Q
        return c.alpha * g_r.mean(0) - (1 - c.alpha) * (g_f - q @ (q.T @ g_f))

    follow(c, direction, tolerance=1e-8)


def test_a_ridge_is_tikhonovs():
    c = OrthoGrad(**SIZES, max_norm=0.0, alpha=0.5, ridge=0.1)

    def direction(model, d, k):
        g_r = each_gradient(model, *retain_batch(d, k, 12))
        g_f = clipped_gradient(model, *forget_batch(d, k, 8), c.clip)
        onto = g_r.T @ torch.linalg.solve(g_r @ g_r.T + 0.1 * torch.eye(12, dtype=F64), g_r @ g_f)
        return 0.5 * g_r.mean(0) - 0.5 * (g_f - onto)

    follow(c, direction)


def test_a_deficient_span():
    """The same samples twice in one batch: the Gram is singular, the direction is not."""
    process = begin(OrthoGrad(batch=8, retain_batch=68, alpha=0.0, max_norm=0.0))
    for t in process.data.remote.tensors:
        t[22:] = t[:22]
    found = torch.cat([g.flatten() for g in process.direction(0, {})])
    g_r = each_gradient(process.model, *retain_batch(process.data, 0, 68))
    assert len(g_r) == 68 and torch.linalg.matrix_rank(g_r, rtol=1e-10) < 68
    g_f = clipped_gradient(process.model, *forget_batch(process.data, 0, 8), 3.0)
    assert (g_r @ found).abs().max() < 1e-6 * g_r.norm(dim=1).max() * g_f.norm()
    assert found @ g_f < 0  # the forget loss rises


def test_resume(tmp_path):
    resumes_to_the_bit(OrthoGrad(**SIZES, momentum=0.5), tmp_path)


def test_rows_and_the_early_end():
    process = begin(OrthoGrad(**{**SIZES, "lr": 0.5}, epochs=50, stop_at=0.1), torch.float32)
    while process.done < process.total and not process.stopped:
        row = process.step()
        assert row["loss_forget"] > 0 and row["loss_adjacent"] > 0 and row["loss_remote"] > 0
    x, y = process.data.forget.tensors
    assert process.stopped and (process.model(x).argmax(1) == y).float().mean() <= 0.3


def test_what_is_not_finite_is_named_and_changes_nothing():
    process = begin(OrthoGrad(**SIZES), torch.float32)
    process.data.adjacent.tensors[0][:] = math.nan
    before = [p.clone() for p in process.params]
    with pytest.raises(NonFinite, match="retain or the forget"):
        process.step()
    assert all(torch.equal(a, b) for a, b in zip(before, process.params))


@pytest.mark.parametrize("change, message", [
    ({"alpha": 1.5}, "alpha: got 1.5; needs a number in"), ({"alpha": math.nan}, "alpha: got nan"),
    ({"retain_batch": 1}, "retain_batch: got 1; needs an integer >= 2"), ({"ridge": -1.0}, "ridge: got -1"),
    ({"ridge": math.inf}, "ridge: got inf"), ({"clip": 0.0}, "clip: got 0.0"), ({"lr": 0.0}, "lr: got 0.0"),
])  # fmt: skip
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        OrthoGrad(**change)
