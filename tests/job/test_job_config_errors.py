"""What is wrong with a config is said of the key as the user wrote it, not of the argument that it becomes."""

import copy
from pathlib import Path

import pytest
import torch

from entangle_fast.config import RunConfig
from entangle_fast.config_reading import ConfigError, from_dict, from_toml
from entangle_fast.job_config import unlearn_from_config
from entangle_fast.storage import save_toml

GOOD = {
    "task": {"forget": ["Sneaker"]},
    "model": {"factory": "entangle_fast.tasks:SmallCNN", "kwargs": {"num_classes": 4}},
    "method": {"name": "entangled", "epochs1": 0.004, "epochs2": 0.02},
    "run": {"progress": False, "threads": 1},
}
BAD = [
    ({"model.weights": "none.safetensors"}, r"model\.weights: .*none\.safetensors"),
    ({"model.weights": "list.pt"}, r"model\.weights: \S*list\.pt holds no state dict"),
    ({"model.weights": "other.pt"}, r"model\.weights: \S*other\.pt does not fit the model"),
    ({"model.factory": "entangle_fast.tasks:SmalCNN"}, r"model\.factory: cannot make .*the nearest is 'SmallCNN'"),
    ({"model.factory": "no_such_package:net"}, r"model\.factory: cannot make .*no_such_package.*none in /"),
    ({"model.factory": "needy:net"}, r"model\.factory: cannot make 'needy:net': No module named 'no_such_package'$"),
    ({"model.kwargs": {"num_classes": 4, "image_size": 7}}, r"model\.factory: cannot make .*image_size: got 7"),
    ({"task.forget": ["Sneeker"]}, r"task\.forget: got 'Sneeker'"),
    ({"task.forget": ["Sneaker", "Sneaker"]}, r"task\.forget: got"),
    ({"task.forget": ["Bag"]}, r'task\.forget: got Bag, .*shares its superclass; write adjacency = "knn" in \[task\]$'),
    ({"task.path": "nowhere"}, r"task\.path: "),
    ({"task.dataset": "cifar10", "task.path": "nowhere"}, r"task\.path: nowhere lacks"),
    ({"task.dataset": "image_folder", "task.path": "nowhere"}, r"task\.path: nowhere has no folder"),
    ({"run.device": "gpu"}, r"run\.device: cannot use 'gpu'"),
    ({"method.alpha": 7}, r"method\.alpha: got 7"),
    ({"method.lr1": -1.0}, r"method\.lr1: got -1"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_the_key_is_named(change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save([1.0], "list.pt")
    Path("needy.py").write_text("import no_such_package")
    torch.save({"x": torch.ones(1)}, "other.pt")
    data = copy.deepcopy(GOOD)
    data["run"]["out"] = "run"
    for key, value in change.items():
        table, name = key.split(".")
        data[table][name] = value
    with pytest.raises(ConfigError, match=message) as error:
        unlearn_from_config(from_dict(RunConfig, data))
    text = str(error.value)
    assert not any(f"{inner}: " in text for inner in ("root", "folder", "path: path", "name")), text
    assert not (tmp_path / "run").exists()


def test_the_line_of_a_method_option(tmp_path):
    path = save_toml(tmp_path / "job.toml", {**GOOD, "method": {"name": "entangled", "lr1": -1.0}})
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if "lr1" in text)
    with pytest.raises(ConfigError, match=rf"job\.toml:{line}: method\.lr1: got -1"):
        from_toml(path, RunConfig)
