"""Every metric takes tensors or a Dataset, gives the same of both, and reads a Dataset in batches."""

import dataclasses

import pytest
import torch
from small import net, samples, trained
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from entangle_fast import metrics, tasks
from entangle_fast.methods.checks import TRIED
from entangle_fast.methods.data import SampleSet
from entangle_fast.metrics.relearning_attackers import ROWS

SIZE = 7  # of a batch: divides neither set
SETS = {"forget": samples(20, 1, [0]), "retain": samples(44, 3, [1, 2, 3])}
MANY = samples(2 * ROWS + 9, 5, [0, 1])


class Pairs(Dataset):
    """Samples one by one, labels as plain numbers; how many were read since the model last ran."""

    def __init__(self, x, y):
        self.x, self.y, self.read, self.most = x, y, 0, 0

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        self.read += 1
        self.most = max(self.most, self.read)
        return self.x[i], int(self.y[i])


class Watching(nn.Module):
    """A model that tells data sets when it runs."""

    def __init__(self, model, watched):
        super().__init__()
        self.model, self.watched = model, watched

    def forward(self, x):
        for data in self.watched:
            data.read = 0
        return self.model(x)


def relearn(model, forget, retain, **options):
    found = metrics.relearn(model, model, forget, test=retain, retain=retain, seeds=2, batch=8, steps=3, lr=0.05, progress=False,
                            **{"batched": "loop", **options})  # fmt: skip
    return {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}


def membership(model, forget, retain):
    found = metrics.membership(model, forget, retain, population=TensorDataset(*SETS["retain"]) if isinstance(forget, Dataset)
                               else SETS["retain"], attacks=("loss", "classifier"), batch_size=SIZE)  # fmt: skip
    return found.summary(), found.roc


def utility(model, forget, retain):
    retrained = Watching(net(seed=1), getattr(model, "watched", ()))
    return metrics.utility(model, {"a": forget, "b": retain}, retrained=retrained, batch_size=SIZE)


CALLS = {
    "predict": lambda model, forget, retain: metrics.predict(model, forget, batch_size=SIZE),
    "accuracy": lambda model, forget, retain: metrics.accuracy(model, retain, batch_size=SIZE),
    "sample_losses": lambda model, forget, retain: metrics.sample_losses(model, retain, batch_size=SIZE),
    "evaluate": lambda model, forget, retain: metrics.evaluate(model, {"a": forget, "b": retain}, batch_size=SIZE),
    "utility": utility,
    "membership": membership,
    "gradient_angle": lambda model, forget, retain: metrics.gradient_angle(model, forget, retain, batch_size=SIZE),
    "relearn": relearn,
    "relearn, retain": lambda *given: relearn(*given, attacker="retain", share=0.5),
    "relearn, prototype": lambda *given: relearn(*given, attacker="prototype", batched="vmap"),
    "relearn, on some": lambda *given: relearn(*given, eval_samples=11),
    "embed": lambda model, forget, retain: tasks.embed(model, forget, batch_size=SIZE),
}
FORMS = {"TensorDataset": TensorDataset, "read": Pairs, "DataLoader": lambda x, y: DataLoader(Pairs(x, y), batch_size=3)}


def alike(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(alike(x, y) for x, y in zip(a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b or a != a


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CALLS)
def test_datasets_give_what_tensors_give(name, form):
    model = trained()
    held = CALLS[name](model, *SETS.values())
    read = CALLS[name](model, *(FORMS[form](*pair) for pair in SETS.values()))
    assert alike(held, read), (held, read)


@pytest.mark.parametrize("name", [name for name in CALLS if "relearn" not in name])
def test_a_dataset_is_read_in_batches(name):
    data = [Pairs(*pair) for pair in SETS.values()]
    CALLS[name](Watching(trained(), data), *data)
    assert SIZE <= max(d.most for d in data) <= SIZE + 1, [d.most for d in data]  # a set's last batch may be of one


def test_relearning_reads_a_dataset_in_batches():
    data = [Pairs(*MANY), Pairs(*SETS["retain"])]
    relearn(Watching(trained(), data), *data, eval_samples=None)
    assert data[0].most <= ROWS + 16  # and a step's batches of two seeds
    whole = Pairs(*MANY)
    relearn(trained(), whole, SETS["retain"], eval_samples=50)
    assert whole.read == TRIED + 50 + 3 * 16  # a look at some, what is measured on, the steps
    assert [len(SampleSet("forget", MANY, "cpu")), len(whole)] == [len(MANY[0])] * 2


@pytest.mark.parametrize("bad, message", [
    (Pairs(SETS["retain"][0], SETS["retain"][1] + 9), "got labels from 10 to 12, needs 0 to 3"),
    (TensorDataset(SETS["retain"][0], SETS["retain"][1].int()), "got torch.int32 labels of shape .7,. for 7 samples"),
    (TensorDataset(SETS["retain"][0]), "its batches are a list of Tensor; needs samples that are pairs .x, y."),
    (tuple(t.numpy() for t in SETS["retain"]), "got tuple of ndarray and ndarray; needs .x, y. tensors or a .*: torch.from_numpy"),
    (SETS["retain"][0], "got Tensor; needs .x, y. tensors or a map-style Dataset: give its labels too"),
    ((SETS["retain"][0], SETS["retain"][1][:-1]), "44 samples but 43 labels"),
])  # fmt: skip
def test_errors_name_the_argument(bad, message):
    good = SETS["forget"]
    for name, call in {
        "data": lambda m: metrics.accuracy(m, bad, SIZE), "^data": lambda m: metrics.sample_losses(m, bad, SIZE),
        "mine": lambda m: metrics.evaluate(m, {"theirs": good, "mine": bad}, SIZE),
        "yours": lambda m: metrics.utility(m, {"yours": bad}, batch_size=SIZE),
        "nonmembers": lambda m: metrics.membership(m, good, bad, attacks="loss", batch_size=SIZE),
        "population": lambda m: metrics.membership(m, good, good, attacks="population", population=bad, batch_size=SIZE),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            call(trained())


def test_sizes_of_batches():
    model = trained()
    for call in (metrics.predict, metrics.accuracy, metrics.sample_losses, tasks.embed):
        with pytest.raises(ValueError, match="batch_size: got 0; needs a whole number >= 1"):
            call(model, SETS["forget"], batch_size=0)
        with pytest.raises(TypeError, match="batch_size: got str; needs a whole number"):
            call(model, SETS["forget"], batch_size="8")


def test_what_is_no_classifier_is_named():
    for model in (nn.Linear(6, 1), nn.Unflatten(1, (2, 3)), nn.LSTM(6, 4)):
        for call in (metrics.predict, metrics.accuracy, metrics.sample_losses):
            with pytest.raises(ValueError, match=r"model: gave .* for 20 samples; needs class logits \(n, C\), C >= 2"):
                call(model, SETS["forget"])


def test_evaluate_takes_what_unlearn_takes_to_test_on():
    model = trained()
    found = metrics.evaluate(model, {name: TensorDataset(*pair) for name, pair in SETS.items()})
    assert found == {**{name: metrics.accuracy(model, pair) for name, pair in SETS.items()}, "per_class": {}}
    with pytest.raises(FloatingPointError, match="^b: the model's logits are NaN"):
        metrics.evaluate(model, {"a": SETS["forget"], "b": (SETS["retain"][0] * torch.nan, SETS["retain"][1])})
