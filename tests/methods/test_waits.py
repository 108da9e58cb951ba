"""On a GPU the host waits once a step, where it reads what is finite: every method on a device that counts the waits."""

import copy

import pytest
import torch
import torch.nn.functional as F
from pretend import DEVICE, moved, pretended
from small import data, flat, sets, trained

from entangle_fast import methods
from entangle_fast.job_run import _floats
from entangle_fast.methods import ahead
from entangle_fast.methods.data import Data, SampleSet
from entangle_fast.methods.process import NonFinite, sample_cross_entropy

SIZES = dict(epochs1=1.0, epochs2=1.0, remote_batch1=16, forget_batch1=8, adjacent_batch2=8, forget_batch2=8, remote_batch2=12)
OPTIONS = {
    "entangled": [
        SIZES | more for more in ({}, {"w2_set": "whole", "max_norm2": 1.0}, {"w2": "features"}, {"away_from": "samples"},
                                  {"away_from": "forget_samples", "w2_set": "whole"})
    ],
    "lookahead": [dict(batch=8), dict(batch=8, order=2), dict(batch=8, order=2, swap=True, stop_at=0.1),
                  dict(batch=8, forget_loss="random_label", trim=0.1)],
    "rosu": [dict(batch=8)], "gradient_ascent": [dict(batch=8, epochs=3)],
    "influence": [dict(form=form) for form in methods.influence.FORMS],
    "geometric": [dict(batch=8, stop_at=0.0)], "retrain": [dict(epochs=1, batch=23)],
}  # fmt: skip
CASES = [(name, options) for name in methods.METHODS for options in OPTIONS.get(name, [{}])]
SPANS = {"orthograd", "woodbury", "samples", "forget_samples"}  # whose eigenvalues torch.linalg looks at
READS = {"retrain": 3, "dampen": 0, "shrink": 0}  # stages: batches of the one step of retrain, each with its loss; what reads no loss


@pytest.fixture(scope="module")
def model():
    return trained()


@pytest.mark.parametrize("name, options", CASES, ids=[f"{n}-{'-'.join(map(str, o.values()))}" for n, o in CASES])
def test_a_step_waits_once_and_gives_the_bits_of_the_cpu(name, options, model):
    config = methods.METHODS[name](**options)
    here, other, third = (copy.deepcopy(model) for _ in range(3))
    here = config.start(here, data(), sample_cross_entropy, 0)
    with pretended() as device:
        there = config.start(moved(other), Data.of(**sets(), device=DEVICE, seed=0), sample_cross_entropy, 0)
        enter, there.enter = there.enter, lambda stage: None  # what a stage begins with may wait
        for _ in range(min(here.total, 5)):
            stage, k = there.where()
            if k == 0:
                enter(stage)
            device.waits.clear()
            there.step(), here.step()
            solves = [w for w in device.waits if w.startswith("_linalg_eigh")]
            assert len(device.waits) - len(solves) == READS.get(stage, 1), device.waits
            assert len(solves) == (stage != "stage1" and not SPANS.isdisjoint((name, options.get("away_from")))), solves
            assert there.stopped == here.stopped
        assert torch.equal(flat(there.model).cpu(), flat(here.model))
        kept = there.state()
        assert all(torch.equal(kept[key].cpu(), value) for key, value in here.state().items())
        again = config.start(moved(third), Data.of(**sets(), device=DEVICE, seed=0), sample_cross_entropy, 0)
        again.load({key: value.cpu() for key, value in kept.items()})
        assert {key: x.device for key, x in again.state().items()} == {key: x.device for key, x in kept.items()}


AHEAD = [methods.Lookahead(batch=8), methods.Lookahead(batch=8, order=2, stop_at=0.1), methods.Rosu(batch=8, momentum=0.5)]


def sparse():
    """Weights far smaller than their step: each needs a slot of its own."""
    model = trained()
    with torch.no_grad():
        model[0].weight[::2] *= 1e-9
    return model


