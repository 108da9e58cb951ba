"""The step over many tensors: its formula, and a look-ahead that is undone to the last bit."""

import pytest
import torch

from entangle_fast import ops
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
