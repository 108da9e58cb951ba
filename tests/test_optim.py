"""Steps over many tensors, against the same formulas on one flat vector in float64."""

import copy
import io

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from entangle_fast import ops
from entangle_fast.optim import ProjectedAdamW, ProjectedMomentum, decay_noise_step, lookahead
from entangle_fast.reference import philox

F64 = torch.float64
SHAPES = [(4, 3), (5,), (2, 1, 3)]


def tensors(seed, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=F64).to(dtype) for s in SHAPES]


def flat(ts):
    return torch.cat([t.flatten() for t in ts]).double()


def span(directions, ridge=0.0):
    """The matrix P_V, by an SVD; with a ridge Dᵀ(DDᵀ + ridge)⁻¹D."""
    d = torch.stack([flat(x) for x in directions])
    if ridge:
        return d.T @ torch.linalg.inv(d @ d.T + ridge * torch.eye(len(d), dtype=F64)) @ d
    u = torch.linalg.svd(d, full_matrices=False)
    basis = u.Vh[u.S > 1e-7 * u.S[0]]
    return basis.T @ basis


@pytest.mark.parametrize("project", ["momentum", "gradient"])
@pytest.mark.parametrize("case", ["two", "one", "none", "collinear", "zero", "ridge", "three"])
def test_projected_momentum(project, case):
    params = tensors(0)
    theta, v = flat(params), torch.zeros(23, dtype=F64)
    ridge = 0.5 if case == "ridge" else 0.0
    sgd = ProjectedMomentum(params, lr=0.1, momentum=0.9, weight_decay=0.2, ridge=ridge, project=project)
    for k in range(4):
        g, a, b, c = (tensors(10 * k + i) for i in range(1, 5))
        directions = {"one": [a], "none": [], "collinear": [a, [-2 * x for x in a]], "three": [a, b, c],
                      "zero": [a, [0 * x for x in a]]}.get(case, [a, b])  # fmt: skip
        found = sgd.step(g, directions)
        p = span(directions, ridge) if directions else torch.zeros(23, 23, dtype=F64)
        moved = 0.9 * v + flat(g)
        v = moved - p @ (moved if project == "momentum" else flat(g))
        theta = theta * (1 - 0.1 * 0.2) - 0.1 * v
        torch.testing.assert_close(flat(params), theta, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(flat(sgd.buffers), v, rtol=1e-9, atol=1e-10)
        if project == "momentum":
            torch.testing.assert_close(found["step_norm"], 0.1 * v.norm(), rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(
                found["removed"].square(), 1 - (v.norm() / moved.norm()).square(), rtol=1e-6, atol=1e-9
            )
            if not ridge and directions:
                assert max(abs(flat(d) @ v) for d in directions) < 1e-8
        if case in ("two", "ridge"):
            cosine = torch.nn.functional.cosine_similarity(flat(a), flat(b), dim=0)
            torch.testing.assert_close(found["cosine"], cosine)
        assert all(torch.isfinite(x) for x in found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_stays_orthogonal(dtype):
    params = tensors(0, dtype)
    sgd = ProjectedMomentum(params, lr=0.1)
    for k in range(3):
        directions = [tensors(10 * k + 1, dtype), tensors(10 * k + 2, dtype)]
        sgd.step(tensors(10 * k + 3, dtype), directions)
        v = flat(sgd.buffers)
        assert sgd.buffers[0].dtype == dtype
        for d in directions:
            assert abs(flat(d) @ v) < 4 * torch.finfo(dtype).eps * flat(d).norm() * v.norm()


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_a_given_coefficient_is_used(dtype):
    params, d, g = tensors(0), tensors(1), tensors(2)
    theta = flat(params)
    ProjectedMomentum(params, lr=0.5).step(g, [d], coef=torch.tensor([0.25], dtype=dtype))
    torch.testing.assert_close(flat(params), theta - 0.5 * (flat(g) - 0.25 * flat(d)))


def test_state_continues_to_the_bit():
    runs = []
    for stop in (None, 2):
        params = tensors(0)
        sgd = ProjectedMomentum(params, lr=0.1)
        for k in range(4):
            if k == stop:
                state = copy.deepcopy(sgd.state_dict())
                sgd = ProjectedMomentum(params, lr=0.3)
                sgd.load_state_dict(state)
            sgd.step(tensors(3 * k + 1), [tensors(3 * k + 2), tensors(3 * k + 3)])
        runs.append(flat(params))
    assert torch.equal(*runs)


def test_project_is_named():
    with pytest.raises(ValueError, match="project: got 'v'; needs one of 'momentum', 'gradient'"):
        ProjectedMomentum(tensors(0), lr=0.1, project="v")


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_adamw_without_directions_is_torch_s(dtype):
    mine, theirs = tensors(0, dtype), tensors(0, dtype)
    adamw = ProjectedAdamW(mine, lr=0.02, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.3)
    plain = torch.optim.AdamW(theirs, lr=0.02, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.3)
    for k in range(5):
        grads = tensors(k + 1, dtype)
        assert adamw.step(grads) == {}
        for p, g in zip(theirs, grads):
            p.grad = g
        plain.step()
        torch.testing.assert_close(flat(mine), flat(theirs), rtol=1e-12 if dtype == F64 else 1e-5, atol=1e-13 if dtype == F64 else 1e-6)


@pytest.mark.parametrize("ridge", [0.0, 0.5])
def test_adamw_projects_the_gradient_first(ridge):
    mine, theirs = tensors(0), tensors(0)
    adamw = ProjectedAdamW(mine, lr=0.02, ridge=ridge)
    plain = torch.optim.AdamW(theirs, lr=0.02)
    for k in range(4):
        g, a, b = (tensors(10 * k + i) for i in (1, 2, 3))
        found = adamw.step(g, [a, b])
        kept = flat(g) - span([a, b], ridge) @ flat(g)
        for p, part in zip(theirs, kept.split([x.numel() for x in theirs])):
            p.grad = part.view(p.shape)
        plain.step()
        torch.testing.assert_close(flat(mine), flat(theirs), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(found["removed"].square(), 1 - (kept.norm() / flat(g).norm()).square(), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(found["cosine"], torch.nn.functional.cosine_similarity(flat(a), flat(b), dim=0))
    moved = flat(tensors(0)) - flat(mine)
    assert abs(moved @ flat(a)) > 1e-3 * moved.norm() * flat(a).norm()  # as its docstring says: not orthogonal


def test_adamw_takes_a_given_coefficient_and_draws_by_its_count():
    params, d, g = tensors(0), tensors(1), tensors(2)
    theta = flat(params)
    adamw = ProjectedAdamW(params, lr=0.0, noise=0.5, seed=7)
    assert adamw.step(g, [d], coef=torch.tensor([0.25])) == {}
    torch.testing.assert_close(flat(adamw.exp_avg), 0.1 * (flat(g) - 0.25 * flat(d)))
    torch.testing.assert_close(flat(params) - theta, 0.5 * philox.normal(23, 7, 1).double(), rtol=1e-6, atol=1e-6)
    adamw.step(g)
    both = philox.normal(23, 7, 1) + philox.normal(23, 7, 2)
    torch.testing.assert_close(flat(params) - theta, 0.5 * both.double(), rtol=1e-6, atol=1e-6)


def test_adamw_state_continues_to_the_bit():
    runs = []
    for stop in (None, 2):
        params = tensors(0, torch.bfloat16)
        adamw = ProjectedAdamW(params, lr=0.1, noise=0.1)
        for k in range(4):
            if k == stop:
                state = copy.deepcopy(adamw.state_dict())
                adamw = ProjectedAdamW(params, lr=0.3, noise=0.3)
                adamw.load_state_dict(state)
            adamw.step(tensors(3 * k + 1, torch.bfloat16), [tensors(3 * k + 2, torch.bfloat16)])
        assert adamw.exp_avg[0].dtype == torch.float32 and int(adamw.count) == 4
        runs.append(flat(params))
    assert torch.equal(*runs)


def test_adamw_without_parameters_is_refused():
    with pytest.raises(ValueError, match="params: got no tensor"):
        ProjectedAdamW([])


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
        decay_noise_step(params, g, lr=0.1, weight_decay=0.1, noise=0.1, counter=adamw.count)
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
        with lookahead(params, grads, 0.7, capacity=capacity):
            moved = params[0] != before
        assert moved.tolist() == [k < capacity for k in range(4)] + [True] * 3 and torch.equal(params[0], before)
        ulps, _, _ = residue = ops.step_lookahead(params, grads, 0.7, capacity)
        assert sum((u == -128).sum() for u in ulps) == left
        ops.step_lookahead_undo(params, grads, residue, 0.7)


def test_lookahead_is_undone_after_an_error():
    params, grads = tensors(0, torch.float32), tensors(1, torch.float32)
    before = flat(params)
    with pytest.raises(RuntimeError, match="inside"), lookahead(params, grads, 0.3):
        assert not torch.equal(flat(params), before)
        raise RuntimeError("inside")
    assert torch.equal(flat(params), before)


def test_a_refused_step_counts_no_step():
    optimiser = ProjectedAdamW([torch.zeros(3)])
    with pytest.raises(ValueError, match=r"grads\[0\]"):
        optimiser.step([torch.zeros(4)])
    assert optimiser.count == 0


@pytest.mark.parametrize("make", [lambda p: ProjectedAdamW(p), lambda p: ProjectedMomentum(p, lr=0.1)])
def test_a_state_that_does_not_fit_changes_nothing(make):
    optimiser = make([torch.zeros(4, 3), torch.zeros(2)])
    optimiser.step([torch.ones(4, 3), torch.ones(2)], [])
    before = copy.deepcopy(optimiser.state_dict())
    last = list(before["state"][1])[-1]
    for change in (lambda s: s[1].update({last: torch.zeros(1)}), lambda s: s[1].update(other=torch.zeros(2)), lambda s: s[0].pop(last)):
        wrong = copy.deepcopy(before)
        wrong["param_groups"][0]["lr"] = 7.0
        change(wrong["state"])
        if wrong["state"][0]:
            with pytest.raises(ValueError, match="state_dict: .* has shape"):
                optimiser.load_state_dict(wrong)
    for wrong in ({}, 3, before | {"param_groups": []}):
        with pytest.raises(ValueError, match="state_dict: "):
            optimiser.load_state_dict(wrong)
    torch.testing.assert_close(optimiser.state_dict(), before, rtol=0, atol=0)


def test_a_direction_too_short_for_its_coefficient():
    optimiser = ProjectedMomentum([torch.zeros(3)], lr=1.0)
    optimiser.step([torch.ones(3)], [[torch.full((3,), 1e-39)]])
    torch.testing.assert_close(optimiser.params[0], -torch.ones(3))


@pytest.mark.parametrize("backend", ["", "reference"])
@pytest.mark.parametrize("ridge", [0.0, 1e-9])
def test_a_direction_too_short_does_not_disturb_the_others(ridge, backend, monkeypatch):
    monkeypatch.setenv("ENTANGLE_FAST_BACKEND", backend)
    a, b = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([1e-35, 1e-35, 0.0])
    for directions in ([[a], [b]], [[b], [a]], [[b], [a], [b]]):
        optimiser = ProjectedMomentum([torch.zeros(3)], lr=1.0, ridge=ridge)
        optimiser.step([torch.tensor([1.0, 2.0, 3.0])], directions)
        torch.testing.assert_close(optimiser.buffers[0], torch.tensor([0.0, 2.0, 3.0]))


@pytest.mark.parametrize("backend", ["", "reference"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_direction_that_is_not_finite_is_not_dropped(k, backend, monkeypatch):
    monkeypatch.setenv("ENTANGLE_FAST_BACKEND", backend)
    directions = [[torch.randn(3)] for _ in range(k - 1)] + [[torch.tensor([0.0, torch.nan, 0.0])]]
    optimiser = ProjectedMomentum([torch.zeros(3)], lr=1.0)
    optimiser.step([torch.ones(3)], directions)
    assert optimiser.params[0].isnan().all()


def test_nothing_was_removed_of_nothing():
    found = ProjectedMomentum([torch.zeros(3)], lr=0.1).step([torch.zeros(3)], [[torch.ones(3)]])
    assert found["removed"] == 0


def test_nearly_equal_directions_count_as_one():
    torch.manual_seed(275)
    a = torch.randn(8)
    d, g = a * (1 + 2e-7 * torch.randn(8)), torch.randn(8)
    optimiser = ProjectedMomentum([torch.zeros(8)], lr=1.0)
    optimiser.step([g], [[a], [d]])
    assert abs(torch.cosine_similarity(optimiser.buffers[0].double(), a.double(), 0)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_only_real_floats_are_stepped(dtype):
    p = [torch.zeros(4)]
    with pytest.raises(ValueError, match="floating-point"):
        ops.step_update(p, None, [torch.ones(4, dtype=dtype)], [], torch.zeros(0), lr=1.0)
    with pytest.raises(ValueError, match="floating-point"):
        ops.step_gram([[torch.ones(4, dtype=dtype)]])
    assert not p[0].any()


def grouped(make, **second):
    """The same optimiser on all parameters at once, and on two groups of them."""
    whole, parts = tensors(0), tensors(0)
    return whole, make(whole), parts, make([{"params": parts[:2]}, {"params": parts[2:], **second}])


@pytest.mark.parametrize("make", [lambda p: ProjectedAdamW(p), lambda p: ProjectedMomentum(p, lr=0.1)])
def test_the_span_is_one_over_all_groups(make):
    whole, one, parts, two = grouped(make)
    for k in range(3):
        g, a, b = (tensors(10 * k + i) for i in (1, 2, 3))
        torch.testing.assert_close(one.step(g, [a, b]), two.step(g, [a, b]), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(whole, parts, rtol=1e-10, atol=1e-12)


def test_groups_have_their_own_options():
    whole, one, parts, two = grouped(lambda p: ProjectedMomentum(p, lr=0.1), lr=0.3, weight_decay=0.5)
    g, d = tensors(1), tensors(2)
    one.step(g, [d])
    assert "step_norm" not in two.step(g, [d])
    torch.testing.assert_close(whole[:2], parts[:2])
    torch.testing.assert_close(parts[2], 0.85 * tensors(0)[2] - 0.3 * two.buffers[2])
    with pytest.raises(ValueError, match=r"directions\[0\]: 2 tensors for 3 parameters"):
        two.step(g, [d[:2]])
    before = flat(parts)
    with pytest.raises(ValueError, match=r"grads\[2\]"):  # of the second group: the first one's step must not have been taken
        two.step([*g[:2], torch.ones(7)])
    assert torch.equal(flat(parts), before)
    two.param_groups[1]["momentum"] = 0.5
    with pytest.raises(ValueError, match=r"momentum: groups have \[0.5, 0.9\]"):
        two.step(g, [d])


def test_groups_draw_their_own_noise():
    params = [torch.zeros(64), torch.zeros(64)]
    adamw = ProjectedAdamW([{"params": params[:1]}, {"params": params[1:], "noise": 0.25}], lr=0.0, noise=0.5, seed=7)
    adamw.step([torch.zeros(64), torch.zeros(64)])
    torch.testing.assert_close(params[0], 0.5 * philox.normal(64, 7, 1))
    torch.testing.assert_close(params[1], 0.25 * philox.normal(64, 7 + 2**32, 1))


@pytest.mark.parametrize("make", [lambda p: ProjectedAdamW(p), lambda p: ProjectedMomentum(p, lr=0.1)])
def test_what_stands_in_grad_is_stepped_and_the_rest_left_alone(make):
    given, held = tensors(0), tensors(0)
    g, d = tensors(1), tensors(2)
    held[0].grad, held[2].grad = g[0], g[2]
    mine, theirs = make([given[0], given[2]]), make(held)
    torch.testing.assert_close(mine.step([g[0], g[2]], [[d[0], d[2]]]), theirs.step(directions=[d]))
    torch.testing.assert_close([given[0], given[2]], [held[0], held[2]], rtol=0, atol=0)
    assert torch.equal(held[1], tensors(0)[1])
    theirs.zero_grad()
    with pytest.raises(ValueError, match="grads: got none, and no parameter has a .grad"):
        theirs.step()


@pytest.mark.parametrize("make", [lambda p: ProjectedAdamW(p, noise=0.1), lambda p: ProjectedMomentum(p, lr=0.1)])
def test_it_is_an_optimizer(make):
    params = tensors(0, torch.bfloat16)
    optimizer = make(params)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=8)  # cycles momentum or betas too
    rates = set()
    for k in range(3):
        optimizer.step(tensors(k + 1, torch.bfloat16), [tensors(k + 7, torch.bfloat16)])
        rates.add(optimizer.param_groups[0]["lr"])
        schedule.step()
    assert len(rates) == 3
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = make(tensors(0, torch.bfloat16))
    state = [x for s in again.state.values() for x in s.values()]
    again.load_state_dict(torch.load(file, weights_only=True))
    assert all(x is y for x, y in zip(state, (x for s in again.state.values() for x in s.values())))  # in place, for a replayed graph
    torch.testing.assert_close(again.state_dict(), optimizer.state_dict(), rtol=0, atol=0)
    twin = copy.deepcopy(optimizer)  # its parameters too
    g, d = tensors(20, torch.bfloat16), tensors(21, torch.bfloat16)
    torch.testing.assert_close(optimizer.step(g, [d]), twin.step(g, [d]), rtol=0, atol=0)
    torch.testing.assert_close(params, twin.params, rtol=0, atol=0)


def test_a_state_of_torchs_is_taken_over():
    for mine, theirs in ((lambda p: ProjectedAdamW(p), torch.optim.AdamW), (lambda p: ProjectedMomentum(p, lr=1e-3), torch.optim.SGD)):
        params = tensors(0)
        options = {"momentum": 0.9} if theirs is torch.optim.SGD else {}
        plain = theirs(params, lr=1e-3, **options)
        for k in range(2):
            for p, g in zip(params, tensors(k + 1)):
                p.grad = g
            plain.step()
        own = [p.clone() for p in params]
        optimizer = mine(own)
        optimizer.load_state_dict(plain.state_dict())
        for p, q in zip(params, own):
            q.grad = p.grad
        plain.step(), optimizer.step()
        torch.testing.assert_close(own, params, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("options, message", [
    ({"lr": "a"}, "lr: got str; needs a number"), ({"lr": -1.0}, "lr: got -1.0; needs a finite number >= 0"),
    ({"weight_decay": torch.nan}, "weight_decay: got nan"), ({"ridge": -1.0}, "ridge: got -1.0"), ({"ridge": None}, "ridge: got None"),
])  # fmt: skip
@pytest.mark.parametrize("make", [ProjectedAdamW, ProjectedMomentum])
def test_options_are_checked(make, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make(tensors(0), **{"lr": 0.1} | options)
    optimizer = make(tensors(0)[:1], lr=0.1)
    if "ridge" not in options:
        with pytest.raises((ValueError, TypeError), match=message):
            optimizer.add_param_group({"params": tensors(0)[1:], **options})
    with pytest.raises(ValueError, match="params: got one of torch.int64"):
        optimizer.add_param_group({"params": [torch.zeros(3, dtype=torch.int64)]})
    assert len(optimizer.param_groups) == 1 and len(optimizer.state) == 1


def test_adamws_options_are_checked():
    for betas in ((1.0, 0.9), (0.9,), (0.9, -0.1)):
        with pytest.raises(ValueError, match="betas: got"):
            ProjectedAdamW(tensors(0), betas=betas)


# ---- what a user of torch's optimisers brings along ----

MAKES = [lambda p, **o: ProjectedAdamW(p, **o), lambda p, **o: ProjectedMomentum(p, **{"lr": 1e-3} | o)]
BOTH = pytest.mark.parametrize("make", MAKES, ids=["adamw", "momentum"])


def pair(make, dtype=F64):
    """Ours, and the one of torch's that it is without directions, on the same parameters in two groups."""
    own, theirs = tensors(0, dtype), tensors(0, dtype)
    mine = make([{"params": own[:2]}, {"params": own[2:], "lr": 0.02}])
    torchs = torch.optim.AdamW if isinstance(mine, ProjectedAdamW) else lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9)
    return own, mine, theirs, torchs([{"params": theirs[:2]}, {"params": theirs[2:], "lr": 0.02}])


def stepped(own, mine, theirs, plain, steps, waits=lambda i, k: False):
    for k in range(steps):
        for i, (p, q, g) in enumerate(zip(own, theirs, tensors(k + 1))):
            p.grad, q.grad = (None, None) if waits(i, k) else (g, g.clone())
        mine.step(), plain.step()


@BOTH
@pytest.mark.parametrize("schedule", [
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, 30), lambda o: torch.optim.lr_scheduler.CyclicLR(o, 1e-3, 0.1, 4),
    lambda o: torch.optim.lr_scheduler.SequentialLR(o, [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.swa_utils.SWALR(o, 0.05)], [5]),
])  # fmt: skip
def test_schedules_move_it_as_they_move_torchs(make, schedule):
    own, mine, theirs, plain = four = pair(make)
    schedules = schedule(mine), schedule(plain)
    for k in range(20):
        for p, q, g in zip(own, theirs, tensors(k + 1)):
            p.grad, q.grad = g, g.clone()
        for one in (mine, plain, *schedules):
            one.step()
    torch.testing.assert_close(four[0], four[2], rtol=1e-12, atol=1e-13)


@BOTH
def test_each_parameter_counts_its_own_steps(make):
    own, mine, theirs, plain = pair(make)
    stepped(own, mine, theirs, plain, 8, lambda i, k: (i == 1 and k < 5) or (i == 2 and k % 2))
    torch.testing.assert_close(own, theirs, rtol=1e-12, atol=1e-13)
    again = make([{"params": own[:2]}, {"params": own[2:]}])
    again.load_state_dict(copy.deepcopy(mine.state_dict()))
    stepped(own, again, theirs, plain, 2)
    torch.testing.assert_close(own, theirs, rtol=1e-12, atol=1e-13)


def test_each_count_draws_its_own_noise():
    params, d = [torch.zeros(64) for _ in range(3)], philox.normal
    adamw = ProjectedAdamW(params, lr=0.0, noise=1.0, seed=7)
    for taken in ((0,), (1, 2), (0, 1, 2)):
        for i, p in enumerate(params):
            p.grad = torch.zeros(64) if i in taken else None
        adamw.step()
    torch.testing.assert_close(params[0], d(64, 7, 1) + d(64, 7, 2))
    torch.testing.assert_close(torch.cat(params[1:]), d(128, 7, 1 + 2**32) + d(128, 7, 2 + 2**32))


@pytest.mark.parametrize("waits", [lambda i, k: i == 1 and k < 3, lambda i, k: i == 1, lambda i, k: i == 0 and k > 1])
def test_a_state_with_different_counts_is_taken_over(waits):
    own, mine, theirs, plain = pair(MAKES[0])
    for k in range(5):
        for i, (q, g) in enumerate(zip(theirs, tensors(k + 1))):
            q.grad = None if waits(i, k) else g
        plain.step()
    mine.load_state_dict(plain.state_dict())
    for p, q in zip(own, theirs):
        p.copy_(q)
    stepped(own, mine, theirs, plain, 2)
    torch.testing.assert_close(own, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("make, plain, message", [
    (MAKES[1], lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), "nesterov: got True"),
    (MAKES[1], lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5), "dampening: got 0.5"),
    (MAKES[1], lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, maximize=True), "maximize: got True"),
    (MAKES[1], lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1), "weight_decay: got 0.1 that is added"),
    (MAKES[1], lambda p: torch.optim.AdamW(p), "a group without momentum"),
    (MAKES[0], lambda p: torch.optim.AdamW(p, amsgrad=True), "amsgrad: got True"),
    (MAKES[0], lambda p: torch.optim.AdamW(p, maximize=True), "maximize: got True"),
    (MAKES[0], lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), foreach=False), "lr: got Tensor; needs a number: give .item()"),
    (MAKES[0], lambda p: torch.optim.Adam(p, weight_decay=0.1), "weight_decay: got 0.1 that is added"),
    (MAKES[0], lambda p: torch.optim.SGD(p, lr=0.1), "a group without betas and eps"),
])  # fmt: skip
def test_a_state_that_would_step_otherwise_is_refused(make, plain, message, steps):
    params = tensors(0)
    theirs, mine = plain(params), make(tensors(0))
    mine.step(tensors(1))
    for p, g in zip(params, tensors(1)):
        p.grad = g
    for _ in range(steps):
        theirs.step()
    before = copy.deepcopy((mine.params, mine.state_dict()))
    with pytest.raises((ValueError, TypeError), match=message):
        mine.load_state_dict(theirs.state_dict())
    torch.testing.assert_close((mine.params, mine.state_dict()), before, rtol=0, atol=0)


def test_what_is_off_leaves_no_trace():
    sgd, again = (ProjectedMomentum(tensors(0), lr=0.1) for _ in range(2))
    sgd.load_state_dict(torch.optim.SGD(tensors(0), lr=0.1, momentum=0.9).state_dict())
    sgd.param_groups[0]["weight_decay"] = 0.1  # ours, decoupled: not to be taken for SGD's
    again.load_state_dict(sgd.state_dict())
    assert again.param_groups[0]["weight_decay"] == 0.1


@BOTH
@pytest.mark.parametrize("change", [
    lambda s: s["state"].update({1: {k: x.to_sparse() if x.dim() else x for k, x in s["state"][1].items()}}),
    lambda s: s["state"].update({1: {k: x.to("meta") for k, x in s["state"][1].items()}}),
    lambda s: s["state"].update({1: {k: x.to(torch.complex64) for k, x in s["state"][1].items()}}),
    lambda s: s["state"].update({1: None}), lambda s: s.update(state=None), lambda s: s["state"].update({1: {"step": "a"}}),
    lambda s: s["param_groups"][0].update(weight_decay=-1.0), lambda s: s["param_groups"][0].pop("lr"),
])  # fmt: skip
def test_a_state_that_cannot_be_held_changes_nothing(make, change):
    mine = make(tensors(0))
    mine.step(tensors(1))
    before = copy.deepcopy(mine.state_dict())
    wrong = copy.deepcopy(before)
    for x in wrong["state"][0].values():
        x.zero_()
    change(wrong)
    with pytest.raises(ValueError, match=r"state_dict: |weight_decay: got -1.0"):
        mine.load_state_dict(wrong)
    torch.testing.assert_close(mine.state_dict(), before, rtol=0, atol=0)


@BOTH
def test_hooks_see_and_change_what_is_loaded(make):
    saved, seen = make(tensors(0)), []
    saved.step(tensors(1))
    mine = make(tensors(0)[:2])

    def adapt(_, state):
        state["param_groups"] = [state["param_groups"][0] | {"params": [0, 1], "lr": 0.5}]
        state["state"] = {k: {name: x * 0 + 3 for name, x in state["state"][k].items()} for k in (0, 1)}

    mine.register_load_state_dict_pre_hook(adapt)
    mine.register_load_state_dict_post_hook(lambda o: seen.extend(float(x.flatten()[0]) for s in o.state.values() for x in s.values()))
    mine.load_state_dict(saved.state_dict())
    assert set(seen) == {3.0} and all((x == 3).all() for s in mine.state.values() for x in s.values()) and mine.param_groups[0]["lr"] == 0.5
    assert len(saved.state_dict()["param_groups"][0]["params"]) == 3


@BOTH
def test_a_wrong_option_of_the_second_group_leaves_the_first(make):
    params = tensors(0)
    mine = make([{"params": params[:1]}, {"params": params[1:]}])
    for name, value in (("lr", "a"), ("lr", torch.nan), ("weight_decay", None), ("betas", 0.9), ("noise", -1.0)):
        if (before := mine.param_groups[1].get(name)) is not None:
            mine.param_groups[1][name] = value
            with pytest.raises((ValueError, TypeError), match=f"^{name}: got"):
                mine.step(tensors(1))
            mine.param_groups[1][name] = before
    torch.testing.assert_close(params, tensors(0), rtol=0, atol=0)


@BOTH
@pytest.mark.parametrize("option", [{"nesterov": True}, {"maximize": True}, {"ridge": 1.0}, {"seed": 1}, {"project": "gradient"}])
def test_an_option_that_groups_do_not_have_is_refused(make, option):
    with pytest.raises(ValueError, match=f"{next(iter(option))}: got .* for a group"):
        make([{"params": tensors(0)} | option])


@BOTH
def test_memory_and_devices_are_looked_at_from_the_start(make):
    whole, spread = torch.zeros(6), torch.zeros(1).expand(3)
    for groups in ([{"params": whole[:4]}, {"params": whole[3:]}], [{"params": whole}, {"params": spread}], [whole[:4], whole[2:]]):
        with pytest.raises(ValueError, match=r"params\[1\]: .*share"):
            make(groups)
    with pytest.raises(ValueError, match="params: on cpu and meta"):
        make([{"params": torch.zeros(2)}, {"params": torch.zeros(2, device="meta")}])
    with torch.device("meta"):
        mine = make([whole])
    assert {x.device.type for x in mine.state[whole].values()} == {"cpu"}
    with torch.inference_mode():
        mine = make([whole])
    mine.step([torch.ones(6)])


def test_operations_of_several_devices_are_refused():
    both = [torch.zeros(2), torch.zeros(2, device="meta")]
    for call in (lambda: ops.step_gram([both]), lambda: ops.step_project([both], None, both), lambda: decay_noise_step(both, both, lr=1.0)):
        with pytest.raises(ValueError, match="on cpu and meta; needs one device"):
            call()


@BOTH
def test_gradients_of_every_kind(make):
    g, groups = tensors(1), lambda p: [{"params": p[:1]}, {"params": p[1:]}]
    for split in (list, groups):
        given, listed = tensors(0), tensors(0)
        make(split(given)).step((x for x in g), ((x for x in d) for d in [tensors(2)]))
        make(listed).step(g, [tensors(2)])
        torch.testing.assert_close(given, listed, rtol=1e-12, atol=1e-14)
        mine = make(split(given))
        for wrong, error, message in (
            (g[:2], ValueError, "grads: 2 tensors for 3 parameters"), ([], ValueError, "grads: 0 tensors for 3"),
            ([x.numpy() for x in g], TypeError, r"grads\[0\]: got numpy.ndarray; needs a torch.Tensor: torch.from_numpy"),
            ([*g[:2], g[2].to_sparse()], ValueError, r"grads\[2\]: torch.sparse_coo; needs a dense one"),
            (lambda: 0, TypeError, "grads: got a function; .*closure=..."),
        ):  # fmt: skip
            with pytest.raises(error, match=message):
                mine.step(wrong)
        torch.testing.assert_close(given, listed, rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match="grads: 0 tensors for 0 parameters"):
        make([{"params": []}]).step([])
    for coef in (torch.ones(1, dtype=torch.complex64), torch.ones(1, dtype=torch.int64)):
        with pytest.raises(ValueError, match="coef: dtype"):
            mine.step(g, [tensors(2)], coef)


@BOTH
def test_a_closure_is_called_first(make):
    p, q = torch.nn.Parameter(torch.ones(3)), torch.ones(3)
    mine = make([p])

    def closure():
        mine.zero_grad()
        loss = (p * torch.arange(3.0)).sum()
        loss.backward()
        return loss

    mine.step(closure=closure, directions=[[torch.ones(3)]])
    make([q]).step([torch.arange(3.0)], [[torch.ones(3)]])
    torch.testing.assert_close(p.detach(), q)
    with pytest.raises(ValueError, match="closure: got grads too"):
        mine.step([torch.ones(3)], closure=closure)


@pytest.mark.parametrize("seed, error", [("a", TypeError), (1.5, TypeError), (2**62, ValueError)])
def test_a_seed_is_a_whole_number(seed, error):
    with pytest.raises(error, match="^seed: got"):
        ProjectedAdamW(tensors(0), seed=seed)


def test_steps_without_state_take_generators():
    net, before = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    before.load_state_dict(net.state_dict())
    with lookahead(net.parameters(), (torch.ones_like(p) for p in before.parameters()), 0.5):
        torch.testing.assert_close(net.bias, before.bias - 0.5)
    torch.testing.assert_close(list(net.parameters()), list(before.parameters()), rtol=0, atol=0)
    decay_noise_step(net.parameters(), (torch.ones_like(p) for p in before.parameters()), lr=0.5)
    torch.testing.assert_close(net.bias, before.bias - 0.5)
