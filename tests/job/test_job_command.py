"""The same job from a config file, through the command line."""

import json
import sys

import pytest
from running import die_at
from typer.testing import CliRunner

from entangle_fast import cli
from entangle_fast.report import CHECKPOINT

CONFIG = """
[task]
dataset = "fashion_mnist"
forget = ["Sneaker"]
[model]
factory = "entangle_fast.tasks:SmallCNN"
kwargs = {{ num_classes = 4 }}
[method]
name = "entangled"
epochs1 = 0.004
epochs2 = 0.02
remote_batch2 = 32
forget_batch2 = 16
adjacent_batch2 = 32
[run]
out = "{out}"
progress = false
threads = 1
"""


def test_from_a_config_file_through_the_command_line(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(CONFIG.format(out=tmp_path / "run"))
    done = CliRunner().invoke(cli.app, ["unlearn", str(path)])
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads((tmp_path / "run" / "report.json").read_text())
    assert found["task"]["dataset"] == "fashion_mnist" and found["task"]["forget"] == ["Sneaker"]
    assert len(found["methods"]["entangled"]["per_class"]) >= 4 and found["methods"]["entangled"]["seconds"]
    text = (tmp_path / "run" / "config.toml").read_text()
    assert 'forget = ["Sneaker"]' in text and "alpha = 0.5" in text
    assert "entangled: 0 of " not in done.stderr  # progress = false
    first = {p: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.suffix != ".png"}
    done = CliRunner().invoke(cli.app, ["unlearn", str(path)])
    assert done.exit_code == 2 and "holds a finished run; give another folder, or overwrite=True (--overwrite)" in done.stderr
    path.write_text(path.read_text().replace("progress = false", "progress = true"))
    done = CliRunner().invoke(cli.app, ["unlearn", str(path), "--resume"])
    assert done.exit_code == 0 and "holds the finished run; nothing is left to do" in done.stderr and "Test accuracy" in done.stdout
    assert first == {p: p.read_bytes() for p in first}
    path.write_text(CONFIG.format(out=tmp_path / "run").replace("epochs1", "epoch1"))
    done = CliRunner().invoke(cli.app, ["unlearn", str(path)])
    assert done.exit_code == 2 and "method.epoch1: unknown key; did you mean 'epochs1'?" in done.stderr.replace("\n", " ")


def test_the_command_that_report_proposes(tmp_path, monkeypatch):
    """An interrupted run: refused without --resume, explained by report, and finished by the line that report says."""
    path, run = tmp_path / "job.toml", tmp_path / "run"
    path.write_text(CONFIG.format(out="elsewhere"))
    with monkeypatch.context() as patch:
        die_at(patch, 2, KeyboardInterrupt)
        path.write_text(path.read_text().replace("progress = false", "checkpoint_every = 1"))
        done = CliRunner().invoke(cli.app, ["unlearn", str(path), "--out", str(run)])
    assert "entangled: 0 of " in done.stderr and "steps, 0 s, stage1" in done.stderr
    assert done.exit_code == 130 and f"go on with: entangle-fast unlearn {path} --out {run} --resume" in done.stderr
    done = CliRunner().invoke(cli.app, ["unlearn", str(path), "--out", str(run)])
    assert done.exit_code == 2 and "holds a run that is not finished; resume=True (--resume) goes on with it" in done.stderr
    done = CliRunner().invoke(cli.app, ["report", str(run)])
    assert done.exit_code == 2
    command = done.stderr.strip().split("go on with entangle-fast ")[1].split()
    assert command == ["unlearn", str(run / "config.toml"), "--resume"]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0 and (run / "report.json").exists() and not (run / CHECKPOINT).exists()
    assert "entangled: 2 of " in done.stderr and " s, done" in done.stderr
    assert not (tmp_path / "elsewhere").exists()


def test_neighbours_in_the_embedding_where_no_class_shares_the_superclass(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(CONFIG.format(out=tmp_path / "run").replace('forget = ["Sneaker"]', 'forget = ["Bag"]\nadjacency = "knn"'))
    done = CliRunner().invoke(cli.app, ["unlearn", str(path)])
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads((tmp_path / "run" / "report.json").read_text())["task"]
    assert found["forget"] == ["Bag"] and found["classes"]["adjacent"] and "Bag" not in found["classes"]["adjacent"]


NET = """
import string, helper_of_this_test
from entangle_fast.tasks import SmallCNN
def make(num_classes):
    assert string.digits and helper_of_this_test.HERE == {here!r}
    return SmallCNN(num_classes)
"""


@pytest.mark.parametrize("there, helper", [("config", "config"), ("config", "current"), ("current", "current")])
def test_a_model_of_a_file_beside_the_config_or_in_the_current_folder(there, helper, tmp_path, monkeypatch):
    """A console script does not look in the current folder; what lies there must not hide a standard module either."""
    folders = {name: tmp_path / name for name in ("config", "current")}
    for name, folder in folders.items():
        folder.mkdir()
        (folder / "string.py").write_text("raise AssertionError")
        (folder / "helper_of_this_test.py").write_text(f"HERE = {name!r}")
    module = f"net_{there}_{helper}"
    (folders[there] / f"{module}.py").write_text(NET.format(here=helper))
    if helper == "current":
        (folders["config"] / "helper_of_this_test.py").unlink()
    for name in ("string", "helper_of_this_test"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder])  # as in a console script
    monkeypatch.chdir(folders["current"])
    path, before = folders["config"] / "job.toml", list(sys.path)
    path.write_text(CONFIG.format(out=tmp_path / "run").replace("entangle_fast.tasks:SmallCNN", f"{module}:make"))
    done = CliRunner().invoke(cli.app, ["unlearn", str(path)])
    assert done.exit_code == 0, (done.output, done.exception)
    assert sys.path == before


@pytest.mark.parametrize("content, message", [(None, "no such file"), (b"hello", "not a readable safetensors file")])
def test_a_bad_weights_file_is_named_by_its_key(content, message, tmp_path):
    path, weights = tmp_path / "job.toml", tmp_path / "w.safetensors"
    if content:
        weights.write_bytes(content)
    path.write_text(CONFIG.format(out=tmp_path / "run").replace("[method]", f'weights = "{weights}"\n[method]'))
    done = CliRunner().invoke(cli.app, ["unlearn", str(path)])
    said = done.stderr.replace("\n", " ")
    assert done.exit_code == 2 and "model.weights: " in said and message in said and not (tmp_path / "run").exists()
