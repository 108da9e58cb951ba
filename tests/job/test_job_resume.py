"""A run that is interrupted, killed or cut off goes on to the bit."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from running import ALONE, METHODS, Die, bits, die_at, go, same, untimed, wider
from small import net, sets, trained

from entangle_fast import storage
from entangle_fast.job import unlearn
from entangle_fast.methods import GradientAscent
from entangle_fast.methods.process import Process
from entangle_fast.report import CHECKPOINT


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

    model, before = trained().train(), signal.getsignal(signal.SIGINT)
    said = (rf"^entangled: stopped after step {step + 1} of 12; the model is as that step left it, half unlearned; "
            rf"go on with ef.unlearn\(…, out='{tmp_path}', resume=True\)$")  # fmt: skip
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match=said):
        patch.setattr(Process, "step", stepping)
        go(model, out=tmp_path)
    assert all(module.training for module in model.modules())
    assert len(models) == step + 1 and same(bits(model), models[-1]) and signal.getsignal(signal.SIGINT) is before
    kept = storage.load_tensors(tmp_path / CHECKPOINT)
    assert all(torch.equal(kept[f"model.{k}"], v) for k, v in bits(model).items())
    assert same(bits(go(net(), out=tmp_path, resume=True).model), bits(whole.model))


@pytest.mark.parametrize("before", ["", "finished"])
def test_ctrl_c_after_the_last_step_says_what_is_finished(before, tmp_path, monkeypatch):
    if before:
        go(out=tmp_path)  # leaves a config.toml that is no job's

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    unlearned = "^entangled: stopped after step 12 of 12; the model is as that step left it, unlearned; "
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match=rf"{unlearned}go on with ef.unlearn\(…, out='{tmp_path}'"):
        patch.setattr("entangle_fast.result.Result.report", interrupted)
        go(out=tmp_path, checkpoint_every=5, overwrite=True)
    shows = f"entangle-fast report {tmp_path} shows what is finished$"
    model = trained()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match=unlearned + shows):
        patch.setattr("entangle_fast.result.Result.plot", interrupted)
        go(model, out=tmp_path, checkpoint_every=5, resume=True)
    assert not (tmp_path / CHECKPOINT).exists() and same(bits(go(net(), out=tmp_path, resume=True).model), bits(model))


def test_a_second_ctrl_c_says_that_it_did_not_wait(tmp_path, monkeypatch):
    settle = Process.settle

    def in_the_midst(self):
        if self.done == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        settle(self)

    model = trained().train()
    monkeypatch.setattr(Process, "settle", in_the_midst)
    for out, way in ((None, "no checkpoint was kept: give out= for that"), (tmp_path, rf"go on with ef.unlearn\(…, out='{tmp_path}'")):
        said = f"^finetune: stopped after step 2 of 12; the model may hold a part of the next one; {way}"
        with pytest.raises(KeyboardInterrupt, match=said):
            go(model, "finetune", out=out, checkpoint_every=1)
        assert all(module.training for module in model.modules())


KILLED = """
import signal
from entangle_fast.methods.process import Process
take = Process.step
def heard(self):
    row = take(self)
    print(self.done, flush=True)
    if self.done == 9:
        signal.pause()  # it never gets further, however late the kill comes
    return row
Process.step = heard
running.go(out={out!r}, checkpoint_every=1)
"""


def test_kill_9(tmp_path):
    code = ALONE + KILLED.format(out=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line) == 8:  # its checkpoint is being written, or is there, or step 9 has begun
                process.kill()
                break
    assert process.returncode == -signal.SIGKILL
    assert storage.load_metadata(tmp_path / CHECKPOINT)  # readable, whatever moment it was
    assert same(bits(go(net(), out=tmp_path, resume=True).model), bits(go().model))


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
