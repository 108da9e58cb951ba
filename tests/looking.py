"""What step_lookahead must do with a capacity, on every backend."""

import torch

ALPHA = 0.5
EDGES = [0.0, -0.0, 1.0, -1.0, 1e-3, 1e30, -1e30, 1e-42, -1e-45, 6e-8, 1.17e-38, 3e38, float("inf"), -float("inf"), float("nan")]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x):
    return x.contiguous().view(BITS[x.element_size()])


def some(dtypes, size):
    """(params, grads): every pair of edges, an empty tensor, a 0-d one, and ``size`` elements of which each 97th is small."""
    edge, (first, second) = torch.tensor(EDGES, dtype=torch.float64), dtypes
    (theta, x), (g, y) = ((torch.randn(size, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)) for _ in range(2))
    theta[5::97] *= 1e-4
    params = [theta, edge.repeat_interleave(len(edge)), torch.zeros(0, 3), torch.tensor(1e-4, dtype=torch.float64), x]
    grads = [g, edge.repeat(len(edge)), torch.zeros(0, 3), torch.tensor(1 / 3, dtype=torch.float64), y]
    kinds = [first, second, first, second, first]
    return [p.to(k) for p, k in zip(params, kinds)], [g.to(k) for g, k in zip(grads, kinds)]


def check_every_capacity(look, undo, dtypes, size=300):
    """``look`` and ``undo`` as in the schema, undone to the bit; a NaN that had a slot, as a double, comes back as a NaN.

    dtypes: two, for the tensors in turn.
    """
    params, grads = some(dtypes, size)
    free = [p.clone() for p in params]
    ulps, index, value = look(free, grads, ALPHA, None)
    q = len(index)
    assert q > 100 and {0, 1, 3} <= set(index[:, 0].tolist()) and not any((u == -128).any() for u in ulps)
    for capacity in (0, 1, q // 2, q - 1, q, q + 3):
        ahead, taken = [p.clone() for p in params], min(capacity, q)
        u, i, v = look(ahead, grads, ALPHA, capacity)
        assert (i.shape, i.dtype, v.shape, v.dtype) == ((capacity, 2), torch.int64, (capacity,), torch.float64)
        assert torch.equal(i[:taken], index[:taken]) and (i[taken:] == -1).all() and (v[taken:] == 0).all()
        torch.testing.assert_close(v[:taken], value[:taken], rtol=0, atol=0, equal_nan=True)
        assert sum(int((x == -128).sum()) for x in u) == q - taken
        unmoved = []
        for k, p in enumerate(params):
            stays = torch.zeros(p.numel(), dtype=torch.bool)
            stays[index[taken:][index[taken:, 0] == k, 1]] = True
            stays = stays.view(p.shape)
            unmoved.append(stays)
            assert u[k].dtype == torch.int8 and torch.equal(u[k], torch.where(stays, -128, ulps[k]))
            assert torch.equal(bits(ahead[k])[stays], bits(p)[stays])
            torch.testing.assert_close(ahead[k][~stays], free[k][~stays], rtol=0, atol=0, equal_nan=True)
        undo(ahead, grads, u, i, v, ALPHA)
        for k, (p, stays) in enumerate(zip(params, unmoved)):
            wrong = (bits(ahead[k]) != bits(p)) & (stays | ~(p.isnan() & ahead[k].isnan()))
            assert not wrong.any(), (capacity, k, p[wrong][:4], ahead[k][wrong][:4])
