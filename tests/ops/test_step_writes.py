"""What a step writes: seen by autograd, refused before anything is changed where an update would be lost."""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from entangle_fast import ops
from entangle_fast.optim import ProjectedMomentum, decay_noise_step, lookahead

NONE = torch.zeros(0)


def r(*shape):
    return torch.randn(*shape)


def update(params, momentum=None):
    ops.step_update(params, momentum, [torch.ones_like(p) for p in params], [], NONE, lr=0.5, beta=0.5)


def adamw(params, exp_avg=None):
    m, u = ([torch.zeros(p.shape) for p in params] for _ in range(2))
    ops.step_adamw(params, exp_avg or m, u, [torch.ones_like(p) for p in params], [], NONE, torch.tensor(1), lr=0.5)


def ahead(params):
    ops.step_lookahead(params, [torch.ones_like(p) for p in params], 0.5)


STEPS = {"update": update, "adamw": adamw, "lookahead": ahead}


@pytest.fixture(params=["", "reference"], ids=["default", "reference"])
def backend(request, monkeypatch):
    monkeypatch.setenv("ENTANGLE_FAST_BACKEND", request.param)


@pytest.mark.parametrize("name", STEPS)
def test_a_saved_parameter_that_was_stepped_is_noticed(backend, name):
    w, x = r(3, 3).requires_grad_(), r(3, 3).requires_grad_()
    loss = (w @ x).sum()
    before = w.detach().clone()
    STEPS[name]([w])  # as a step, never part of the graph, whether the caller turned gradients off or not
    assert w.is_leaf and w.grad_fn is None and not torch.equal(w, before)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_every_written_list_is_counted(backend):
    lists = [[r(3), r(2, 2)] for _ in range(3)]
    p, m, u = lists
    g, read = [r(3), r(2, 2)], [r(3), r(2, 2)]
    before = [x._version for xs in lists for x in xs]
    ops.step_update(p, m, g, [read], torch.zeros(1), lr=0.1)
    ops.step_adamw(p, m, [x.square_() for x in u], g, [read], torch.zeros(1), torch.tensor(1), lr=0.1)
    assert all(x._version > v for x, v in zip([x for xs in lists for x in xs], before))
    version = [x._version for x in p]
    ops.step_lookahead_undo(p, g, ops.step_lookahead(p, g, 0.1), 0.1)
    assert all(x._version >= v + 2 for x, v in zip(p, version))
    ops.step_project([read], m, g)
    ops.step_gram([read, g])
    assert not any(x._version for x in (*g, *read))


def test_inference_mode_is_no_obstacle(backend):
    with torch.inference_mode():
        p = [r(3)]
        before = p[0].clone()
        update(p)
        torch.testing.assert_close(p[0], before - 0.5)


def twice():
    p = r(4, 4)
    flat = r(20)
    return {
        "the same": ([p, p], 0, 1),
        "beside others": ([r(2), p, r(3), p], 1, 3),
        "detached": ([p, p.detach()], 0, 1),
        "transposed": ([p, p.t()], 0, 1),
        "a part, by its start": ([p, r(3), p[:1]], 0, 2),
        "a part, from within": ([flat, r(3), flat[18:]], 0, 2),
        "neighbours": ([flat[:11], flat[10:]], 0, 1),
        "a transposed part": ([p, p[1:].t()], 0, 1),
        "behind one with gaps": ([flat[:12], flat[1::9], flat[11:]], 0, 2),
    }


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("case", twice())
def test_shared_memory_is_refused_by_both_places(step, case):
    params, i, j = twice()[case]
    before = [p.clone() for p in params]
    with pytest.raises(ValueError, match=rf"^params\[{j}\]: shares memory with params\[{i}\].*clone"):
        STEPS[step](params)
    assert all(torch.equal(p, q) for p, q in zip(params, before)) and not any(p._version for p in params)


def test_lists_that_share_memory_are_refused():
    p, v = [r(3), r(2)], [r(3), r(2)]
    with pytest.raises(ValueError, match=r"^momentum\[1\]: shares memory with params\[1\]"):
        update(p, [v[0], p[1]])
    with pytest.raises(ValueError, match=r"^momentum\[1\]: shares memory with momentum\[0\]"):
        update([r(3), r(3)], [v[0], v[0]])
    with pytest.raises(ValueError, match=r"^exp_avg\[0\]: shares memory with params\[0\]"):
        adamw(p, [p[0], r(2)])
    with pytest.raises(ValueError, match=r"^exp_avg_sq\[0\]: shares memory with exp_avg\[0\]"):
        ops.step_adamw(p[:1], v[:1], v[:1], [r(3)], [], NONE, torch.tensor(1), lr=0.1)


