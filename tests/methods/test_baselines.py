"""Each baseline takes the step that its formula says."""

import pytest
import torch
import torch.nn.functional as F
from small import data, flat, net, samples, trained
from torch import nn

from entangle_fast.methods import FineTune, GradientAscent, NegGradPlus, RandomLabels, Retrain
from entangle_fast.methods.baselines import reset
from entangle_fast.methods.process import sample_cross_entropy

F64 = torch.float64


def start(config, dtype=F64, model=None, **sizes):
    return config.start(trained(dtype) if model is None else model, data(dtype=dtype, **sizes), sample_cross_entropy, 0)


def follow(config, objective, steps=5):
    """The process, and plain SGD on the objective(model, data, k) from the same start."""
    process, other = start(config), trained(F64)
    params = [p for p in other.parameters() if p.requires_grad]
    sgd = torch.optim.SGD(params, lr=config.lr, momentum=config.momentum)
    for k in range(steps):
        process.step()
        sgd.zero_grad()
        objective(other, process.data, k).backward()
        if config.max_norm:
            nn.utils.clip_grad_norm_(params, config.max_norm)
        sgd.step()
    torch.testing.assert_close(flat(process.model), flat(other), rtol=1e-10, atol=1e-10)
    assert (flat(other) - flat(trained(F64))).norm() > 1e-3
    return process


def mean_loss(model, samples, k, size, labels=None):
    rows, x, y = samples.batch(k, size)
    return F.cross_entropy(model(x), y if labels is None else labels[rows])


def retain(model, d, k, size):
    """24 adjacent and 44 remote samples: a batch in that proportion."""
    near = round(size * 24 / 68)
    a, r = (mean_loss(model, s, k, b) for s, b in ((d.adjacent, near), (d.remote, size - near)))
    return (near * a + (size - near) * r) / size


@pytest.mark.parametrize("max_norm", [0.0, 0.1])
def test_finetune_descends_on_the_retain_set(max_norm):
    process = follow(FineTune(batch=17, max_norm=max_norm), lambda m, d, k: retain(m, d, k, 17))
    assert process.total == 8  # two passes over 68 samples


@pytest.mark.parametrize("max_norm", [0.0, 0.1])
def test_gradient_ascent_ascends_on_the_forget_set(max_norm):
    config = GradientAscent(batch=8, max_norm=max_norm, momentum=0.5)
    follow(config, lambda m, d, k: -mean_loss(m, d.forget, k, 8))


def test_neggrad():
    def objective(model, d, k):
        _, x, y = d.forget.batch(k, 8)
        losses = F.cross_entropy(model(x), y, reduction="none")
        kept = torch.where(losses < 1.0, losses, losses.detach())
        return 0.8 * retain(model, d, k, 16) - 0.2 * kept.mean()

    follow(NegGradPlus(beta=0.8, clip=1.0, batch=8, retain_batch=16, lr=0.1), objective)


def test_random_labels_are_wrong_and_stay():
    drawn = {}

    def objective(model, d, k):
        shift = torch.randint(1, 4, (20,), generator=torch.Generator().manual_seed(0))
        drawn["labels"] = (d.forget.tensors[1] + shift) % 4
        return retain(model, d, k, 16) + mean_loss(model, d.forget, k, 8, drawn["labels"])

    process = follow(RandomLabels(batch=8, retain_batch=16), objective)
    assert (drawn["labels"] != process.data.forget.tensors[1]).all() and len(drawn["labels"].unique()) == 3


@pytest.mark.parametrize("config", [
    GradientAscent(batch=10, lr=0.5, epochs=100, stop_at=0.1),
    NegGradPlus(batch=10, lr=0.3, epochs=100, beta=0.5, stop_at=0.1),
    RandomLabels(batch=10, lr=0.2, epochs=100, stop_at=0.1),
])  # fmt: skip
def test_they_stop_once_the_forget_set_is_forgotten(config):
    process = start(config, torch.float32)
    while process.done < process.total and not process.stopped:
        process.step()
    x, y = process.data.forget.tensors
    assert process.stopped and process.done < process.total
    assert (process.model(x).argmax(1) == y).float().mean() <= 0.3


def test_they_run_to_the_end_when_nothing_is_forgotten():
    process = start(GradientAscent(batch=10, lr=1e-6, epochs=3, stop_at=0.0))
    while process.done < process.total and not process.stopped:
        process.step()
    assert process.done == process.total == 6 and not process.stopped


def test_retrain_does_not_know_what_was_there():
    config = Retrain(epochs=8, lr=0.03, batch=16)
    runs = []
    for model in (trained(), net(seed=5)):
        model[3].weight.requires_grad_(True)
        process = start(config, torch.float32, model)
        process.step()
        runs.append(process)
        assert process.done == process.total == 1
    assert all(torch.equal(a, b) for a, b in zip(runs[0].model.state_dict().values(), runs[1].model.state_dict().values()))
    model, d = runs[0].model.eval(), runs[0].data
    for s in d.retain:
        assert (model(s.tensors[0]).argmax(1) == s.tensors[1]).float().mean() > 0.8
    assert (model(d.forget.tensors[0]).argmax(1) == 0).float().mean() < 0.1  # a label it never saw


def test_reset_is_a_function_of_the_seed_and_leaves_the_global_state():
    models = [net(seed=s) for s in (1, 2, 3)]
    state = torch.get_rng_state()
    for model, seed in zip(models, (7, 7, 8)):
        reset(model, seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(flat(models[0]), flat(models[1])) and not torch.equal(flat(models[0]), flat(models[2]))
    assert (models[0][1].running_mean == 0).all() and (models[0][1].running_var == 1).all()


def test_a_parameter_that_cannot_be_reset_is_refused():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(6))

        def forward(self, x):
            return x * self.scale

    model = nn.Sequential(Scale(), nn.Linear(6, 4))
    before = flat(model).clone()
    with pytest.raises(ValueError, match="module '0' .Scale. has parameters .'scale'. but no reset_parameters"):
        start(Retrain(), torch.float32, model).step()
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("cls", [FineTune, GradientAscent, NegGradPlus, RandomLabels, Retrain])
@pytest.mark.parametrize("field, value", [("lr", 0.0), ("lr", float("inf")), ("epochs", -1), ("batch", 0)])
def test_refusals(cls, field, value):
    with pytest.raises(ValueError, match=f"{field}: got {value}; needs a finite number > 0"):
        cls(**{field: value})


def test_batches_need_not_divide_the_sets():
    process = start(FineTune(batch=3, epochs=0.1), torch.float32, forget=3, adjacent=1, remote=5)
    assert process.step()["loss_adjacent"] > 0
    assert samples(3, 0, [1])[0].shape == (3, 6)
