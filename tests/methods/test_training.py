import math

import pytest
import torch
from torch import nn

from entangle_fast.methods.training import batch_order, fit, in_mode, learning_rate


def blobs(n=200):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 3
    return torch.randn(n, 2, generator=generator) + 4 * nn.functional.one_hot(y, 3)[:, :2], y


def net(dropout=0.0):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3))


OPTIONS = dict(epochs=3, lr=0.05, batch_size=16, seed=0)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_it_learns(optimizer):
    x, y = blobs()
    model = net()
    history = fit(model, x, y, optimizer=optimizer, **OPTIONS)
    assert len(history) == 3 and history[-1] < 0.5 * history[0]
    assert (model.eval()(x).argmax(1) == y).float().mean() > 0.9
    assert all(p.grad is None for p in model.parameters())


def test_deterministic_in_seed_and_the_global_state_is_left_as_found():
    x, y = blobs()
    runs = []
    for seed, noise in ((0, 5), (0, 6), (1, 5)):
        model = net(dropout=0.3)
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        fit(model, x, y, **{**OPTIONS, "seed": seed})
        assert torch.equal(torch.get_rng_state(), state)
        runs.append(model.state_dict())
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])
    assert not torch.equal(runs[0]["0.weight"], runs[2]["0.weight"])


def test_batch_order_is_a_permutation_and_a_pure_function():
    assert batch_order(9, 3, 1).sort().values.tolist() == list(range(9))
    assert torch.equal(batch_order(50, 3, 1), batch_order(50, 3, 1))
    assert not torch.equal(batch_order(50, 3, 1), batch_order(50, 3, 2))
    assert not torch.equal(batch_order(50, 3, 1), batch_order(50, 4, 1))


def test_every_sample_once_an_epoch_and_no_lone_batch():
    sizes = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(1, 2)

        def forward(self, x):
            sizes.append(x[:, 0].tolist())
            return self.inner(x)

    fit(Spy(), torch.arange(33.0)[:, None], torch.zeros(33).long(), **{**OPTIONS, "epochs": 1})
    assert sorted(sum(sizes, [])) == list(range(33)) and [len(s) for s in sizes] == [11, 11, 11]


def test_learning_rate_is_one_cycle():
    rates = [learning_rate(s, 100, 2.0) for s in range(100)]
    assert max(rates) == rates[9] == 2.0 and rates[0] == pytest.approx(0.2) and 0 < rates[-1] < 0.01
    assert rates[:10] == sorted(rates[:10]) and rates[9:] == sorted(rates[9:], reverse=True)
    assert learning_rate(0, 1, 2.0) == 2.0


def test_each_modules_mode_is_restored_also_after_an_error():
    model = net().eval()
    model[0].train()
    modes = [m.training for m in model.modules()]
    x, y = blobs()
    fit(model, x, y, **OPTIONS)
    assert [m.training for m in model.modules()] == modes
    with pytest.raises(RuntimeError), in_mode(model, True):
        assert all(m.training for m in model.modules())
        raise RuntimeError
    assert [m.training for m in model.modules()] == modes


def test_a_loss_that_is_not_finite_names_the_step_which_is_not_taken():
    x, y = blobs()
    x[batch_order(len(x), 0, 0)[20]] = math.nan  # in the second batch
    model = nn.Linear(2, 3)
    steps = []
    with pytest.raises(FloatingPointError, match="nan at step 2 .epoch 1 of 3"):
        fit(model, x, y, on_step=lambda step, loss: steps.append(step), **OPTIONS)
    assert steps == [1] and torch.isfinite(model.weight).all()


def test_progress_and_on_step():
    x, y = blobs(48)
    epochs, steps = [], []
    fit(net(), x, y, progress=lambda *a: epochs.append(a), on_step=lambda *a: steps.append(a), **OPTIONS)
    assert [e[:2] for e in epochs] == [(1, 3), (2, 3), (3, 3)] and [s for s, _ in steps] == list(range(1, 10))
    assert len(fit(net(), x, y, on_step=lambda step, loss: step == 4, **OPTIONS)) == 2


def test_frozen_parameters_stay():
    x, y = blobs()
    model = net()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    fit(model, x, y, weight_decay=0.1, **OPTIONS)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("change, message", [
    ({"epochs": 0}, "epochs: got 0"), ({"batch_size": 0}, "batch_size: got 0"), ({"seed": -1}, "seed: got -1"),
    ({"lr": 0.0}, "lr: got 0.0"), ({"lr": math.inf}, "lr: got inf"), ({"optimizer": "lion"}, "optimizer: got 'lion'"),
    ({"y": torch.zeros(3).long()}, "x, y: got 200 samples"), ({"y": torch.zeros(200)}, "y: got torch.float32"),
    ({"x": torch.zeros(0, 2), "y": torch.zeros(0).long()}, "x, y: got 0 samples"),
    ({"model": nn.ReLU()}, "model: has no parameter"),
])
def test_refusals(change, message):
    x, y = blobs()
    with pytest.raises(ValueError, match=message):
        fit(**{"model": net(), "x": x, "y": y, **OPTIONS, **change})
