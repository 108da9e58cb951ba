"""Comparisons on a hundredth of the images: the folder, going on, failures, refusals, the table and the page."""

import dataclasses
import gzip
import io
import json
import re
import struct
import sys

import pytest
import torch
from rich.console import Console

from entangle_fast import compare, compare_cell, compare_report, demo, methods, page, storage
from entangle_fast.compare_schedule import Crew, Task, _rest
from entangle_fast.config_reading import ConfigError
from entangle_fast.figures import compare as figures_compare
from entangle_fast.lock import held

NO_ORIGINAL = "the original model could not be trained"


@pytest.fixture(scope="module")
def whole():
    return demo.fashion_mnist(forget="Sneaker", full=False)


@pytest.fixture(autouse=True)
def small(monkeypatch, request, whole):
    def fashion_mnist(forget, labels, full):
        assert not full
        return dataclasses.replace(
            whole, forget=forget, labels=labels, train_x=whole.train_x[::100], train_y=whole.train_y[::100],
            test_x=whole.test_x[::50], test_y=whole.test_y[::50],
        )  # fmt: skip

    monkeypatch.setattr(demo, "fashion_mnist", fashion_mnist)
    monkeypatch.setattr(demo, "EPOCHS", 1)
    if "figures" not in request.fixturenames:  # they take most of the time
        monkeypatch.setattr(figures_compare, "drawings", lambda report: {})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def figures():
    """Asks `small` for them."""


@pytest.fixture
def inline(monkeypatch):
    """Work is done in this process; the list of what was done."""
    done = []

    def work(crew, task):
        done.append(task)
        compare_cell.work(crew.folder, task, crew.jobs)

    monkeypatch.setattr(Crew, "work", work)
    return done


def settings(out, names=("gradient_ascent",), **more):
    options = {"methods": list(names), "seeds": 1, "jobs": 1, "quick": True, "attack_seeds": 1, "attack_steps": 2, "progress": False}
    return compare.read_config(None, out=str(out), **options | more)


def printed(report, width=200, terminal=False):
    text = io.StringIO()
    compare_report.table(report, Console(file=text, width=width, force_terminal=terminal, color_system=None))
    return text.getvalue()


@pytest.mark.usefixtures("figures")
def test_a_comparison(tmp_path, inline):
    found = compare.run(settings(tmp_path, ("finetune", "gradient_ascent"), seeds=2, labels="fine"))
    assert inline[:3] == [Task("train", 0), Task("retrain", 0), Task("original", 0)] and len(inline) == 10
    assert list(found["methods"]) == ["original", "finetune", "gradient_ascent", "retrain"]
    assert not found["failed"] and not found["missing"]
    for name, entry in found["methods"].items():
        assert [row["seed"] for row in entry["seeds"]] == [0, 1]
        for column in compare_report.COLUMNS:
            assert entry["seeds"][0].get(column.key) is not None, (name, column.key)
        assert entry["gap"] == pytest.approx(sum(r["gap"] for r in entry["seeds"]) / 2)
        assert set(found["curves"]["sgd"][name]["steps"]) == {0, 1, 2}
    assert found["methods"]["retrain"]["kl"] == found["methods"]["retrain"]["gap"] == 0 < found["methods"]["finetune"]["kl"]
    cell = json.loads((tmp_path / "cells" / "finetune-1.json").read_text())
    gold = json.loads((tmp_path / "cells" / "retrain-1.json").read_text())["row"]
    assert cell["row"]["gap"] == abs(cell["row"]["forget"] - gold["forget"])
    assert "never saw the forgotten class" in found["task"]["goal"]
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in ("pareto", "delay", "relearning_sgd", "relearning_adam"))
    assert json.loads((tmp_path / "report.json").read_text())["methods"].keys() == found["methods"].keys()
    # nothing is run again, and the same numbers come out
    inline.clear()
    assert compare.run(settings(tmp_path, ("finetune", "gradient_ascent"), seeds=2, labels="fine"))["methods"] == found["methods"]
    assert inline == []
    # a seed's numbers depend on nothing but the seed and the settings; another method may join
    compare.run(settings(tmp_path, ("neggrad",), seeds=1, labels="fine"))
    assert inline == [Task("neggrad", 0)]
    found = compare_report.collect(tmp_path)
    assert {"finetune", "gradient_ascent", "neggrad"} < found["methods"].keys() and found["missing"] == ["neggrad-1"]


