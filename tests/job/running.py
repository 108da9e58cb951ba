"""Small runs of unlearn(), how they die, and how two are compared."""

from pathlib import Path

import pytest
import torch
from small import net, sets, trained
from torch import nn

from entangle_fast.job import unlearn
from entangle_fast.methods import Entangled, FineTune
from entangle_fast.methods.process import Process

SMALL = dict(remote_batch1=16, forget_batch1=8, adjacent_batch2=8, forget_batch2=8, remote_batch2=12)
METHODS = {
    "means": Entangled(**SMALL, epochs1=2.0, lr1=0.02, epochs2=2.0, lr2=0.02),  # 6 and 6 steps
    "whole": Entangled(**SMALL, epochs1=2.0, lr1=0.02, epochs2=2.0, lr2=0.02, w2_set="whole", w2="features"),
    "samples": Entangled(**SMALL, epochs1=2.0, lr1=0.02, epochs2=2.0, lr2=0.02, away_from="forget_samples", schedule2="linear"),
    "finetune": FineTune(epochs=3.0, batch=17, lr=0.05),  # 12 steps
}
STEPS = 12


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


def cut(folder, monkeypatch, **options):
    """A run that died with a checkpoint."""
    with monkeypatch.context() as patch:
        die_at(patch, 4)
        with pytest.raises(Die):
            go(out=folder, checkpoint_every=2, **options)


def wider():
    """The shared model with one more class."""
    model = net()
    model[5] = nn.Linear(10, 5)
    return model


# the first lines of a script that runs in a process of its own, with this module
ALONE = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
import torch
from entangle_fast import storage
from entangle_fast.result import Result
import running
torch.set_num_threads(1)
Result.plot = lambda self, folder: []
"""
