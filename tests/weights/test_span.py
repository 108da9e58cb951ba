"""Small solves: against pinv, and against dense projections with explicit per-sample gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import entangle_fast as ef
from entangle_fast import weights
from entangle_fast.reference.solve import eigh

F64 = torch.float64


def rows(k, d=20, seed=0, rank=None, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(k, d, generator=generator, dtype=F64)
    if rank is not None:
        g = torch.randn(k, rank, generator=generator, dtype=F64) @ g[:rank]
    return g.to(dtype)


@pytest.mark.parametrize("k", [0, 1, 2, 3, 17])
@pytest.mark.parametrize("columns", [None, 3])
def test_solve_solves(k, columns):
    g = rows(k)
    rhs = rows(k, columns or 1, seed=1) if columns else rows(k, 1, seed=1)[:, 0]
    for ridge in (0.0, 0.3):
        c = weights.solve(g @ g.T, rhs, ridge=ridge)
        torch.testing.assert_close((g @ g.T + ridge * torch.eye(k, dtype=F64)) @ c, rhs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("k, rank", [(1, 0), (2, 0), (2, 1), (5, 2), (12, 11)])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_a_rank_deficient_gram_gets_the_least_norm_solution(k, rank, dtype):
    g = rows(k, rank=rank)
    gram = (g @ g.T).to(dtype)
    rhs = g @ rows(1, seed=2)[0]
    c = weights.solve(gram, rhs)
    tolerance = dict(rtol=1e-8, atol=1e-8) if dtype == F64 else dict(rtol=1e-3, atol=1e-3)
    lengths = g.norm(dim=1)
    unit = torch.where(lengths > 0, 1 / lengths, 0)
    scaled = g * unit[:, None]
    torch.testing.assert_close(c, unit * (torch.linalg.pinv(scaled @ scaled.T, rtol=1e-9) @ (unit * rhs)), **tolerance)
    torch.testing.assert_close(g.T @ c, torch.linalg.pinv(g, rtol=1e-9) @ rhs, **tolerance)
    assert torch.isfinite(weights.solve(gram, rhs, ridge=1e-8)).all()


@pytest.mark.parametrize("k", [2, 8])
def test_a_short_gradient_is_protected_beside_long_ones(k):
    g = rows(k)
    g[-1] *= 1e-5  # the mean of a fitted set beside samples at a high loss, in float32
    c = weights.solve((g @ g.T).float(), g @ (v := rows(1, seed=2)[0]), rcond=k * 1.2e-7)
    left = v - g.T @ c
    assert abs(left @ g[-1]) < 1e-3 * left.norm() * g[-1].norm()


def test_a_zero_gram_gives_zeros():
    for k in (1, 2, 4):
        assert (weights.solve(torch.zeros(k, k), torch.zeros(k)) == 0).all()
        assert (weights.solve(torch.zeros(k, k), torch.ones(k)) == 0).all()
        assert torch.isfinite(weights.solve(torch.zeros(k, k), torch.ones(k), ridge=1e-8)).all()


@pytest.mark.parametrize("scale", [1e-40, 1e-12, 1.0, 1e12])
def test_solve_does_not_care_for_units(scale):
    g = rows(2)
    torch.testing.assert_close(scale * weights.solve(scale * (g @ g.T), g[:, 0]), weights.solve(g @ g.T, g[:, 0]))


@pytest.mark.parametrize("b", [0.0, 1.0, -1.0, 0.5, 0.9999999])
@pytest.mark.parametrize("c", [0.0, 1.0, 1e-10, 1e10])
def test_two_by_two_is_what_a_solver_says(b, c):
    gram = torch.tensor([[1.0, b * c**0.5], [b * c**0.5, c]], dtype=F64)
    values, vectors = eigh(gram)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(gram), rtol=1e-12, atol=1e-15 * max(1, c))
    torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.T, gram, rtol=1e-12, atol=1e-14 * max(1, c))
    assert torch.isfinite(weights.solve(gram, gram[:, 0])).all()


def test_a_gradient_that_is_not_finite_is_not_dropped():
    for k in (1, 2, 3, 8):
        gram, rhs = (g := rows(k)) @ g.T, g @ rows(1, seed=2)[0]
        gram[-1, -1] = torch.nan
        for ridge in (0.0, 0.5):
            assert weights.solve(gram, rhs, ridge=ridge).isnan().all()


@pytest.mark.parametrize("ridge", [5e-324, 1e-310, 1e-61])
def test_a_ridge_too_small_to_count_is_none(ridge):
    g = rows(4, rank=2)
    rhs = g @ rows(1, seed=2)[0]
    assert torch.equal(weights.solve(g @ g.T, rhs, ridge=ridge), weights.solve(g @ g.T, rhs))
    assert (weights.solve(torch.zeros(2, 2), torch.ones(2), ridge=ridge) == 0).all()
    share, w = weights.damped(g @ g.T, rhs, damping=1e-62)
    assert share == 1 / 1e-62 and w.isfinite().all()


@pytest.mark.parametrize("ridge", [-1.0, float("nan"), float("inf"), -1e-310])
def test_a_ridge_out_of_range_is_refused(ridge):
    for call in (weights.solve, weights.project_onto, weights.project_away):
        with pytest.raises(ValueError, match=f"^ridge: got {ridge}; needs a finite number >= 0"):
            call(torch.eye(2), torch.ones(2), ridge=ridge)
    with pytest.raises(ValueError, match=f"^ridge: got {ridge}"):
        weights.upgrad(torch.eye(2), ridge=ridge)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_a_gram_of_other_numbers_is_refused(dtype):
    gram = torch.eye(2).to(dtype)
    for call in (lambda: weights.solve(gram, torch.ones(2)), lambda: weights.damped(gram, torch.ones(2), damping=1.0),
                 lambda: weights.pcgrad(gram), lambda: weights.upgrad(gram)):  # fmt: skip
        with pytest.raises(ValueError, match=f"^gram: dtype {dtype} is not a real floating-point one; convert"):
            call()


def test_complex_sides_are_refused():
    eye, z = torch.eye(2), torch.ones(2, dtype=torch.complex64)
    bad = {
        "rhs": lambda: weights.solve(eye, z),
        "u": lambda: weights.project_onto(eye, eye, z),
        "cross": lambda: weights.project_onto(eye, z),
        "preference": lambda: weights.upgrad(eye, preference=z),
    }
    for name, call in bad.items():
        with pytest.raises(ValueError, match=f"^{name}: dtype torch.complex64 is complex"):
            call()
    assert weights.solve(eye, torch.tensor([2, 3])).tolist() == [2, 3]  # integers lose nothing


def test_refusals():
    with pytest.raises(ValueError, match="gram: shape .2, 3.; needs a square Gram"):
        weights.solve(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ValueError, match="rhs: shape .3,.; needs 2 rows"):
        weights.solve(torch.zeros(2, 2), torch.zeros(3))
    with pytest.raises(ValueError, match="ridge: got -1"):
        weights.solve(torch.zeros(2, 2), torch.zeros(2), ridge=-1.0)
    with pytest.raises(ValueError, match="u: shape .3,.; needs one weight for each column"):
        weights.project_away(torch.zeros(2, 2), torch.zeros(2, 4), torch.zeros(3))
    for damping in (0.0, -1.0, float("nan"), float("inf"), 1e-310):
        with pytest.raises(ValueError, match=f"damping: got {damping}"):
            weights.damped(torch.eye(2), torch.ones(2), damping=damping)
    for rcond in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=f"rcond: got {rcond}"):
            weights.solve(torch.eye(2), torch.ones(2), rcond=rcond)


@pytest.fixture(scope="module")
def captured():
    """Tapes of forget and retain samples of a small CNN, and their explicit per-sample gradients (n, P)."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 5)).double()
    tapes, dense = [], []
    for n in (7, 6):
        x, y = torch.randn(n, 1, 8, 8, dtype=F64), torch.randint(0, 5, (n,))
        if n == 6:
            x[5], y[5] = x[4], y[4]  # the same retain sample twice: a rank-deficient span
        with ef.capture(model) as tape:
            tape.backward(F.cross_entropy(model(x), y, reduction="none"))
        tapes.append(tape)
        dense.append(torch.cat([g.flatten(1) for g in tape.per_sample().values()], 1))
    return (*tapes, *dense)


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