@pytest.mark.parametrize("config", AHEAD, ids=str)
def test_too_few_slots_change_no_bit(config):
    runs = [config.start(sparse(), data(), sample_cross_entropy, 0) for _ in range(2)]
    few, all_ = runs
    few.slots, looked, direction = 1, [], few.direction
    assert all_.slots == sum(p.numel() for p in all_.params) + 1
    few.direction = lambda k, row: looked.append(k) or direction(k, row)
    rows = [[run.step() for _ in range(4)] for run in runs]
    assert looked.count(0) == 4 and looked[4:] == [1, 2, 3] and few.slots == 64  # 1, 4, 16, 64; what was found once is kept
    assert torch.equal(flat(few.model), flat(all_.model)) and few.stopped == all_.stopped
    assert _floats(rows[0]) == _floats(rows[1])
    assert all(torch.equal(a, b) for a, b in zip(few.state().values(), all_.state().values()))


def test_slots_are_few_in_a_large_model():
    model = torch.nn.Sequential(torch.nn.Linear(6, 1 << 16), torch.nn.Linear(1 << 16, 4))
    process = AHEAD[0].start(model, data(), sample_cross_entropy, 0)
    assert process.slots == (sum(p.numel() for p in model.parameters()) + 1) // ahead.SHARE


class Refusing(torch.nn.Module):
    """A layer that takes no NaN, as a decomposition does not."""

    def forward(self, x):
        if x.isnan().any():
            raise ValueError("got NaN")
        return x


@pytest.mark.parametrize("config", AHEAD, ids=str)
def test_a_gradient_that_is_not_finite_is_why_the_look_ahead_failed(config):
    """Its losses are finite; the parameters, where it led, are not."""
    model = torch.nn.Sequential(trained(), Refusing())
    process = config.start(model, data(), lambda output, y: F.cross_entropy(output * 1.0, y, reduction="none"), 0)
    process.slots, before = 1, flat(model)
    process.params[0].register_hook(lambda g: g * torch.inf)
    with pytest.raises(NonFinite, match="non-finite gradient on the (retain|forget) set"):
        process.step()
    assert process.done == 0 and torch.equal(flat(model), before)


class Stopped:
    """Cross-entropy, from which a call is interrupted."""

    calls, at = 0, 0

    def __call__(self, output, y):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return F.cross_entropy(output, y, reduction="none")


@pytest.mark.parametrize("config", AHEAD, ids=str)
@pytest.mark.parametrize("at", range(1, 7))
def test_an_interrupt_is_not_taken_for_slots_that_did_not_suffice(config, at):
    loss = Stopped()
    runs = [config.start(sparse(), data(), loss, 0) for _ in range(2)]
    runs[0].slots, loss.at, before = 1, at, flat(runs[0].model)
    with pytest.raises(KeyboardInterrupt):
        runs[0].step()
    assert runs[0].done == 0 and torch.equal(flat(runs[0].model), before)
    for run in runs:
        run.step()
    assert torch.equal(flat(runs[0].model), flat(runs[1].model))


@pytest.mark.parametrize("name, options", CASES, ids=[f"{n}-{'-'.join(map(str, o.values()))}" for n, o in CASES])
def test_a_loss_may_be_computed_elsewhere(name, options, model):
    def loss(output, y):
        return F.cross_entropy(output.cpu(), y.cpu(), reduction="none")

    config = methods.METHODS[name](**options)
    here, other = (copy.deepcopy(model) for _ in range(2))
    here = config.start(here, data(), loss, 0)
    with pretended():
        there = config.start(moved(other), Data.of(**sets(), device=DEVICE, seed=0), loss, 0)
        for _ in range(min(here.total, 5)):
            there.step(), here.step()
        assert torch.equal(flat(there.model).cpu(), flat(here.model))


def test_samples_that_are_on_the_device_are_picked_without_a_wait():
    x, y = sets()["remote"]
    with pretended() as device:
        there = SampleSet("remote", (x.to(DEVICE), y.to(DEVICE)), DEVICE)
        device.waits.clear()
        rows, a, b = there.batch(1, 7)
        assert not device.waits and torch.equal(a.cpu(), x[rows]) and torch.equal(b.cpu(), y[rows])


def test_a_history_is_read_at_once():
    with pretended() as device:
        rows = [{"step": k, "loss": torch.tensor(k / 3).to(DEVICE), "n": torch.tensor(k).to(DEVICE), "cosine": torch.tensor(0.5)}
                for k in range(4)]  # fmt: skip
        device.waits.clear()
        found = _floats(rows)
        assert len(device.waits) == 1
    assert [(r["step"], r["loss"], r["n"]) for r in found] == [(k, float(torch.tensor(k / 3)), k) for k in range(4)]
    assert found[0]["angle_deg"] == pytest.approx(60)
