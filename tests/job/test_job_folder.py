"""What lies in a run's folder is not lost, and not gone on with by another run."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from running import ALONE, SMALL, Die, bits, cut, die_at, go, same, wider
from small import CLASSES, flat, net, sets, trained
from torch import nn
from torch.utils.data import TensorDataset

from entangle_fast import storage
from entangle_fast.lock import LOCK
from entangle_fast.methods import Entangled, FineTune
from entangle_fast.report import CHECKPOINT


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
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    running.go(out={out!r}, checkpoint_every=2)
except storage.CheckpointError as error:
    print(error)
"""


def test_a_real_limit_on_writing(tmp_path):
    code = ALONE + FULL.format(out=str(tmp_path / "out"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "checkpoint.safetensors: could not be written" in done.stdout, done.stderr
    assert not (tmp_path / "out").exists()


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
    cut(tmp_path, monkeypatch)
    good, model = (tmp_path / CHECKPOINT).read_bytes(), change.pop("model", trained())
    start = bits(model)
    with pytest.raises(storage.CheckpointError, match=message):
        go(model, **{"out": tmp_path, "resume": True, **change})
    assert (tmp_path / CHECKPOINT).read_bytes() == good and same(bits(model), start)


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


BUSY = """
from entangle_fast.methods.process import Process
take = Process.step
def waiting(self):
    if self.done == 3:
        print("there", flush=True)
        sys.stdin.read()
    return take(self)
Process.step = waiting
running.go(out={out!r}, checkpoint_every=2)
"""


def test_a_folder_that_another_process_writes_to(tmp_path):
    """Refused with every option, the data not looked at and nothing changed, and the other run ends as if nobody had come."""
    code = ALONE + BUSY.format(out=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "there\n"
        model, before = trained(), (tmp_path / CHECKPOINT).read_bytes()
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(ValueError, match=f"^out: {tmp_path} is being written by another process"):
                go(model, out=tmp_path, **{name: None for name in sets()}, **options)
        result = go(out=None)
        for overwrite in (False, True):
            with pytest.raises(ValueError, match=f"^folder: {tmp_path} is being written by another process"):
                result.save(tmp_path, overwrite=overwrite)
        assert (tmp_path / CHECKPOINT).read_bytes() == before and same(bits(model), bits(trained()))
        process.communicate()
    assert process.returncode == 0 and LOCK not in {p.name for p in tmp_path.iterdir()}
    assert same(storage.load_tensors(tmp_path / "model.safetensors"), bits(result.model))


def test_what_a_killed_run_held_is_gone_on_with(tmp_path, monkeypatch):
    cut(tmp_path, monkeypatch)
    (tmp_path / LOCK).touch()  # as kill -9 leaves it, see test_lock
    assert same(bits(go(net(), out=tmp_path, resume=True).model), bits(go().model)) and not (tmp_path / LOCK).exists()
    (tmp_path / LOCK).touch()
    go().save(tmp_path, overwrite=True)
    assert not (tmp_path / LOCK).exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / LOCK).touch()
    assert same(bits(go(out=tmp_path / "other").model), bits(go().model))  # no run lies there


def test_a_checkpoint_cut_off(tmp_path):
    (tmp_path / CHECKPOINT).write_bytes(b"\x00\x01half")
    with pytest.raises(storage.CheckpointError, match="not a readable safetensors file"):
        go(out=tmp_path, resume=True)


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    model = trained()
    for out in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / "link"):
        for option in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(ValueError, match=r"^out: got .*(file|link).* is a file; needs a folder, .*give another path"):
                go(model, out=out, **option)
    assert same(bits(model), bits(trained())) and (tmp_path / "file").read_text() == "mine"
