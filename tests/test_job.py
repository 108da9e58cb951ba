"""unlearn(): the whole job, its checkpoints, its errors."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small import CLASSES, flat, net, sets, trained
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from entangle_fast import job, report, storage
from entangle_fast.job import CHECKPOINT, unlearn
from entangle_fast.methods import Entangled, FineTune, GradientAscent, Lookahead
from entangle_fast.methods.process import NonFinite, Process

SMALL = dict(remote_batch1=16, forget_batch1=8, adjacent_batch2=8, forget_batch2=8, remote_batch2=12)
METHODS = {
    "means": Entangled(**SMALL, epochs1=2.0, lr1=0.02, epochs2=2.0, lr2=0.02),  # 6 and 6 steps
    "whole": Entangled(**SMALL, epochs1=2.0, lr1=0.02, epochs2=2.0, lr2=0.02, w2_set="whole", w2="features"),
    "samples": Entangled(**SMALL, epochs1=2.0, lr1=0.02, epochs2=2.0, lr2=0.02, away_from="forget_samples", schedule2="linear"),
    "finetune": FineTune(epochs=3.0, batch=17, lr=0.05),  # 12 steps
}
STEPS = 12


@pytest.fixture(autouse=True, scope="module")
def _one_thread_and_no_figures():
    """Figures have their own tests; here they would be most of the time."""
    threads, draw = torch.get_num_threads(), job.Result.plot
    torch.set_num_threads(1)
    job.Result.plot = lambda self, folder: []
    yield
    torch.set_num_threads(threads)
    job.Result.plot = draw


def go(model=None, method="means", **options):
    method = METHODS.get(method, method) if isinstance(method, str) else method
    return unlearn(trained() if model is None else model, **{**sets(), **options}, method=method, progress=False)


def bits(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def untimed(history):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


class Die(Exception):
    """Stands for whatever kills a run."""


def die_at(monkeypatch, step, error=Die):
    """The step number `step`, from 0, raises when its gradients are already formed."""
    take = Process.step

    def stepping(self):
        if self.done == step:
            for p in self.params:
                p.grad = torch.ones_like(p)
            raise error
        return take(self)

    monkeypatch.setattr(Process, "step", stepping)


# ---- what it gives ----


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


# ---- interrupted, killed, resumed ----


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("step", [0, 1, 4, 5, 6, 7, 11])
def test_a_run_that_died_resumes_to_the_bit(method, step, tmp_path, monkeypatch):
    whole = go(method=method, out=tmp_path / "whole", checkpoint_every=2, eval_every=3)
    with monkeypatch.context() as patch:
        die_at(patch, step)
        with pytest.raises(Die):
            go(method=method, out=tmp_path / "cut", checkpoint_every=2, eval_every=3)
    assert (tmp_path / "cut" / CHECKPOINT).exists() == (step >= 2)
    # the second session starts with other weights: all must come from the checkpoint, unless there is none
    model = net(seed=3) if step >= 2 else trained()
    resumed = go(model, method=method, out=tmp_path / "cut", checkpoint_every=2, eval_every=3, resume=True)
    assert same(bits(resumed.model), bits(whole.model))
    assert untimed(resumed.history) == untimed(whole.history) and same(resumed.losses, whole.losses)
    assert resumed.before == whole.before and resumed.after == whole.after and resumed.facts == whole.facts
    assert not (tmp_path / "cut" / CHECKPOINT).exists()


def test_it_may_die_twice(tmp_path, monkeypatch):
    whole = go()
    for step in (3, 9):
        with monkeypatch.context() as patch:
            die_at(patch, step)
            with pytest.raises(Die):
                go(out=tmp_path, checkpoint_every=1, resume=True)
    assert same(bits(go(out=tmp_path, checkpoint_every=1, resume=True).model), bits(whole.model))


def test_a_run_that_stopped_early_stays_stopped(tmp_path):
    method = GradientAscent(epochs=50, lr=0.5, batch=10, stop_at=0.2)
    result = go(method=method)
    assert len(result.history) < 100 and result.after["forget"] < 50
    # ctrl-C in the very step that stops it: nothing is left to do after a resume
    process = Process.step

    def interrupted(self):
        row = process(self)
        if self.stopped:
            os.kill(os.getpid(), signal.SIGINT)
        return row

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Process, "step", interrupted)
        go(method=method, out=tmp_path)
    again = go(method=method, out=tmp_path, resume=True)
    assert same(bits(again.model), bits(result.model)) and len(again.history) == len(result.history)


@pytest.mark.parametrize("step", [2, 8])
def test_ctrl_c_ends_after_the_step_and_keeps_the_checkpoint(step, tmp_path, monkeypatch):
    whole, models = go(), []
    take = Process.step

    def stepping(self):
        if self.done == step:
            os.kill(os.getpid(), signal.SIGINT)  # in the midst of the step
        row = take(self)
        models.append(bits(self.model))
        return row

    model, before = trained(), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Process, "step", stepping)
        go(model, out=tmp_path)
    assert len(models) == step + 1 and same(bits(model), models[-1]) and signal.getsignal(signal.SIGINT) is before
    kept = storage.load_tensors(tmp_path / CHECKPOINT)
    assert all(torch.equal(kept[f"model.{k}"], v) for k, v in bits(model).items())
    assert same(bits(go(net(), out=tmp_path, resume=True).model), bits(whole.model))


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import test_job as t
from entangle_fast.methods.process import Process
t.job.Result.plot = lambda self, folder: []
take = Process.step
def slow(self):
    row = take(self)
    print(self.done, flush=True)
    time.sleep(0.05)
    return row
Process.step = slow
t.go(out={out!r}, checkpoint_every=1)
"""