@pytest.mark.parametrize("capacity", [None, 2])
def test_a_lookahead_along_the_parameters_themselves_is_refused(capacity):
    """Its undo would read gradients that have moved."""
    p, q, flat = r(3), r(4, 4), r(20)
    for params, grads, i, j in (([q, p], [r(4, 4), p], 1, 1), ([p, q], [r(3), q.t()], 1, 1), ([p, flat[4:8]], [flat[5:8], r(4)], 0, 1)):
        before = [x.clone() for x in params]
        with pytest.raises(ValueError, match=rf"^grads\[{i}\]: shares memory with params\[{j}\].*clone"):
            ops.step_lookahead(params, grads, 0.1, capacity)
        assert all(map(torch.equal, params, before)) and not any(x._version for x in params)


def test_gradients_beside_the_parameters_serve_a_lookahead(backend):
    flat = r(20)
    params, grads, before = [flat[:5], flat[9:12], r(0)], [flat[5:9].sum().expand(5), flat[12:15], r(0)], flat.clone()
    residue = ops.step_lookahead(params, grads, 0.1)
    assert not torch.equal(flat, before) and torch.equal(flat[12:], before[12:])
    ops.step_lookahead_undo(params, grads, residue, 0.1)
    assert torch.equal(flat, before)


def test_what_shares_no_element_is_stepped(backend):
    flat, matrix = torch.zeros(20), torch.zeros(4, 6)
    params = [flat[:5], flat[5:20].view(3, 5).t(), matrix[:, :2], matrix[:, 2:], r(0), r(0), r(2, 0, 3), r(3, 2).t()[:, None]]
    last = params[-1].clone()
    update(params)
    assert (flat == -0.5).all() and (matrix == -0.5).all() and torch.equal(params[-1], last - 0.5)
    same = r(3)
    before = same.clone()
    ops.step_update([same], None, [same], [[same]], torch.zeros(1), lr=0.5)  # read and written, element by element
    torch.testing.assert_close(same, before / 2)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("strided", [lambda: r(1).expand(3), lambda: r(3, 1).expand(3, 2), lambda: r(9).as_strided((3, 4), (2, 1))])
def test_elements_that_share_memory_are_refused_before_anything_is_changed(backend, step, strided):
    params = [r(2), strided()]
    before = [p.clone() for p in params]
    with pytest.raises(ValueError, match=r"^params\[1\]: .*strides.*share memory.*contiguous"):
        STEPS[step](params)
    v = [torch.zeros_like(params[0]), torch.zeros(1).expand(params[1].shape)]
    with pytest.raises(ValueError, match=r"^momentum\[1\]: .*share memory"):
        update([params[0], r(*params[1].shape)], v)
    assert all(torch.equal(p, q) for p, q in zip(params, before)) and not v[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float64_momentum_is_not_narrowed(backend, dtype):
    p, v = [torch.zeros(3, dtype=dtype)], [torch.full((3,), 1 / 3, dtype=torch.float64)]
    with pytest.raises(ValueError, match=rf"^momentum\[0\]: torch.float64 for a parameter of {dtype}.*needs float32 or narrower"):
        update(p, v)
    assert not p[0].any() and (v[0] == 1 / 3).all()
    p = [torch.zeros(3, dtype=torch.float64)]
    update(p, v)
    assert (v[0] == 0.5 / 3 + 1).all()


def test_steps_of_nothing_are_refused():
    for call in (lambda: decay_noise_step([], [], lr=0.1), lambda: ProjectedMomentum([], lr=0.1)):
        with pytest.raises(ValueError, match="^params: got no tensor; needs one at least"):
            call()
    with pytest.raises(ValueError, match="^params: got no tensor"), lookahead([], [], 0.1):
        pass


@pytest.mark.filterwarnings("error")
def test_tensors_without_memory_are_not_compared():
    for mode in (contextlib.nullcontext(), FakeTensorMode()):
        with mode:
            p = [torch.zeros(3, device="meta") for _ in range(2)]
            ops.step_update(p, None, p, [], torch.zeros(0, device="meta"), lr=0.1)


def test_compiled():
    def step(p, v, g):
        ops.step_update([p], [v], [g], [], NONE, lr=0.5, beta=0.5)
        return p + v

    runs = []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        p, v = torch.ones(3), torch.ones(3)
        runs.append([f(p, v, torch.ones(3)), p, v])
    for x, y in zip(*runs):
        torch.testing.assert_close(x, y)
