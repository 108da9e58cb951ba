"""unlearn(): what the whole job gives."""

import json
import re

import numpy as np
import pytest
import torch
from running import METHODS, SMALL, STEPS, bits, go, same, untimed
from small import samples, sets, trained
from torch.utils.data import DataLoader, Dataset, TensorDataset

from entangle_fast import report, storage
from entangle_fast.job import unlearn
from entangle_fast.methods import Entangled, FineTune, Retrain
from entangle_fast.report import CHECKPOINT


def test_it_forgets_and_keeps():
    result = go(method=Entangled(**SMALL, epochs1=2.0, lr1=0.05, epochs2=2.0, lr2=0.02))
    assert result.before["forget"] > 80 and result.before["remote"] > 80
    assert result.after["forget"] < 20 and result.after["adjacent"] > 70 and result.after["remote"] > 70, result.after
    assert len(result.history) == STEPS and result.seconds > 0 and result.peak_mb >= 0
    assert [r["stage"] for r in result.history] == ["stage1"] * 6 + ["stage2"] * 6
    assert all(type(v) in (int, float, str) for row in result.history for v in row.values())
    for k in (5, 11):
        assert {"acc_forget", "acc_adjacent", "acc_remote"} <= set(result.history[k])
    assert set(result.facts) == {"first_order", "forget_bound"}
    assert {k.split("/")[2] for k in result.losses} == {"before", "stage1", "stage2"}
    assert result.losses["entangled/0/before/forget"].shape == (20,)


def test_the_report(tmp_path):
    result = go(out=tmp_path, test=sets(forget=8))
    found = json.loads((tmp_path / "report.json").read_text())
    assert set(found["methods"]) == {"original", "entangled"}
    row = found["methods"]["entangled"]
    assert {"forget", "adjacent", "remote", "seconds", "peak_mb", "per_class", "seeds"} <= set(row)
    assert row["forget"] == pytest.approx(result.after["forget"]) and row["seeds"][0]["seed"] == 0
    assert found["facts"]["first_order"]["applies"]
    assert len((tmp_path / report.HISTORY).read_text().splitlines()) == 1 + STEPS
    assert same(storage.load_tensors(tmp_path / "model.safetensors"), bits(result.model))
    assert result.losses["entangled/0/stage2/forget"].shape == (8,)
    assert 'name = "entangled"' in (tmp_path / "config.toml").read_text() and not (tmp_path / CHECKPOINT).exists()
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".csv", ".toml", ".safetensors"}


@pytest.mark.parametrize("given, title", [(None, "Accuracy of the training samples"), (sets(forget=8), "Test accuracy")])
def test_the_table_says_what_was_measured(given, title, capsys):
    text = go(test=given).summary()
    assert title in text and capsys.readouterr().out == ""


def test_modes_and_requires_grad_are_as_found():
    model = trained().train()
    model[1].eval()
    modes, needs = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    statistics = model[1].running_mean.clone()
    go(model)
    assert [m.training for m in model.modules()] == modes and [p.requires_grad for p in model.parameters()] == needs
    assert torch.equal(model[1].running_mean, statistics)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bits(method):
    one = go(method=method)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    two = go(model=trained(), method=method)
    assert same(bits(one.model), bits(two.model)) and untimed(one.history) == untimed(two.history)
    assert one.facts == two.facts
    if method == "means":
        assert not same(bits(one.model), bits(go(seed=1).model))
        torch.set_rng_state(state)
        go(model=one.model)
        assert torch.equal(torch.get_rng_state(), state)


class Pairs(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], int(self.y[i])


@pytest.mark.parametrize("wrap", [Pairs, TensorDataset, lambda x, y: DataLoader(Pairs(x, y), batch_size=3)])
def test_datasets_and_loaders_give_what_tensors_give(wrap):
    wrapped = {name: wrap(*pair) for name, pair in sets().items()}
    assert same(bits(go().model), bits(go(**wrapped).model))


def test_a_dataset_is_never_read_whole():
    class Counted(Pairs):
        read = most = 0

        def __getitem__(self, i):
            self.read += 1
            self.most = max(self.most, self.read)
            return super().__getitem__(i)

    x, y = samples(2500, 3, [2, 3])
    train, test, model = Counted(x, y), Counted(x + 1, y), trained()

    def ran(module, args):
        train.read = test.read = 0

    model.register_forward_pre_hook(ran)
    found = go(model, remote=train, test={**sets(), "remote": test}, method=FineTune(epochs=0.1), eval_every=1)
    assert test.most <= 1024 and train.most <= 128, (test.most, train.most)
    assert found.losses["finetune/0/after/remote"].shape == (2500,)


def test_few_steps_are_told(capsys):
    for method, told in (
        (Entangled(), r"entangled: few steps \(stage1 \d+, stage2 \d+\) on so few samples \(20 forget, 24 adjacent, 44 remote\); .*"
                      r"raise epochs1, epochs2$"),
        (FineTune(epochs=1.0), r"finetune: few steps \(finetune 1\) .*raise epochs$"),
    ):  # fmt: skip
        unlearn(trained(), **sets(), method=method)
        line = capsys.readouterr().err.splitlines()[0]
        assert re.search(told, line), line
    for method in (Entangled(**SMALL, epochs1=2.0, epochs2=8.0), Retrain(epochs=1)):
        unlearn(trained(), **sets(), method=method)
        assert "few steps" not in capsys.readouterr().err


@pytest.mark.parametrize("name, needs", [
    ("eval_every", "a number of steps"), ("checkpoint_every", "a number of steps"), ("seed", "a whole number"),
])  # fmt: skip
def test_numbers_below_zero(name, needs):
    with pytest.raises(ValueError, match=f"^{name}: got -1; needs {needs} >= 0"):
        go(**{name: -1})


def test_gradients_are_on_whatever_the_caller_turned_off():
    model = trained()
    with torch.no_grad():
        found = go(model)
        assert not torch.is_grad_enabled()
    assert same(bits(found.model), bits(go(seed=np.int64(0)).model))
    model = trained()
    with torch.inference_mode(), pytest.raises(ValueError, match="model: unlearning under torch.inference_mode, .*; call it outside"):
        go(model)


@pytest.mark.parametrize("wrong", [{"model": len}, {"loss": "ce"}, {"seed": "a"}, {"out": 3}, {"augment": 1.0}, {"eval_every": "a"},
                                   {"checkpoint_every": None}])
def test_what_cannot_be_one_is_named(wrong):
    (name,) = wrong
    given = {"model": torch.nn.Linear(4, 2), "forget": None, "adjacent": None, "remote": None} | wrong
    with pytest.raises(TypeError, match=f"^{name}: got {type(wrong[name]).__name__}; needs a "):
        unlearn(given.pop("model"), **given)
