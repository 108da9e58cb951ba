"""Steps without state: decay, noise, look-ahead; and that no step makes the host wait."""

import pytest
import torch
from optimising import F64, flat, tensors
from torch.utils._python_dispatch import TorchDispatchMode

from entangle_fast import ops
from entangle_fast.optim import ProjectedAdamW, ProjectedMomentum, decay_noise_step, lookahead
from entangle_fast.reference import philox


class NoHostSync(TorchDispatchMode):
    """Refuses what reads a value on the host: .item(), float(), bool(), nonzero."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal"), f"{func} makes the host wait"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("project", ["momentum", "gradient"])
def test_a_step_never_makes_the_host_wait(project, monkeypatch):
    monkeypatch.setenv("ENTANGLE_FAST_BACKEND", "reference")
    params = tensors(0, torch.float32)
    sgd, adamw = ProjectedMomentum(params, lr=0.1, project=project), ProjectedAdamW(params, noise=0.1)
    g, a, b = (tensors(i, torch.float32) for i in (1, 2, 3))
    with NoHostSync():
        sgd.step(g, [a, b])
        sgd.step(g, [a])
        decay_noise_step(params, g, lr=0.1, weight_decay=0.1, noise=0.1, seed=1, counter=adamw.count)
        adamw.step(g, [a, b])
        adamw.step(g)
        with lookahead(params, g, 0.3, capacity=5):
            pass
        with pytest.raises(AssertionError, match="makes the host wait"), lookahead(params, g, 0.3):
            pass
        with pytest.raises(AssertionError, match="makes the host wait"):
            float(params[0].sum())


def test_decay_and_noise():
    params, grads = tensors(0), tensors(1)
    theta, g = flat(params), flat(grads)
    decay_noise_step(params, grads, lr=0.1, weight_decay=0.3, noise=0.5, seed=7, offset=2)
    xi = philox.normal(23, 7, 2, 0, torch.device("cpu")).double()
    torch.testing.assert_close(flat(params), theta * (1 - 0.03) - 0.1 * g + 0.5 * xi, rtol=1e-6, atol=1e-6)
    again = tensors(0)
    decay_noise_step(again, grads, lr=0.1, weight_decay=0.3, noise=0.5, seed=7, offset=2)
    assert torch.equal(flat(again), flat(params))
    decay_noise_step(again, grads, lr=0.0, noise=0.5, seed=7, offset=3)
    assert not torch.equal(flat(again), flat(params))
    before = flat(again)
    for missing in ({}, {"seed": 7}, {"offset": 3}, {"counter": torch.tensor(3)}):
        with pytest.raises(ValueError, match="seed, offset: got .* with noise=0.5"):
            decay_noise_step(again, grads, lr=0.1, noise=0.5, **missing)
    assert torch.equal(flat(again), before)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [1e-3, 0.7, 1e4])
def test_lookahead_is_undone_to_the_bit(dtype, alpha):
    params, grads = tensors(0, dtype), tensors(1, dtype)
    params[1][0], params[1][1] = 0.0, -0.0
    params[0][0, 0] = torch.finfo(dtype).tiny
    before = [p.clone() for p in params]
    with lookahead(params, grads, alpha):
        torch.testing.assert_close(flat(params), flat(before) - alpha * flat(grads), rtol=1e-2, atol=1e-2 * alpha)
    assert [p.view(torch.uint8).tolist() for p in params] == [p.view(torch.uint8).tolist() for p in before]


def test_lookahead_with_a_capacity_moves_all_but_what_has_no_slot():
    params, grads = [torch.cat([torch.full((4,), 1e-6), torch.ones(3)])], [torch.full((7,), 1 / 3)]
    before = params[0].clone()
    for capacity, left in ((0, 4), (3, 1), (4, 0), (9, 0)):
        with lookahead(params, grads, 0.7, capacity=capacity) as spare:
            moved = params[0] != before
        assert spare.shape == () and bool(spare) == (capacity > 4)
        assert moved.tolist() == [k < capacity for k in range(4)] + [True] * 3 and torch.equal(params[0], before)
        ulps, _, _ = residue = ops.step_lookahead(params, grads, 0.7, capacity)
        assert sum((u == -128).sum() for u in ulps) == left
        ops.step_lookahead_undo(params, grads, residue, 0.7)
    with lookahead(params, grads, 0.7) as spare:
        assert spare is None


def test_lookahead_is_undone_after_an_error():
    params, grads = tensors(0, torch.float32), tensors(1, torch.float32)
    before = flat(params)
    with pytest.raises(RuntimeError, match="inside"), lookahead(params, grads, 0.3):
        assert not torch.equal(flat(params), before)
        raise RuntimeError("inside")
    assert torch.equal(flat(params), before)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_only_real_floats_are_stepped(dtype):
    p = [torch.zeros(4)]
    with pytest.raises(ValueError, match="floating-point"):
        ops.step_update(p, None, [torch.ones(4, dtype=dtype)], [], torch.zeros(0), lr=1.0)
    with pytest.raises(ValueError, match="floating-point"):
        ops.step_gram([[torch.ones(4, dtype=dtype)]])
    assert not p[0].any()


def test_operations_of_several_devices_are_refused():
    both = [torch.zeros(2), torch.zeros(2, device="meta")]
    for call in (lambda: ops.step_gram([both]), lambda: ops.step_project([both], None, both), lambda: decay_noise_step(both, both, lr=1.0)):
        with pytest.raises(ValueError, match="on cpu and meta; needs one device"):
            call()


def test_steps_without_state_take_generators():
    net, before = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    before.load_state_dict(net.state_dict())
    with lookahead(net.parameters(), (torch.ones_like(p) for p in before.parameters()), 0.5):
        torch.testing.assert_close(net.bias, before.bias - 0.5)
    torch.testing.assert_close(list(net.parameters()), list(before.parameters()), rtol=0, atol=0)
    decay_noise_step(net.parameters(), (torch.ones_like(p) for p in before.parameters()), lr=0.5)
    torch.testing.assert_close(net.bias, before.bias - 0.5)