def test_it_goes_on_where_it_was_stopped(tmp_path, inline, monkeypatch, capsys):
    whole, work = compare.run(settings(tmp_path / "whole")), Crew.work

    def stopped(crew, task):
        if task.what == "gradient_ascent":
            raise KeyboardInterrupt
        return work(crew, task)

    monkeypatch.setattr(Crew, "work", stopped)
    with pytest.raises(KeyboardInterrupt):
        compare.run(settings(tmp_path / "cut"))
    kept = compare_report.collect(tmp_path / "cut")
    assert kept["missing"] == ["gradient_ascent-0"] and (tmp_path / "cut" / "index.html").exists()
    assert "not run yet: gradient_ascent-0" in printed(kept)
    monkeypatch.setattr(Crew, "work", work)
    inline.clear()
    found = compare.run(settings(tmp_path / "cut", progress=True))
    assert inline == [Task("gradient_ascent", 0)]
    lines = [re.sub(r"\d+ s\b", "0 s", line) for line in capsys.readouterr().err.splitlines()]
    assert lines.pop(0).startswith("compare: 1 cells to run, 3 finished before (methods: 2, seeds: 1), 1 at a time;")
    assert lines == ["compare: 0 of 1 cells, 0 s", "compare: 0 of 1 cells, 0 s, gradient ascent 0", "compare: 1 of 1 cells, 0 s, done"]
    for name in whole["methods"]:
        a, b = ({k: v for k, v in r["methods"][name]["seeds"][0].items() if k not in ("seconds", "peak_mb")} for r in (whole, found))
        assert a == b, name


def test_how_long_it_takes_is_told(tmp_path, inline, capsys):
    compare.run(settings(tmp_path / "run", progress=True))
    lines = capsys.readouterr().err.splitlines()
    assert re.match(r"compare: \d cells to run \(methods: \d, seeds: 1\), 1 at a time; how long", lines[0])
    running = [line for line in lines[1:-1] if ", " in line]
    measured = next(i for i, line in enumerate(running) if "left" in line)
    assert "train" in running[1] and measured == 3, lines  # after the original is trained and the first cell is measured
    assert all(line.endswith("; less than a minute left") for line in running[measured:])
    assert _rest([60.0, 120.0], 40, 2) == "about 30 min left" and _rest([600.0], 24, 1) == "about 4.0 h left"
    assert _rest([120.0], 1, 4) == "about 2 min left"


def test_a_cell_that_fails(tmp_path, inline, monkeypatch):
    def broken(self, model, data, loss, seed):
        raise FloatingPointError("the loss is nan;\nlower lr")

    config = settings(tmp_path, ("gradient_ascent", "neggrad"))
    with monkeypatch.context() as patch:
        patch.setattr(methods.GradientAscent, "start", broken)
        found = compare.run(config)
    error = "FloatingPointError: the loss is nan;\nlower lr"
    assert found["failed"] == [{"method": "gradient_ascent", "seed": 0, "error": error}] and "neggrad" in found["methods"]
    assert "traceback" in json.loads((tmp_path / "cells" / "gradient_ascent-0.json").read_text())
    text = printed(found)
    assert re.search(r"^gradient ascent +failed: FloatingPointError$", text, re.M)
    assert "failed: gradient ascent, seed 0: FloatingPointError: the loss is nan; lower lr; the same command tries again" in text
    assert "failed: FloatingPointError: the loss is nan" in (tmp_path / "index.html").read_text()
    inline.clear()
    found = compare.run(config)
    assert inline == [Task("gradient_ascent", 0)] and not found["failed"] and "gradient_ascent" in found["methods"]


def test_an_original_that_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Crew, "work", lambda crew, task: "killed by SIGKILL")
    found = compare.run(settings(tmp_path, progress=True))
    lines = [re.sub(r"\d+ s\b", "0 s", line) for line in capsys.readouterr().err.splitlines()[1:]]
    assert lines == ["compare: 0 of 4 cells, 0 s", "compare: 0 of 4 cells, 0 s, train 0", "compare: 4 of 4 cells, 0 s, done"]
    assert not found["methods"] and not found["missing"]
    assert {f["method"]: f["error"] for f in found["failed"]} == {
        "original": "killed by SIGKILL", "gradient_ascent": NO_ORIGINAL, "retrain": NO_ORIGINAL
    }  # fmt: skip
    assert "failed: see below" in printed(found) and "not run" not in printed(found)


def idx(path, values):
    header = b"\0\0\x08" + bytes([values.dim()]) + b"".join(struct.pack(">I", n) for n in values.shape)
    path.write_bytes(gzip.compress(header + bytes(values.flatten().tolist())))