@pytest.mark.parametrize("given", ["samples", "inner products"])
def test_projection_with_per_sample_gradients(captured, given):
    forget, retain, g_f, g_r = captured
    u = torch.linspace(-1, 2, 7, dtype=F64)
    v = u @ g_f
    basis = torch.linalg.svd(g_r, full_matrices=False)
    basis = basis.Vh[basis.S > 1e-10 * basis.S[0]]
    onto = basis.T @ (basis @ v)
    cross = (retain.gram(forget), u) if given == "samples" else ((g_r @ v),)
    c = weights.project_onto(retain.gram(), *cross)
    torch.testing.assert_close(flat(retain.combine(c)), onto, rtol=1e-7, atol=1e-9)
    away = weights.project_away(retain.gram(), *cross)
    assert torch.equal(away, -c)
    rest = v + flat(retain.combine(away))
    torch.testing.assert_close(rest, v - onto, rtol=1e-7, atol=1e-9)
    assert (g_r @ rest).abs().max() < 1e-8 * g_r.norm() * v.norm()


def test_projection_of_two_means(captured):
    forget, retain, g_f, g_r = captured
    u = torch.full((7,), 1 / 7, dtype=F64)
    pick = torch.zeros(2, 6, dtype=F64)
    pick[0, :3], pick[1, 3:] = 1 / 3, 1 / 3
    gram, cross = pick @ retain.gram() @ pick.T, pick @ retain.gram(forget)
    means = pick @ g_r
    for ridge in (0.0, 1e-3):
        w = weights.project_away(gram, cross, u, ridge=ridge) @ pick
        inverse = torch.linalg.inv(means @ means.T + ridge * torch.eye(2, dtype=F64))
        expected = u @ g_f - means.T @ (inverse @ (means @ (u @ g_f)))
        torch.testing.assert_close(u @ g_f + flat(retain.combine(w)), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_damped_is_the_dense_newton_direction(captured, damping):
    forget, retain, g_f, g_r = captured
    u = torch.linspace(-1, 2, 7, dtype=F64)
    v = u @ g_f
    expected = torch.linalg.solve(damping * torch.eye(len(v), dtype=F64) + g_r.T @ g_r / 6, v)
    share, w = weights.damped(retain.gram(), retain.gram(forget), u, damping=damping)
    torch.testing.assert_close(share * v + flat(retain.combine(w)), expected, rtol=1e-7, atol=1e-9)