def test_kill_9(tmp_path):
    code = KILLED.format(tests=str(Path(__file__).parent), out=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line) == 8:
                time.sleep(0.02)
                process.kill()
                break
    assert process.returncode == -signal.SIGKILL
    assert storage.load_metadata(tmp_path / CHECKPOINT)  # readable, whatever moment it was
    assert same(bits(go(net(), out=tmp_path, resume=True).model), bits(go().model))


# ---- what must not be lost ----


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
    ([0], 2, "stage1, step 3 of 6: non-finite loss on the forget set", 2),
    ([1], 2, "stage2, step 3 of 6: non-finite loss on the adjacent set", 8),
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
            return Sharp.apply(losses) if len(calls) > 3 else losses
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


def test_a_full_disk_keeps_what_was_there(tmp_path, monkeypatch):
    whole = go()
    with monkeypatch.context() as patch:
        die_at(patch, 5)
        with pytest.raises(Die):
            go(out=tmp_path, checkpoint_every=2)
    good = (tmp_path / CHECKPOINT).read_bytes()

    def full(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    model = trained()
    with monkeypatch.context() as patch:
        patch.setattr(storage, "save_file", full)
        with pytest.raises(storage.CheckpointError, match="No space left.*free space or choose another folder"):
            go(model, out=tmp_path, checkpoint_every=2, resume=True)
    assert torch.isfinite(flat(model)).all()
    assert (tmp_path / CHECKPOINT).read_bytes() == good and [p.name for p in tmp_path.iterdir()] == [CHECKPOINT]
    assert same(bits(go(net(), out=tmp_path, resume=True).model), bits(whole.model))


FULL = """
import resource, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import test_job as t
t.job.Result.plot = lambda self, folder: []
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    t.go(out={out!r}, checkpoint_every=2)
except t.storage.CheckpointError as error:
    print(error)
"""


def test_a_real_limit_on_writing(tmp_path):
    code = FULL.format(tests=str(Path(__file__).parent), out=str(tmp_path / "out"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "checkpoint.safetensors: could not be written" in done.stdout, done.stderr
    assert list((tmp_path / "out").iterdir()) == []


# ---- refusals: each with the model untouched ----


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
    ({"loss": lambda output, y: nn.functional.cross_entropy(output, y)}, "loss: gave shape .. for 2 samples; .*not reduced"),
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


def wider():
    """The shared model with one more class."""
    model = net()
    model[5] = nn.Linear(10, 5)
    return model


@pytest.mark.parametrize("change, message", [
    ({"method": Entangled(**SMALL, alpha=0.25)}, "was written by a run with config.alpha 0.5, this one has 0.25"),
    ({"method": FineTune()}, "was written by a run with method entangled"),
    ({"seed": 1}, "was written by a run with seed 0, this one has 1"),
    ({"forget": sets(forget=12)["forget"]}, "forget: got 12 samples with digest .*, the run in .* had 20 samples with digest"),
    ({"model": nn.Sequential(nn.Linear(6, 4))}, "does not fit this model"),
    ({"model": wider()}, "does not fit this model, first at '5.bias'"),
    ({"model": net(torch.float64), **sets(torch.float64)}, "forget: got 20 samples with digest"),
])  # fmt: skip
def test_a_checkpoint_of_another_run(change, message, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        die_at(patch, 4)
        with pytest.raises(Die):
            go(out=tmp_path, checkpoint_every=2)
    good, model = (tmp_path / CHECKPOINT).read_bytes(), change.pop("model", trained())
    start = bits(model)
    with pytest.raises(storage.CheckpointError, match=message):
        go(model, **{"out": tmp_path, "resume": True, **change})
    assert (tmp_path / CHECKPOINT).read_bytes() == good and same(bits(model), start)


def cut(folder, monkeypatch, **options):
    """A run that died with a checkpoint."""
    with monkeypatch.context() as patch:
        die_at(patch, 4)
        with pytest.raises(Die):
            go(out=folder, checkpoint_every=2, **options)


def other(x, y):
    """One bit of one sample, one label, the order, one sample less."""
    changed, relabelled, order = x.clone(), y.clone(), torch.arange(len(x))
    changed.view(torch.int32)[-1, -1] ^= 1
    relabelled[3] = (relabelled[3] + 1) % CLASSES
    order[[0, 1]] = order[[1, 0]]
    return [(changed, y), (x, relabelled), (x[order], y[order]), (x[:-1], y[:-1])]


@pytest.mark.parametrize("finished", [False, True])
def test_other_data_are_not_gone_on_with(finished, tmp_path, monkeypatch):
    tests = sets(forget=8)
    if finished:
        go(out=tmp_path, test=tests)
    else:
        cut(tmp_path, monkeypatch, test=tests)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    model, start = trained(), bits(trained())
    for name in ("forget", "adjacent", "remote"):
        for pair in other(*sets()[name]):
            with pytest.raises(storage.CheckpointError, match=f"^{name}: got .*the run in .* had .*; give the same samples in the same"):
                go(model, out=tmp_path, resume=True, test=tests, **{name: pair})
    for pair in other(*tests["forget"]):
        with pytest.raises(storage.CheckpointError, match="^test.forget: got"):
            go(model, out=tmp_path, resume=True, test=tests | {"forget": pair})
    with pytest.raises(storage.CheckpointError, match="^test.forget: got none, the run in .* had 8 samples"):
        go(model, out=tmp_path, resume=True)
    assert same(bits(model), start) and before == {p: p.read_bytes() for p in tmp_path.iterdir()}
    wrapped = {name: TensorDataset(*pair) for name, pair in sets().items()}  # the same bytes
    assert same(bits(go(out=tmp_path, resume=True, test=tests, **wrapped).model), bits(go().model))


def test_a_folder_with_a_run_is_refused(tmp_path, monkeypatch):
    cut(tmp_path, monkeypatch)
    model, start, before = trained(), bits(trained()), (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(ValueError, match=r"out: .* not finished; resume=True \(--resume\) goes on with it, overwrite=True \(--overwrite\)"):
        go(model, out=tmp_path)
    with pytest.raises(ValueError, match="resume, overwrite: got both"):
        go(model, out=tmp_path, resume=True, overwrite=True)
    assert same(bits(model), start) and (tmp_path / CHECKPOINT).read_bytes() == before
    whole = go(model, out=tmp_path, overwrite=True)
    assert same(bits(model), bits(go().model)) and not (tmp_path / CHECKPOINT).exists()
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    model = trained()
    with pytest.raises(ValueError, match="out: .* holds a finished run; give another folder, or overwrite=True"):
        go(model, out=tmp_path, seed=1)
    assert same(bits(model), start) and before == {p: p.read_bytes() for p in tmp_path.iterdir()}
    again = go(out=tmp_path, method=FineTune(epochs=0.5), overwrite=True)
    text = (tmp_path / "config.toml").read_text()
    assert 'name = "finetune"' in text and "alpha" not in text  # nothing of the run before
    assert same(storage.load_tensors(tmp_path / "model.safetensors"), bits(again.model)) and again.before == whole.before


@pytest.mark.parametrize("method, tests", [("means", sets(forget=8)), ("finetune", None)])
def test_a_finished_run_gives_its_result_again(method, tests, tmp_path, monkeypatch, capsys):
    whole = go(method=method, out=tmp_path, eval_every=3, test=tests)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        die_at(patch, 0)  # no step is taken
        again = unlearn(net(seed=3), **sets(), method=METHODS[method], out=tmp_path, eval_every=3, test=tests, resume=True)
    assert f"{tmp_path} holds the finished run; nothing is left to do" in capsys.readouterr().err
    assert same(bits(again.model), bits(whole.model)) and same(again.losses, whole.losses)
    for name in ("method", "config", "seed", "before", "after", "seconds", "peak_mb", "history", "facts", "task", "settings", "run"):
        assert getattr(again, name) == getattr(whole, name), name
    assert before == {p: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(storage.CheckpointError, match="was written by a run with seed 0, this one has 1"):
        go(method=method, out=tmp_path, test=tests, resume=True, seed=1)
    with pytest.raises(storage.CheckpointError, match="model.safetensors: does not fit this model"):
        go(wider(), method=method, out=tmp_path, test=tests, resume=True)


def test_a_checkpoint_cut_off(tmp_path):
    (tmp_path / CHECKPOINT).write_bytes(b"\x00\x01half")
    with pytest.raises(storage.CheckpointError, match="not a readable safetensors file"):
        go(out=tmp_path, resume=True)


# ---- from a config file ----

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
    from typer.testing import CliRunner

    from entangle_fast import cli

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
    from typer.testing import CliRunner

    from entangle_fast import cli

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


def test_a_class_and_a_model_without_values_are_refused():
    with pytest.raises(ValueError, match="method: got .*Lookahead.*as in ef.Entangled"):
        unlearn(net(), **sets(), method=Lookahead)
    with pytest.raises(ValueError, match="meta device"):
        unlearn(net().to("meta"), **sets(), progress=False)