def test_processes(tmp_path, monkeypatch):
    """A process of its own does the work, on data of its own folder; one that is killed or cannot start is told apart."""
    y = torch.arange(40).remainder(10).to(torch.uint8)
    data = tmp_path / "data"
    data.mkdir()
    for stem in ("train", "t10k"):
        idx(data / f"{stem}-labels-idx1-ubyte.gz", y)
        idx(data / f"{stem}-images-idx3-ubyte.gz", torch.randint(0, 255, (40, 28, 28), dtype=torch.uint8))
    config = settings(tmp_path / "run")
    config.task.path = str(data)
    storage.save_toml(tmp_path / "run" / compare.CONFIG, compare._settle(tmp_path / "run", config, compare.chosen(config)))
    crew = Crew(tmp_path / "run", 1, 1)
    with held(tmp_path / "run"):  # as `run` does
        assert crew.work(Task("train", 0)) is None
    assert Task("train", 0).done(tmp_path / "run")
    assert not crew.live
    script = tmp_path / "python"
    for body, said in (("kill -9 $$", "killed by SIGKILL; maybe memory ran out: try fewer jobs"), ("echo a >&2; echo b >&2; exit 3", "b")):
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))
        assert crew.work(Task("original", 0)) == said
    crew.stop()
    assert crew.work(Task("original", 0)) is None


