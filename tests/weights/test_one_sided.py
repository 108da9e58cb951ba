"""PCGrad and UPGrad against plain implementations on explicit gradients."""

import itertools

import pytest
import torch

from entangle_fast import weights

F64 = torch.float64


def gradients(m, d=6, seed=0):
    """m gradients that conflict."""
    g = torch.randn(m, d, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return g - 1.2 * g.mean(0)


def plain_pcgrad(g, orders):
    total = torch.zeros(g.shape[1], dtype=F64)
    for i, order in enumerate(orders):
        v = g[i].clone()
        for j in order:
            if j != i and v @ g[j] < 0:
                v -= (v @ g[j]) / (g[j] @ g[j]) * g[j]
        total += v
    return total


@pytest.mark.parametrize("m", [1, 2, 3, 6])
def test_pcgrad(m):
    g = gradients(m, seed=m)
    torch.testing.assert_close(weights.pcgrad(g @ g.T) @ g, plain_pcgrad(g, [range(m)] * m))
    drawn = torch.Generator().manual_seed(5)
    orders = [torch.randperm(m, generator=drawn).tolist() for _ in range(m)]
    found = weights.pcgrad(g @ g.T, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(found @ g, plain_pcgrad(g, orders))


def test_pcgrad_draws_on_the_generators_device():
    k = (g := gradients(6)) @ g.T
    wanted = weights.pcgrad(k, generator=torch.Generator().manual_seed(5))
    with torch.device("meta"):  # as where everything is made on a GPU by default, and neither the Gram nor the generator is
        found = weights.pcgrad(k, generator=torch.Generator("cpu").manual_seed(5))
    assert torch.equal(found, wanted)


def test_pcgrad_of_two_conflicts_with_neither():
    g = gradients(2)
    assert (g @ (weights.pcgrad(g @ g.T) @ g) >= -1e-12).all()


def test_no_conflict_no_change():
    k = torch.eye(3, dtype=F64) + 0.1
    assert weights.pcgrad(k).tolist() == [1, 1, 1]
    torch.testing.assert_close(weights.upgrad(k), torch.full((3,), 1 / 3, dtype=F64), rtol=1e-6, atol=0)


def brute_force(k, floor):
    """min ½ vᵀKv, v ≥ floor: the best over all active sets."""
    m, best = len(k), None
    for active in itertools.product((False, True), repeat=m):
        a = torch.tensor(active)
        v = floor.clone()
        if (~a).any():
            v[~a] = torch.linalg.solve(k[~a][:, ~a], -k[~a][:, a] @ floor[a])
        if (v >= floor - 1e-12).all():
            value = v @ k @ v
            if best is None or value < best[0]:
                best = value, v
    return best[1]


@pytest.mark.parametrize("m", [1, 2, 3, 5])
@pytest.mark.parametrize("preference", [None, "uneven"])
def test_upgrad_solves_its_programmes(m, preference):
    g = gradients(m, d=8, seed=10 + m)
    k = g @ g.T
    u = torch.full((m,), 1 / m, dtype=F64) if preference is None else torch.arange(1.0, m + 1, dtype=F64)
    found = weights.upgrad(k, preference=None if preference is None else u)
    ridged = k + 1e-10 * k.diagonal().max() * torch.eye(m, dtype=F64)
    parts = [brute_force(ridged, u[i] * torch.eye(m, dtype=F64)[i]) for i in range(m)]
    torch.testing.assert_close(found, torch.stack(parts).sum(0), rtol=1e-6, atol=1e-7)
    for i, v in enumerate(parts):  # the conditions of Karush, Kuhn and Tucker
        slope, slack = ridged @ v, v - u[i] * torch.eye(m, dtype=F64)[i]
        assert (slope > -1e-9).all() and (slack > -1e-12).all() and (slope * slack).abs().max() < 1e-9
    direction = found @ g
    assert (g @ direction >= -1e-5 * g.norm(dim=1) * direction.norm()).all()  # conflicts with no objective


def test_upgrad_of_opposed_and_of_zero_gradients_is_finite():
    g = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=F64)
    assert (weights.upgrad(g @ g.T) @ g).norm() < 1e-6
    for k in (torch.zeros(2, 2), torch.diag(torch.tensor([1.0, 0.0]))):
        assert torch.isfinite(weights.upgrad(k)).all() and torch.isfinite(weights.pcgrad(k)).all()
    assert weights.upgrad(torch.zeros(0, 0)).shape == weights.pcgrad(torch.zeros(0, 0)).shape == (0,)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_dropped(bad):
    k = (g := gradients(3)) @ g.T
    k[2, 2] = bad
    assert weights.pcgrad(k).isnan().all() and weights.upgrad(k).isnan().all()


def test_upgrad_without_a_ridge_bears_a_zero_gradient():
    assert weights.upgrad(torch.diag(torch.tensor([1.0, 0.0])), ridge=0.0).tolist() == [0.5, 0.5]


def test_refusals():
    with pytest.raises(ValueError, match="preference: shape .3,.; needs .2,."):
        weights.upgrad(torch.eye(2), preference=torch.ones(3))
    for f in (weights.pcgrad, weights.upgrad):
        with pytest.raises(ValueError, match="gram: shape .2, 3.; needs .m, m."):
            f(torch.zeros(2, 3))
    for wrong in (5, True, "cpu"):
        with pytest.raises(TypeError, match=f"generator: got {'True' if wrong is True else type(wrong).__name__}; needs a torch.Generator"):
            weights.pcgrad(torch.eye(2), generator=wrong)
