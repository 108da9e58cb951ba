"""What every backend's step_project makes of directions, also of those that are too short or not finite."""

import torch

from entangle_fast import reference

SIZES = [(3,), (5, 7), (0,), (301,)]
P = len(SIZES)
TOLERANCE = 2.0**-40


def lists(count, dtype):
    return [torch.randn(*s).to(dtype) for _ in range(count) for s in SIZES]


def check_solution(op, args, case, rtol, atol):
    """Gram and coefficients as the reference's; of "singular" the directions that lie in the span of others count for none."""
    (gram, coef), (wanted, solved) = op(*args), reference.step_project(*args)
    torch.testing.assert_close(gram, wanted, rtol=rtol, atol=atol)
    scale = gram.diagonal()[: len(coef)].sqrt()
    torch.testing.assert_close(coef * scale, solved * scale, rtol=1e-9, atol=1e-9)
    assert case != "singular" or torch.equal(coef == 0, torch.tensor([False, False, False, True, False, False]))


def check_too_short_is_left_out(op, k, ridge, held, dtype=torch.float32):
    flat = lists(k + 1 + held, dtype)
    flat[:P] = [x * 1e-35 for x in flat[:P]]
    runs = (op, 0), (reference.step_project, 0), (op, P)
    coef, wanted, without = (f(flat[at : P * k], flat[P * k : -P], flat[-P:], 0.9, ridge, TOLERANCE)[1] for f, at in runs)
    assert coef[0] == 0
    torch.testing.assert_close(coef, wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(coef[1:], without, rtol=1e-12, atol=1e-12)


def check_not_finite_is_not_dropped(op, k, ridge, bad, dtype=torch.float32):
    for spoilt in (0, P * (k - 1), P * k, P * (k + 1)):  # the first and the last direction, momentum, gradient
        flat = lists(k + 2, dtype)
        flat[:P] = [x * 0 for x in flat[:P]]
        flat[spoilt][1] = bad
        for f in (op, reference.step_project):
            assert f(flat[: P * k], flat[P * k : -P], flat[-P:], 0.9, ridge, TOLERANCE)[1].isnan().all()


def check_a_ridge_below_all_counts_for_none(op, ridge):
    x, y = torch.randn(300), torch.randn(300)
    args = ([x, y, x.clone()], [], [y + 1], 0.0)
    assert torch.equal(op(*args, ridge, TOLERANCE)[1], op(*args, 0.0, TOLERANCE)[1])
