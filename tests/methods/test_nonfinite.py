"""A loss that is not finite, although its gradient is: every method says so before it changes anything."""

import math

import pytest
import torch
import torch.nn.functional as F
from small import data, trained

from entangle_fast import methods
from entangle_fast.methods.process import NonFinite

SIZES = dict(epochs1=1.0, epochs2=1.0, remote_batch1=16, forget_batch1=8, adjacent_batch2=8, forget_batch2=8, remote_batch2=12)
OPTIONS = {
    "entangled": [
        SIZES | more for more in ({}, {"w2_set": "whole"}, {"w2": "features"}, {"away_from": "samples"}, {"away_from": "forget_samples"})
    ],
    "lookahead": [dict(order=1), dict(order=2), dict(order=2, swap=True), dict(forget_loss="random_label"), dict(trim=0.1)],
}
CASES = [(name, options) for name in methods.METHODS if name != "retrain" for options in OPTIONS.get(name, [{}])]


class Spoilt:
    """Cross-entropy plus NaN, which no gradient sees, once ``now`` is set."""

    now = False

    def __call__(self, output, y):
        losses = F.cross_entropy(output, y, reduction="none")
        return losses + math.nan if self.now else losses


def kept(process):
    """All that the next step depends on, bit by bit."""
    both = {**process.model.state_dict(), **process.state()}
    return {k: v.clone() for k, v in both.items()}


@pytest.mark.parametrize("name", ["entangled", "geometric", "retrain"])
def test_adam_is_refused_where_its_eps_is_zero(name):
    """In float16 1e-8 is: what had no gradient came out as 0/0, in a step that said nothing."""
    model = trained().half()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="model: its parameters are torch.float16, in which Adam's eps of 1e-08 is 0; .*model.float()"):
        methods.METHODS[name]().start(model, data(dtype=torch.float16), Spoilt(), 0).step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_float16_without_adam():
    model = trained().half()
    process = methods.Entangled(epochs1=0, epochs2=1).start(model, data(dtype=torch.float16), Spoilt(), 0)
    process.step()
    assert all(p.isfinite().all() for p in model.parameters())


class Broken(Spoilt):
    """Whose first call gives NaN and whose second raises."""

    def __call__(self, output, y):
        if self.now == "next":
            raise OSError("of the caller's own")
        losses, self.now = super().__call__(output, y), self.now and "next"
        return losses


@pytest.mark.parametrize("name, options", [("entangled", SIZES), ("finetune", dict(batch=8)), ("salun", dict(batch=8))])
def test_what_a_broken_step_asked_is_not_answered_later(name, options):
    loss = Broken()
    process = methods.METHODS[name](**options).start(trained(), data(), loss, 0)
    while process.where() != (process.stages[-1][0], 1):
        process.step()
    loss.now = True
    with pytest.raises((OSError, NonFinite)):
        process.step()
    loss.now = False
    assert process.all_losses(process.data.remote).isfinite().all()
    loss.now = True
    with pytest.raises(OSError):
        process.all_losses(type(process.data.remote)("remote", (torch.zeros(2000, 6), torch.zeros(2000, dtype=torch.int64)), "cpu"))
    loss.now = False
    assert process.all_losses(process.data.remote).isfinite().all()
    process.step()


@pytest.mark.parametrize("at", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("name, options", CASES, ids=[f"{n}-{'-'.join(map(str, o.values()))}" for n, o in CASES])
def test_a_loss_that_is_not_finite_changes_nothing(name, options, at):
    loss = Spoilt()
    process = methods.METHODS[name](**options).start(trained(), data(), loss, 0)
    steps = min(process.total, 8)
    for _ in range(int(at * steps)):
        process.step()
    stage, k = process.where()
    if k == 0:
        process.enter(stage)
        process.enter = lambda stage: None
    before, done, loss.now = kept(process), process.done, True
    try:
        process.step()
    except NonFinite as error:
        assert f"{stage}, step {k + 1} of" in str(error) and "non-finite loss" in str(error)
    else:
        assert name == "ssd" and stage == "dampen"  # the one step that asks for no loss
        return
    after = kept(process)
    assert process.done == done and before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
