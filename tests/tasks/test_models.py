import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from entangle_fast.storage import CheckpointError
from entangle_fast.tasks import SmallCNN, load_model, load_weights


def test_small_cnn():
    model = SmallCNN(4)
    assert sum(p.numel() for p in model.parameters()) == 105_572
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 4)
    assert SmallCNN(7, in_channels=3, image_size=32)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    with pytest.raises(ValueError, match="image_size: got 30"):
        SmallCNN(4, image_size=30)


def test_load_model():
    assert isinstance(load_model("small_cnn", num_classes=3), SmallCNN)
    assert load_model("torch.nn:Linear", in_features=2, out_features=5).out_features == 5
    with pytest.raises(ValueError, match="needs one of small_cnn"):
        load_model("large_cnn")
    with pytest.raises(ValueError, match=r"torch.nn \(.*nn.__init__.py\) has no 'Liner'; the nearest is 'Linear'"):
        load_model("torch.nn:Liner")
    with pytest.raises(TypeError, match="gave a dict"):
        load_model("builtins:dict")
    with pytest.raises(ModuleNotFoundError):
        load_model("no_such_package:factory")


@pytest.mark.parametrize("kind", ["safetensors", "torch", "checkpoint"])
def test_load_weights(tmp_path, kind):
    saved, model = SmallCNN(3), SmallCNN(3)
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    if kind == "safetensors":
        save_file(saved.state_dict(), path)
    else:
        torch.save(saved.state_dict() if kind == "torch" else {"state_dict": saved.state_dict(), "epoch": 3}, path)
    assert load_weights(model, path) is model
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in saved.state_dict().items())


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("weight"), "missing: weight"),
    (lambda s: s.update(extra=torch.zeros(1)), "not the model's: extra"),
    (lambda s: s.update(weight=torch.zeros(3, 3)), r"another shape or kind: weight \(file \(3, 3\)"),
    (lambda s: s.update(weight=torch.zeros(2, 3).long()), "another shape or kind: weight .*int64"),
])
def test_weights_that_do_not_fit_leave_the_model_unchanged(tmp_path, change, message):
    model = nn.Linear(3, 2)
    state = {k: v + 1 for k, v in model.state_dict().items()}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    change(state)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=message):
        load_weights(model, tmp_path / "w.pt")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_file_that_holds_no_state_dict(tmp_path):
    torch.save([1, 2], tmp_path / "w.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        load_weights(nn.Linear(3, 2), tmp_path / "w.pt")


class Malicious:
    def __reduce__(self):
        return exec, ("raise SystemExit",)


def test_a_malicious_torch_file_is_refused(tmp_path):
    torch.save({"weight": Malicious()}, tmp_path / "w.pt")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        load_weights(nn.Linear(3, 2), tmp_path / "w.pt")


@pytest.mark.parametrize("name, content", [
    ("w.safetensors", b"hello"), ("w.pt", b"hello"), ("w.pt", b""), ("w.pt", pickle.dumps({"weight": os.system})),
    ("w.pt", nn.Linear(2, 2)),
])  # fmt: skip
def test_a_damaged_or_hostile_file_is_one_plain_error(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    model = nn.Linear(2, 2)
    before = model.weight.clone()
    with pytest.raises(CheckpointError, match=f"{name}: not a"):
        load_weights(model, path)
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"{name}: no such file"):
        load_weights(nn.Linear(2, 2), tmp_path / name)
