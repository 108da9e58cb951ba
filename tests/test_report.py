import csv
import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console

from entangle_fast import report as R
from entangle_fast.facts import MEANINGS, meaning
from entangle_fast.figures.run import write_figures
from entangle_fast.report_table import flat_facts, rebuild, table
from entangle_fast.storage import CheckpointError, save_json, save_tensors

CLASSES = {
    "forget": ["Sneaker"],
    "adjacent": ["Sandal", "Boot"],
    "remote": ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Shirt", "Bag"],
}
FINAL = {
    "original": (99.8, 99.6, 99.2),
    "entangled": (3.1, 95.4, 98.5),
    "gradient_ascent": (3.7, 39.6, 98.3),
    "finetune": (97.2, 99.5, 99.1),
    "neggrad": (8.5, 71.0, 97.9),
    "random_label": (12.0, 80.3, 97.0),
    "retrain": (96.0, 99.4, 99.3),
}
SECONDS = {
    "original": 0.0,
    "entangled": 38.0,
    "gradient_ascent": 1.6,
    "finetune": 9.0,
    "neggrad": 12.0,
    "random_label": 10.0,
    "retrain": 55.0,
}


def make_run(folder, seeds=3):
    """A run folder of the documented formats, with numbers like those of the demo."""
    rng = np.random.default_rng(0)
    methods, history, losses = {}, [], {}
    for name, final in FINAL.items():
        rows = []
        for seed in range(seeds):
            got = {s: float(np.clip(v + rng.normal(0, 0.8), 0, 100)) for s, v in zip(R.SETS, final)}
            per_class = {c: float(np.clip(got[s] + rng.normal(0, 2), 0, 100)) for s in R.SETS for c in CLASSES[s]}
            rows.append(
                {
                    "seed": seed,
                    **got,
                    "seconds": SECONDS[name] * rng.uniform(0.95, 1.05),
                    "peak_mb": 512.0,
                    "per_class": per_class,
                }
            )
            if name in ("original", "retrain"):
                continue
            steps = 200
            for step in range(steps):
                t = (step + 1) / steps
                stage = ("stage1" if t < 0.2 else "stage2") if name == "entangled" else ""
                row = {
                    "method": name,
                    "seed": seed,
                    "stage": stage,
                    "step": step,
                    "epoch": 0,
                    "seconds": SECONDS[name] * t,
                    "loss_forget": 2.0,
                    "note": "x",
                }
                if stage == "stage2":
                    row["angle_deg"] = 90 + 25 * math.exp(-4 * t) + rng.normal(0, 4)
                    row["cosine"] = math.cos(math.radians(row["angle_deg"]))
                if step % 20 == 19 or step == 0:
                    ease = 1 - math.exp(-6 * t)
                    for s, start in zip(R.SETS, FINAL["original"]):
                        dip = (
                            25 * math.exp(-(((t - 0.2) / 0.15) ** 2)) if name == "entangled" and s == "adjacent" else 0
                        )
                        row[f"acc_{s}"] = start + (got[s] - start) * ease - dip
                history.append(row)
        methods[name] = R.aggregate(rows)
    for seed in range(seeds):
        for phase, shift in (("before", 0), ("stage1", 6.5), ("stage2", 6.0)):
            for s, share in zip(R.SETS, (1.0, 0.35 if phase == "stage1" else 0.05, 0.02)):
                base = rng.lognormal(-5.5, 2.2, 900)
                losses[f"entangled/{seed}/{phase}/{s}"] = torch.tensor(
                    base + shift * share * rng.gamma(4, 0.25, 900), dtype=torch.float32
                )
    R.write_history(folder, history)
    save_tensors(folder / R.LOSSES, losses)
    save_json(folder / R.REPORT, {
        "methods": methods,
        "task": {"dataset": "fashion_mnist", "labels": "super", "num_classes": 4, "forget": ["Sneaker"],
                 "classes": CLASSES},
        "facts": {"4.1": {"order_forget": 2.01}, "4.2": {"bound": None, "m": 1.9}},
        "machine": {}, "versions": {}, "commit": None, "figures": [],
    })  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