def test_refusals(tmp_path, inline):
    with pytest.raises(ConfigError, match="^compare.methods: got 'gradient_asent'; did you mean 'gradient_ascent'"):
        compare.run(settings(tmp_path, ("gradient_asent",)))
    with pytest.raises(ValueError, match="the nearest is 'Sneaker'"):
        compare.run(settings(tmp_path, forget=["Sneakers"]))
    with pytest.raises(ValueError, match="got Bag, .*: forget fewer, or one of T-shirt"):  # not adjacency='knn', which is refused here
        compare.run(settings(tmp_path, forget=["Bag"]))
    with pytest.raises(ConfigError, match="seeds: got 0, needs at least one"):
        settings(tmp_path, seeds=0)
    assert not list(tmp_path.iterdir())
    compare.run(settings(tmp_path / "a"))
    before = {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    other = settings(tmp_path / "a")
    other.method = {"gradient_ascent": {"lr": 0.5}}
    for config, said in (
        (settings(tmp_path / "a", labels="fine"), r"task.labels 'super', this one has 'fine'; give the same, or another --out"),
        (settings(tmp_path / "a", attack_steps=3), "attack_steps 2, this one has 3"),
        (settings(tmp_path / "a", quick=False), "quick True, this one has False"),
        (other, r"method.gradient_ascent.lr 0.005, this one has 0.5"),
    ):
        with pytest.raises(storage.CheckpointError, match=said):
            compare.run(config)
    with held(tmp_path / "a"), pytest.raises(ValueError, match=f"^out: {tmp_path / 'a'} is being written by another process"):
        compare.run(settings(tmp_path / "a"))
    assert before == {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "report.json").write_text("{}")
    with pytest.raises(storage.CheckpointError, match="holds files but no comparison; give another --out"):
        compare.run(settings(tmp_path / "b"))
    (tmp_path / "b" / "config.toml").write_text("[demo]\nforget = 'x'\n")
    with pytest.raises(storage.CheckpointError, match="is no folder of a comparison"):
        compare.run(settings(tmp_path / "b"))


def test_settings(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('[task]\nforget = ["Bag"]\n[compare]\nseeds = 2\nmethods = ["neggrad"]\n[method.scrub]\nlr = 0.25\n')
    config = compare.read_config(path, seeds=5, labels="fine", quick=None)
    assert config.compare.seeds == 5 and config.task.labels == "fine" and config.compare.out == "runs/compare-bag"
    chosen = compare.chosen(config)
    assert list(chosen) == ["neggrad", "scrub", "retrain"] and chosen["scrub"].lr == 0.25
    path.write_text('[task]\nforget = ["Bag"]\n[method.scrub]\nlearning = 0.25\n')
    with pytest.raises(ConfigError, match="^method.scrub: learning: unknown key"):
        compare.chosen(compare.read_config(path))
    path.write_text('[task]\nforget = ["Bag"]\n[method.scrubb]\nlr = 0.25\n')
    with pytest.raises(ConfigError, match="^method: got 'scrubb'; did you mean 'scrub'"):
        compare.chosen(compare.read_config(path))
    path.write_text('[task]\nforget = ["Bag"]\nadjacency = "knn"\n')
    with pytest.raises(ConfigError, match="adjacency"):
        compare.read_config(path)
    everything = compare.chosen(compare.read_config(None))
    assert set(everything) == set(methods.METHODS) and list(everything)[-1] == "retrain"
    tuned = {m.name: m for m in demo.methods(False)}
    assert everything["entangled"] == tuned["entangled"]
    assert compare.chosen(compare.read_config(None, quick=True))["rosu"].epochs == everything["rosu"].epochs / 5


def cells(**columns):
    """An entry of rows that have these values, one a seed."""
    rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
    return compare_report.entry([{"seed": i, **row} for i, row in enumerate(rows)])


def test_means_and_delays():
    delay = next(c for c in compare_report.COLUMNS if c.key == "rcd_sgd")
    forget = compare_report.COLUMNS[0]
    found = cells(forget=[1.0, 2.0, 6.0], rcd_sgd=[10, 20, 30])
    assert found["forget"] == 3.0 and compare_report.summary(found, forget) == ("3.0", "± 2.6")
    assert compare_report.summary(found, delay) == ("20", "± 10")
    assert compare_report.summary(cells(rcd_sgd=[10, ">100", 30]), delay) == ("30", "(1/3 >100)")
    assert compare_report.summary(cells(rcd_sgd=[10, ">100", ">100"]), delay) == (">100", "(2/3)")
    assert compare_report.summary(cells(rcd_sgd=[">100", ">100"]), delay) == (">100", "")
    assert compare_report.summary(cells(forget=[1.0]), forget) == ("1.0", "")
    assert compare_report.summary(cells(forget=[None]), forget) == ("-", "")


def report(**points):
    accuracies = {n: {"forget": [x] * 2, "adjacent": [y] * 2, "remote": [90.0] * 2, "rcd_sgd": [3, 5]} for n, (x, y) in points.items()}
    return {
        "kind": "compare", "methods": {n: cells(**a) for n, a in accuracies.items()}, "failed": [], "missing": [], "notes": [],
        "task": {"forget": ["<b>&"], "dataset": "d", "labels": "super", "goal": "g"}, "jobs": 2, "quick": False, "attack_steps": 10,
        "curves": {"sgd": {}, "adam": {}}, "membership": {}, "settings": dict.fromkeys(points, {"lr": 1.0}),
        "machine": {"cpu": "c", "cores": 2, "ram_gb": 1, "gpu": None}, "versions": {"torch": "2"}, "commit": None, "figures": [],
    }  # fmt: skip


def test_the_front():
    found = report(original=(99.0, 99.0), a=(1.0, 50.0), b=(2.0, 80.0), c=(3.0, 70.0), d=(2.0, 80.0), e=(90.0, 99.5), retrain=(0.0, 100.0))
    assert figures_compare.front(found) == ["a", "b", "d", "e"]
    with figures_compare.style():
        figure = figures_compare.pareto(found)
        names = [t.get_text() for t in figure.legends[0].get_texts()]
    assert {"original", "a", "b", "c", "d", "e", "retrain"} <= set(names)
    looks = figures_compare.looks({"methods": methods.METHODS})
    assert len(set(looks.values())) == len(looks)


def test_the_table():
    found = report(original=(99.0, 99.0), scrub=(1.0, 50.0), retrain=(0.0, 100.0))
    text = printed(found)
    assert re.search(r"^scrub +1\.0 ± 0\.0 +50\.0 ± 0\.0 +90\.0 ± 0\.0 +- +- +- +4 ± 1", text, re.M)
    assert "goal: g" in text and "time methods with --jobs 1" in text and "over 2 seeds" in text
    assert max(map(len, printed(found, 90, True).splitlines()[:7])) <= 90  # two tables where one is too wide
    assert "RCD SGD ↑" in printed(found, 90, True)
    found["jobs"] = 1
    assert "--jobs 1" not in printed(found)


@pytest.mark.usefixtures("figures")
def test_the_page_needs_no_network():
    text = page.render(report(original=(99.0, 99.0), scrub=(1.0, 50.0), retrain=(0.0, 100.0)))
    assert not re.search(r"https?:|//[a-z]|@import|<link|<iframe|<img|\bsrc=|url\((?!#)", text)
    assert all(href.startswith("#") for href in re.findall(r'href="([^"]*)"', text))
    assert "&lt;b&gt;&amp;" in text and "<b>&" not in text
    assert text.count("<svg") == 2 and "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    used, given = (set(re.findall(pattern, text)) for pattern in (r"var\((--\w+)\)", r"(--\w+):"))
    assert used - {"--v"} <= given
