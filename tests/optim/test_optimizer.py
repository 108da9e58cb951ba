"""What torch.optim.Optimizer promises: schedules, state_dict, hooks."""

import copy
import io

import pytest
import torch
from optimising import BOTH, MAKES, flat, pair, stepped, tensors

from entangle_fast.optim import ProjectedAdamW, ProjectedMomentum


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


@BOTH
def test_torchs_takes_the_state_over(make):
    own, mine, theirs, plain = pair(make)
    stepped(own, mine, theirs, plain, 3, lambda i, k: i == 1 and k < 2)
    for optimizer in (mine, copy.deepcopy(mine)):
        went_on, (there, beside) = [p.clone() for p in own], copy.deepcopy((theirs, plain))
        torchs = type(plain)([{"params": went_on[:2]}, {"params": went_on[2:]}], lr=1e-3)
        torchs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        stepped(went_on, torchs, there, beside, 4, lambda i, k: i == 0 and k == 0)
        torch.testing.assert_close(went_on, there, rtol=1e-6, atol=1e-9)


def test_sgd_does_not_take_a_decoupled_decay_for_its_own():
    mine, params = ProjectedMomentum(tensors(0), lr=0.1, weight_decay=0.1), tensors(0)
    params[0].grad = params[0].clone()
    plain = torch.optim.SGD(params, lr=0.1)
    plain.load_state_dict(mine.state_dict())
    with pytest.raises(KeyError, match="dampening"):
        plain.step()


@BOTH
def test_hooks_see_what_is_saved(make):
    mine, seen = make(tensors(0)), []
    mine.register_state_dict_post_hook(lambda _, state: seen.append("maximize" in state["param_groups"][0]))
    mine.state_dict()
    assert seen == [True] and "maximize" not in mine.param_groups[0]


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
    (MAKES[1], lambda p: torch.optim.RMSprop(p, momentum=0.9), "a group with centered, RMSprop's"),
    (MAKES[0], lambda p: torch.optim.AdamW(p, amsgrad=True), "amsgrad: got True"),
    (MAKES[0], lambda p: torch.optim.AdamW(p, maximize=True), "maximize: got True"),
    (MAKES[0], lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), foreach=False), "lr: got Tensor; needs a number: give .item()"),
    (MAKES[0], lambda p: torch.optim.Adam(p, weight_decay=0.1), "weight_decay: got 0.1 that is added"),
    (MAKES[0], lambda p: torch.optim.SGD(p, lr=0.1), "a group without betas and eps"),
    (MAKES[0], lambda p: torch.optim.RAdam(p), "state_dict: a group without amsgrad, such as RAdam's"),
    (MAKES[0], lambda p: torch.optim.NAdam(p), "mu_product|a group without amsgrad"),
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


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_a_state_of_muons_is_refused():
    theirs = torch.optim.Muon([torch.nn.Parameter(torch.zeros(2, 2))], nesterov=False, momentum=0.9)
    with pytest.raises(ValueError, match="state_dict: a group with ns_steps, Muon's"):
        ProjectedMomentum([torch.zeros(2, 2)], lr=0.1).load_state_dict(theirs.state_dict())
