"""What unlearn() refuses, each with the model untouched."""

import json
import math

import pytest
import torch
from running import bits, go, same
from small import CLASSES, flat, net, sets, trained
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

from entangle_fast import storage
from entangle_fast.job import unlearn
from entangle_fast.methods import FineTune, Lookahead
from entangle_fast.methods.process import NonFinite
from entangle_fast.report import CHECKPOINT


class Poison(nn.Module):
    """A loss that turns bad on one set from a call on."""

    def __init__(self, label, after, value=math.nan):
        super().__init__()
        self.labels, self.left, self.value = label, after, value

    def __call__(self, output, y):
        losses = nn.functional.cross_entropy(output, y, reduction="none")
        if output.requires_grad and y[0] == self.labels[0]:
            self.left -= 1
            if self.left < 0:
                return losses * self.value
        return losses


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("label, after, message, done", [
    ([0], 3, "stage1, step 3 of 6: non-finite loss on the forget set", 2),  # the check before the run is the first call of three
    ([1], 3, "stage2, step 3 of 6: non-finite loss on the adjacent set", 8),
])  # fmt: skip
def test_a_bad_loss_stops_before_the_step(label, after, message, done, value, tmp_path):
    model, good = trained(), go(loss=Poison(label, math.inf))
    with pytest.raises(NonFinite, match=message):
        go(model, loss=Poison(label, after, value), out=tmp_path)
    kept = storage.load_tensors(tmp_path / CHECKPOINT)
    assert all(torch.equal(kept[f"model.{k}"], v) for k, v in bits(model).items())
    assert json.loads(storage.load_metadata(tmp_path / CHECKPOINT)["run"])["done"] == done
    again = go(net(), loss=Poison(label, math.inf), out=tmp_path, resume=True)
    assert same(bits(again.model), bits(good.model))


@pytest.mark.parametrize("method", ["means", "samples", "finetune"])
def test_a_finite_loss_with_a_bad_gradient_stops_too(method):
    class Sharp(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * math.inf

    calls = []

    def loss(output, y):
        losses = nn.functional.cross_entropy(output, y, reduction="none")
        if output.requires_grad:
            calls.append(1)
            return Sharp.apply(losses) if len(calls) > 6 else losses
        return losses

    model = trained()
    with pytest.raises(NonFinite, match="non-finite gradient on the"):
        go(model, method=method, loss=loss)
    assert torch.isfinite(flat(model)).all() and not torch.equal(flat(model), flat(trained()))


def test_nan_in_the_samples_names_the_set():
    x, y = sets()["remote"]
    x[3] = math.nan
    model = trained()
    with pytest.raises(FloatingPointError, match="remote"):
        go(model, remote=(x, y))
    assert same(bits(model), bits(trained()))


def shared():
    x, y = sets()["adjacent"]
    return torch.cat([x, sets()["forget"][0][:2]]), torch.cat([y, sets()["forget"][1][:2]])


class Bare(Dataset):
    def __getitem__(self, i):
        return torch.zeros(6), 0


POINTS = TensorDataset(*(torch.cat([s[i] for s in sets().values()]) for i in (0, 1)))


@pytest.mark.parametrize("change, message", [
    ({"forget": (torch.zeros(0, 6), torch.zeros(0).long())}, "forget: got no samples; needs at least one"),
    ({"adjacent": TensorDataset(torch.zeros(0, 6), torch.zeros(0).long())}, "adjacent: got no samples"),
    ({"adjacent": shared()}, "adjacent: 2 of its samples are also in forget; the sets must be disjoint"),
    ({"forget": Subset(POINTS, [0, 1, 2]), "adjacent": Subset(Subset(POINTS, [9, 2, 1]), [0, 1]),
      "remote": Subset(POINTS, [30, 31])}, "adjacent: 1 of its samples are also in forget"),
    ({"forget": POINTS, "adjacent": POINTS}, "adjacent: 88 of its samples are also in forget"),
    ({"remote": (torch.zeros(5, 6), torch.full((5,), CLASSES))}, "remote: label 4 is outside .0, 4."),
    ({"remote": (torch.zeros(5, 6), torch.full((5,), -1))}, "remote: label -1 is outside .0, 4."),
    ({"remote": (torch.zeros(5, 6), torch.zeros(5))}, "remote: labels are torch.float32; needs int64"),
    ({"remote": (torch.zeros(5, 6), torch.zeros(4).long())}, "remote: 5 samples but 4 labels"),
    ({"remote": (torch.zeros(5, 7), torch.zeros(5).long())}, "remote: samples of shape .7,., but .6,. in forget"),
    ({"forget": (torch.zeros(5, 6).double(), torch.zeros(5).long())}, "forget: the model cannot take torch.float64 samples"),
    ({"test": sets()["forget"]}, "test: got tuple; needs a tasks.Sets, or the three"),
    ({"test": {**sets(), "forget": (torch.zeros(5, 6), torch.zeros(5).int())}}, "test.forget: labels are torch.int32; needs int64"),
    ({"remote": (torch.zeros(5, 6), torch.zeros(5).int())}, "remote: labels are torch.int32; needs int64"),
    ({"remote": (torch.zeros(5, 6), torch.zeros(5, 4).long())}, "remote: labels have shape .5, 4.; needs class indices"),
    ({"forget": [1, 2, 3]}, "forget: got list; needs .x, y. tensors or a map-style Dataset"),
    ({"forget": Bare()}, "forget: got Bare"),
    ({"loss": lambda output, y: nn.functional.cross_entropy(output, y)}, "loss: gave shape .. for .* samples; .*not reduced"),
    ({"resume": True}, "resume: needs the folder"),
])  # fmt: skip
def test_bad_input(change, message):
    model = trained()
    with pytest.raises(ValueError, match=message):
        go(model, **change)
    assert same(bits(model), bits(trained()))


def test_overlap_may_be_meant():
    go(adjacent=shared(), allow_overlap=True, method=FineTune(epochs=0.1))


def test_bad_models():
    with pytest.raises(ValueError, match="model: no trainable parameter"):
        go(net().requires_grad_(False))
    model = trained()
    model[5].double()
    with pytest.raises(ValueError):
        go(model)
    model = trained()
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="model: parameter '0.weight' holds NaN or infinite values"):
        go(model)


def test_a_class_and_a_model_without_values_are_refused():
    with pytest.raises(ValueError, match="method: got .*Lookahead.*as in ef.Entangled"):
        unlearn(net(), **sets(), method=Lookahead)
    with pytest.raises(ValueError, match="meta device"):
        unlearn(net().to("meta"), **sets(), progress=False)