def render(report, **options):
    console = Console(record=True, file=open("/dev/null", "w"), **options)
    table(report, console, "runs/x")
    return console.export_text()


def test_aggregate():
    rows = [
        {"seed": 0, "forget": 1.0, "adjacent": 90, "remote": None, "seconds": 2.0, "peak_mb": 5, "per_class": {"a": 1}},
        {
            "seed": 1,
            "forget": 3.0,
            "adjacent": 92,
            "remote": math.nan,
            "seconds": 4.0,
            "peak_mb": 7,
            "per_class": {"a": 3, "b": 5},
        },
    ]
    got = R.aggregate(iter(rows))
    assert got["forget"] == 2 and got["adjacent"] == 91 and got["remote"] is None
    assert got["seconds"] == 3 and got["peak_mb"] == 7 and got["per_class"] == {"a": 2, "b": 5}
    assert got["std"]["forget"] == pytest.approx(math.sqrt(2)) and got["std"]["remote"] is None
    assert got["seeds"] == rows
    assert R.aggregate(rows[:1])["std"]["forget"] is None
    with pytest.raises(ValueError, match="rows"):
        R.aggregate([])


def test_history_round_trip(tmp_path):
    rows = [
        {"method": "1", "seed": 0, "step": 1, "stage": "stage1", "acc_forget": None, "lr": 0.1, "who": "me, you"},
        {"method": "1", "seed": 0, "step": 2, "w2": 0.5},
    ]
    path = R.write_history(tmp_path, rows)
    header = next(csv.reader(path.open()))
    assert header == [*R.HISTORY_COLUMNS, "lr", "who"]
    got = R.read_history(tmp_path)
    assert (
        got[0]["method"] == "1" and got[0]["acc_forget"] is None and got[0]["lr"] == 0.1 and got[0]["who"] == "me, you"
    )
    assert got[1]["w2"] == 0.5 and got[1]["step"] == 2.0 and got[1]["who"] is None
    assert R.read_history(tmp_path / "none") == []
    for bad in (b"a,b\n1,2\n", b"\xff\xfe\x00", b'method,step\n"x'):
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match="history.csv"):
            R.read_history(tmp_path)


def test_table_for_a_terminal(run):
    text = render(R.read_report(run), width=120, force_terminal=True)
    for part in (
        "forget ↓",
        "adjacent ↑",
        "remote ↑",
        "seconds",
        "peak MB",
        "gradient ascent",
        " ± ",
        "3 seeds",
        "forgetting Sneaker from fashion_mnist",
        "Per class",
        "Trouser",
        "4.1 order_forget: 2.01",
        "╭",
    ):
        assert part in text
    lines = text.splitlines()
    order = [
        next(i for i, line in enumerate(lines) if line.startswith(f"│ {n}"))
        for n in ("original", "entangled", "retrain")
    ]
    assert order == sorted(order)
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("options", [{"width": 40}, {"width": 120}])
def test_plain_table_is_whole_and_without_boxes(run, options):
    text = render(R.read_report(run), **options)
    assert "╭" not in text and "│" not in text and "…" not in text
    row = next(line for line in text.splitlines() if line.startswith("gradient ascent"))
    assert row.count("±") == 3 and "512" in row


def test_table_marks_losses_in_red(run):
    console = Console(width=120, force_terminal=True, color_system="standard", file=open("/dev/null", "w"), record=True)
    table(R.read_report(run), console)
    styled = console.export_text(styles=True)
    row = next(line for line in styled.splitlines() if "gradient ascent" in line)
    assert "\x1b[31m" in row and "\x1b[31m" not in next(line for line in styled.splitlines() if "entangled" in line)


def test_names_are_text_not_markup():
    report = {"methods": {"[red]x[/]": R.aggregate([{"forget": 1.0, "per_class": {"[/bold]": 1.0}}])}}
    text = render(report, width=100)
    assert "[red]x[/]" in text and "[/bold]" in text


