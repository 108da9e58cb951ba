"""GU's step against the dense form of the authors' equation, and its orthogonality in Adam's metric."""

import pytest
import torch
from stepping import F64, begin, clipped_gradient, each_gradient, follow, forget_batch, resumes_to_the_bit, retain_batch

from entangle_fast.methods import Geometric

SIZES = dict(batch=8, retain_batch=12, groups=3, lr=0.01)


class Dense:
    """v, its bias correction and the projection written out with P×P matrices."""

    def __init__(self, c):
        self.c, self.v = c, 0

    def __call__(self, model, d, k):
        c = self.c
        g = each_gradient(model, *retain_batch(d, k, 12))
        g_f = clipped_gradient(model, *forget_batch(d, k, 8), c.clip)
        u = torch.stack([part.mean(0) for part in g.tensor_split(c.groups)], 1)
        raw = c.alpha * g.mean(0) - (1 - c.alpha) * g_f
        self.v = c.beta2 * self.v + (1 - c.beta2) * raw**2
        h = torch.diag(1 / ((self.v / (1 - c.beta2 ** (k + 1))).sqrt() + c.eps))
        p = torch.eye(len(h), dtype=F64) - u @ torch.linalg.solve(u.T @ h @ u, u.T @ h)
        self.update = h @ p @ g_f
        assert (u.T @ self.update).abs().max() < 1e-9 * u.norm() * self.update.norm()  # the equation's own promise
        return h @ (c.alpha * g.mean(0) - (1 - c.alpha) * p @ g_f)


@pytest.mark.parametrize("options", [
    {}, {"alpha": 0.0}, {"groups": 1}, {"groups": 12}, {"beta2": 0.0}, {"eps": 1e-3}, {"max_norm": 0.5}, {"clip": 1.0},
    {"momentum": 0.5},
], ids=str)  # fmt: skip
def test_the_step_is_that_of_the_equation(options):
    c = Geometric(**{**SIZES, **options})
    follow(c, Dense(c), tolerance=1e-7)


def test_the_update_changes_no_protected_loss_to_first_order():
    process = begin(Geometric(**SIZES, alpha=0.0))
    process.step()  # so that v is an average
    found = torch.cat([g.flatten() for g in process.direction(1, {})])
    g = each_gradient(process.model, *retain_batch(process.data, 1, 12))
    u = torch.stack([part.mean(0) for part in g.tensor_split(3)])
    assert (u @ found).abs().max() < 1e-9 * u.norm() * found.norm()
    plain = torch.cat([h.flatten() for h in process.metric(process.second, 2)]) * clipped_gradient(
        process.model, *forget_batch(process.data, 1, 8), 3.0)  # fmt: skip
    assert (u @ plain).abs().max() > 1e-3 * u.norm() * plain.norm()  # there was something to remove
    assert found @ plain < 0


def test_a_step_for_which_memory_does_not_suffice_is_none(monkeypatch):
    runs = [begin(Geometric(**SIZES)) for _ in range(2)]
    for run in runs:
        run.step()
    with monkeypatch.context() as patch:
        patch.setattr("entangle_fast.ops.step_project", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError))
        with pytest.raises(torch.OutOfMemoryError):
            runs[0].step()
    for run in runs:
        run.step()
    assert all(torch.equal(a, b) for a, b in zip(runs[0].state().values(), runs[1].state().values()))
    assert all(torch.equal(a, b) for a, b in zip(runs[0].params, runs[1].params))


def test_resume(tmp_path):
    whole, again = resumes_to_the_bit(Geometric(**SIZES), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole.second, again.second))


@pytest.mark.parametrize("change, message", [
    ({"groups": 0}, "groups: got 0; needs an integer from 1 to retain_batch = 256"), ({"groups": 300}, "groups: got 300"),
    ({"beta2": 1.0}, "beta2: got 1.0"), ({"eps": 0.0}, "eps: got 0.0"), ({"alpha": 2.0}, "alpha: got 2.0"),
    ({"retain_batch": 1}, "retain_batch: got 1"),
])  # fmt: skip
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        Geometric(**change)
