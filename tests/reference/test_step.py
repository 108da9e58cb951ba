"""The step over many tensors: its formulas, and a look-ahead that is undone to the last bit."""

import pytest
import torch
from looking import check_every_capacity

from entangle_fast import ops, reference, weights
from entangle_fast.reference import philox


def tensors(generator, dtype=torch.float64):
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in ((3, 4), (5,), (), (0, 2))]


def test_gram_of_directions(generator):
    directions = [tensors(generator, torch.float32) for _ in range(3)]
    flat = torch.stack([torch.cat([x.flatten() for x in d]) for d in directions]).double()
    torch.testing.assert_close(ops.step_gram(directions), flat @ flat.T)


@pytest.mark.parametrize("beta", [None, 0.9])
def test_update_is_its_formula(generator, beta):
    params, grads, d1, d2, v = (tensors(generator) for _ in range(5))
    coef = torch.tensor([0.5, -2.0], dtype=torch.float64)
    want_v = [(beta or 0) * m + g - 0.5 * a + 2 * b for m, g, a, b in zip(v, grads, d1, d2)]
    xi = philox.normal(18, 3, 1).double().split([12, 5, 1, 0])
    want = [(1 - 0.1 * 0.01) * p - 0.1 * m + 0.3 * e.view(p.shape) for p, m, e in zip(params, want_v, xi)]
    ops.step_update(params, v if beta else None, grads, [d1, d2], coef, lr=0.1, beta=beta or 0.0, weight_decay=0.01,
                    noise=0.3, seed=3, offset=1)  # fmt: skip
    for got, p in zip(params, want):
        torch.testing.assert_close(got, p)
    for got, m in zip(v, want_v) if beta else ():
        torch.testing.assert_close(got, m)


@pytest.mark.parametrize("ridge", [0.0, 0.7])
@pytest.mark.parametrize("k", [0, 1, 2, 3, 6])
@pytest.mark.parametrize("held", [True, False])
def test_projection_is_the_dense_one(generator, held, k, ridge):
    lists = [tensors(generator) for _ in range(k + 2)]
    if k > 3:
        lists[3] = [2 * a - b for a, b in zip(lists[0], lists[1])]  # in the span of others
    v, g = lists[k], lists[k + 1]
    gram, coef = ops.step_project(lists[:k], v if held else None, g, beta=0.9, ridge=ridge)
    every = torch.stack([torch.cat([x.flatten() for x in d]) for d in (*lists[:k], *([v] if held else []), g)])
    moved = every[-1] + (0.9 * every[k] if held else 0)
    d = every[:k]
    torch.testing.assert_close(gram, every @ every.T)
    if ridge:
        want = d.T @ torch.linalg.solve(d @ d.T + ridge * torch.eye(k, dtype=d.dtype), d @ moved)
    else:
        want = d.T @ (torch.linalg.pinv(d.T, rtol=1e-7) @ moved) if k else torch.zeros_like(moved)
    torch.testing.assert_close(d.T @ coef, want)
    inner = gram[:k, -1] + (0.9 * gram[:k, k] if held else 0)
    torch.testing.assert_close(coef, weights.project_onto(gram[:k, :k], inner, ridge=ridge))


@pytest.mark.parametrize("step", [torch.int64, torch.float64])
def test_adamw_is_its_formula(generator, step):
    params, grads, d1, d2, m, u = (tensors(generator) for _ in range(6))
    u = [x.square() for x in u]
    coef = torch.tensor([0.5, -2.0], dtype=torch.float64)
    xi = philox.normal(18, 3, 8).double().split([12, 5, 1, 0])
    want = []
    for p, g, a, b, x, y, e in zip(params, grads, d1, d2, m, u, xi):
        g = g - 0.5 * a + 2 * b
        x, y = 0.8 * x + 0.2 * g, 0.95 * y + 0.05 * g * g
        size = 0.1 * (x / (1 - 0.8**5)) / ((y / (1 - 0.95**5)).sqrt() + 1e-3)
        want.append(((1 - 0.1 * 0.01) * p - size + 0.3 * e.view(p.shape), x, y))
    ops.step_adamw(params, m, u, grads, [d1, d2], coef, torch.tensor(5, dtype=step), lr=0.1, betas=(0.8, 0.95), eps=1e-3,
                   weight_decay=0.01, noise=0.3, seed=3, offset=1, counter=torch.tensor(7))  # fmt: skip
    for got, expected in zip(zip(params, m, u), want):
        for x, y in zip(got, expected):
            torch.testing.assert_close(x, y)


VALUES = [0.0, -0.0, 1.0, -1.0, 1e-3, 1e30, -1e30, 1e-42, -1e-45, 65504.0, 3e-5, 6e-8, 1.17e-38, 3e38]


@pytest.mark.parametrize("alpha", [0.0, 1e-30, 1e-3, 1.0, -0.5, 1e10, 1e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_lookahead_is_undone_to_the_bit(generator, dtype, alpha):
    if dtype == torch.float16 and abs(alpha) > 65504:
        pytest.skip("torch itself refuses a factor that float16 cannot hold")
    edge = torch.tensor(VALUES, dtype=torch.float64).to(dtype)
    theta = edge.repeat_interleave(len(edge))
    params = [theta.clone(), torch.randn(300, generator=generator).to(dtype), torch.zeros(5, dtype=dtype)]
    grads = [edge.repeat(len(edge)), torch.randn(300, generator=generator).to(dtype) * 100, torch.ones(5, dtype=dtype)]
    before = [p.clone() for p in params]
    residue = ops.step_lookahead(params, grads, alpha)
    if alpha == 1.0:
        torch.testing.assert_close(params[1], before[1] - grads[1])
    ops.step_lookahead_undo(params, grads, residue, alpha)
    for p, q in zip(params, before):
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[p.element_size()]
        same = p.view(bits) == q.view(bits)
        assert same.all(), (q[~same][:4], p[~same][:4])


def test_lookahead_residue_is_small(generator):
    params = [torch.randn(1000, generator=generator)]
    ulps, index, value = ops.step_lookahead(params, [torch.randn(1000, generator=generator)], 1e-3)
    assert ulps[0].dtype == torch.int8 and len(index) == len(value) < 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_lookahead_with_every_capacity(dtype):
    check_every_capacity(reference.step_lookahead, reference.step_lookahead_undo, (dtype, dtype))
    check_every_capacity(reference.step_lookahead, reference.step_lookahead_undo, (dtype, torch.float64))