def test_many_classes_keep_the_ones_that_lost_most():
    names = [f"c{i}" for i in range(100)]
    report = {
        "methods": {
            "original": R.aggregate([{"per_class": dict.fromkeys(names, 90.0)}]),
            "m": R.aggregate([{"per_class": {n: float(i) for i, n in enumerate(names)}}]),
        },
        "task": {"classes": {"forget": ["c99"], "adjacent": names[:2], "remote": names[2:99]}},
    }
    shown, left_out = R.shown_classes(report, 5)
    assert shown == [("forget", "c99"), ("adjacent", "c0"), ("adjacent", "c1"), ("remote", "c2"), ("remote", "c3")]
    assert left_out == 95
    assert "70 retained classes" in render(report, width=100)


def test_figures(run):
    paths = write_figures(run)
    assert [p.name for p in paths] == [
        "loss_distributions.png",
        "accuracy_over_time.png",
        "per_class.png",
        "angle.png",
        "frontier.png",
    ]
    for path in paths:
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000
    assert not list(run.glob("*.tmp"))


def test_rebuild_notes_the_figures_and_drops_stale_ones(tmp_path):
    save_json(tmp_path / R.REPORT, {"methods": {"mine": R.aggregate([{"seed": 0, "forget": 1.0, "adjacent": 2.0}])}})
    (tmp_path / "angle.png").write_bytes(b"old")
    console = Console(record=True, file=open("/dev/null", "w"), width=100)
    rebuild(tmp_path, console)
    assert json.loads((tmp_path / R.REPORT).read_text())["figures"] == ["frontier.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["frontier.png", R.REPORT]
    assert str(tmp_path / "frontier.png") in console.export_text()


def test_figures_of_odd_numbers(tmp_path):
    """Empty sets, infinite losses, one step, unknown methods: drawn or skipped, never a traceback."""
    save_json(
        tmp_path / R.REPORT,
        {"methods": {"new": R.aggregate([{"forget": 0.0, "adjacent": 0.0, "per_class": {"$a_b$": 1}}])}},
    )
    save_tensors(
        tmp_path / R.LOSSES,
        {
            "new/0/before/forget": torch.tensor([math.inf, 0.0, math.nan]),
            "new/0/after/forget": torch.empty(0),
            "odd": torch.ones(3),
        },
    )
    R.write_history(tmp_path, [{"method": "new", "step": 0, "cosine": 1.0000001, "seconds": 0.0, "acc_forget": 50.0}])
    assert len(write_figures(tmp_path)) == 5


def test_report_files_that_cannot_be_used(tmp_path):
    with pytest.raises(FileNotFoundError, match="report.json"):
        R.read_report(tmp_path)
    for bad in ({}, {"methods": []}, {"methods": {"a": 1}}, {"methods": {"a": {"seeds": 3}}}):
        (tmp_path / R.REPORT).write_text(json.dumps(bad))
        with pytest.raises(CheckpointError, match="report.json"):
            R.read_report(tmp_path)


def test_what_was_measured_is_explained():
    facts = {"first_order": {"applies": True, "order_forget": 2.01, "order_adjacent": 1.0}, "forget_bound": {"m": {"min": 1.5, "q05": 2.0}},
             "protected": {"0.weight": [3, 9]}, "of_another_method": 7}  # fmt: skip
    report = {"methods": {"m": R.aggregate([{"forget": 1.0}])}, "facts": facts}
    lines = dict(line.strip().split(": ", 1) for line in render(report, width=60).split("Measured on this run\n")[1].splitlines())
    assert "good: near 2" in lines["first_order order_forget"] and "good: near 1" in lines["first_order order_adjacent"]
    assert "smallest" in lines["forget_bound m min"] and "left out" in lines["forget_bound m q05"]
    assert lines["protected 0.weight"].startswith("[3, 9]  ") and lines["of_another_method"] == "7"


def test_every_fact_of_a_run_has_a_line():
    from small import sets, trained

    import entangle_fast as ef

    method = ef.Entangled(remote_batch1=16, forget_batch1=8, adjacent_batch2=8, forget_batch2=8, remote_batch2=12, epochs1=0.4, epochs2=0.7)
    keys = [key for key, _ in flat_facts(ef.unlearn(trained(steps=5), **sets(), method=method, progress=False).facts)]
    assert len(keys) > 15 and all(meaning(key) for key in keys)
    assert all(any(key.startswith(start) for key in (*keys, "first_order why", "protected x")) for start in MEANINGS)
