"""The demo on a fortieth of its images: the run folder and the format of its report."""

import csv
import dataclasses
import json
import re

import pytest
import torch

from entangle_fast import demo, report, storage
from entangle_fast.lock import held
from entangle_fast.methods import Entangled

NAMES = {"original", "entangled", "gradient_ascent", "finetune", "neggrad", "random_label", "retrain"}
FINE = {"T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot"}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    whole = demo.fashion_mnist(forget="Sneaker", full=False)

    def fashion_mnist(forget, full):
        assert not full
        return dataclasses.replace(
            whole, forget=forget, train_x=whole.train_x[::40], train_y=whole.train_y[::40],
            test_x=whole.test_x[::20], test_y=whole.test_y[::20],
        )  # fmt: skip

    monkeypatch.setattr(demo, "fashion_mnist", fashion_mnist)
    monkeypatch.setattr(demo, "EPOCHS", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_report(tmp_path):
    found = demo.run(seeds=2, out=tmp_path, quick=True, progress=False)
    written = json.loads((tmp_path / report.REPORT).read_text())
    assert written["methods"].keys() == found["methods"].keys() == NAMES
    for name, row in written["methods"].items():
        for key in ("forget", "adjacent", "remote"):
            assert 0 <= row[key] <= 100 and row[key] == pytest.approx(sum(s[key] for s in row["seeds"]) / 2)
        assert row["seconds"] > 0 and row["peak_mb"] >= 0, name
        assert [s["seed"] for s in row["seeds"]] == [0, 1] and set(row["per_class"]) == FINE
    assert written["task"]["forget"] == ["Sneaker"] and "facts" in written and "machine" in written
    with (tmp_path / report.HISTORY).open() as file:
        rows = list(csv.DictReader(file))
    assert {r["method"] for r in rows} == NAMES - {"original"} and {r["seed"] for r in rows} == {"0", "1"}
    losses = storage.load_tensors(tmp_path / report.LOSSES)
    assert {"entangled/0/before/forget", "entangled/1/stage2/remote", "retrain/0/after/adjacent"} <= losses.keys()
    model = demo.SmallCNN(4)
    model.load_state_dict(storage.load_tensors(tmp_path / "model.safetensors"))
    text = (tmp_path / "config.toml").read_text()
    assert 'forget = "Sneaker"' in text and "[methods.entangled]" in text
    assert _timeless(found) == _timeless(demo.run(seeds=2, out=tmp_path, quick=True, progress=False))


def _timeless(found):
    """A report without what a clock or the memory says."""
    rows = {name: [{k: v for k, v in s.items() if k not in ("seconds", "peak_mb")} for s in row["seeds"]]
            for name, row in found["methods"].items()}  # fmt: skip
    return rows, found["task"], found["facts"]


def test_what_was_done_is_kept_when_it_is_interrupted(tmp_path, monkeypatch, capsys):
    train, seeds = demo.train_original, []

    def stopped(task, sets, seed, quick, progress):
        if seed == 1:
            raise KeyboardInterrupt
        seeds.append(seed)
        return train(task, sets, seed, quick, progress)

    monkeypatch.setattr(demo, "train_original", stopped)
    monkeypatch.setattr(demo, "methods", lambda quick=False: [Entangled(epochs1=0.3, epochs2=0.5)])
    with pytest.raises(KeyboardInterrupt):
        demo.run(seeds=3, out=tmp_path, quick=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "training, seed 0: 0 of 1 epochs, 0 s" and re.match(r"training, seed 0: 1 of 1 epochs, \d+ s, done", lines[1])
    assert lines[2].startswith("entangled: few steps (stage1 1, stage2 1)") and lines[3].startswith("entangled: 0 of ")
    assert lines[-1].startswith("entangled: ") and lines[-1].endswith(" s, done")
    row = json.loads((tmp_path / report.REPORT).read_text())["methods"]["entangled"]
    assert seeds == [0] and [s["seed"] for s in row["seeds"]] == [0]


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="seeds: got 0; needs at least one"):
        demo.run(seeds=0, out=tmp_path)
    with pytest.raises(ValueError, match="got 'Sneakers', which is no class; the nearest is 'Sneaker'"):
        demo.run(forget="Sneakers", out=tmp_path)
    with pytest.raises(ValueError, match="got Bag, .*shares its superclass; here .*: forget fewer, or one of T-shirt, .*, Boot$"):
        demo.run(forget="Bag", out=tmp_path)
    ungrouped = dataclasses.replace(demo.fashion_mnist(forget="Bag", full=False), superclass_names=(), superclass_of=None, labels="fine")
    with pytest.raises(ValueError, match="without superclasses; here .*: name superclasses, of an image folder in its superclasses.toml$"):
        demo.split_by_label(ungrouped)
    with held(tmp_path), pytest.raises(ValueError, match=f"^out: {tmp_path} is being written by another process"):
        demo.run(out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_methods_are_those_of_the_table():
    assert {m.name for m in demo.methods()} | {"original"} == NAMES
    assert {m.name for m in demo.methods(quick=True)} | {"original"} == NAMES
