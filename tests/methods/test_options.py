"""Options as they are given: unknown ones and wrong kinds are named, whole numbers serve where a float is meant."""

import dataclasses
import inspect

import numpy as np
import pytest
import torch
from small import data, trained

from entangle_fast.methods import METHODS, Entangled, FineTune, Retrain, Scrub
from entangle_fast.methods.process import sample_cross_entropy


@pytest.mark.parametrize("call, message", [
    (lambda: Entangled(lr=1), "^lr: Entangled has no such option; did you mean lr1 or lr2.$"),
    (lambda: FineTune(lr1=1), "^lr1: FineTune has no such option; did you mean lr.$"),
    (lambda: Scrub(epoch=1), "^epoch: Scrub has no such option; did you mean epochs or max_epochs.$"),
    (lambda: Retrain(zzz=1), "^zzz: Retrain has no such option; it has epochs, lr, batch, weight_decay$"),
    (lambda: dataclasses.replace(Entangled(), alfa=1), "^alfa: Entangled has no such option; did you mean alpha.$"),
    (lambda: Entangled(alpha="0.5"), "^alpha: got str; needs a number$"),
    (lambda: Entangled("0.5"), "^alpha: got str; needs a number$"),
    (lambda: Entangled(lr1=None), "^lr1: got NoneType; needs a number$"),
    (lambda: Entangled(lr1=torch.tensor(0.1)), "^lr1: got Tensor; needs a number: give .item..$"),
    (lambda: Entangled(lr1=True), "^lr1: got True; needs a number$"),
    (lambda: Entangled(remote_batch1=16.5), "^remote_batch1: got 16.5; needs a whole number$"),
    (lambda: FineTune(stop_at="never"), "^stop_at: got str; needs a number$"),
])  # fmt: skip
def test_what_is_no_option(call, message):
    with pytest.raises(ValueError if "16.5" in message else TypeError, match=message):
        call()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_names_its_options(name):
    cls = METHODS[name]
    with pytest.raises(TypeError, match=f"^momentun: {cls.__name__} has no such option"):
        cls(momentun=0.9)
    assert list(inspect.signature(cls).parameters) == [f.name for f in dataclasses.fields(cls)]  # what help() shows


def test_numbers_of_every_kind():
    given = Entangled(1, lr1=1, epochs1=np.float32(2), remote_batch1=np.int64(7))
    assert given == Entangled(alpha=1.0, lr1=1.0, epochs1=2.0, remote_batch1=7)
    assert type(given.epochs1) is float and type(given.remote_batch1) is int  # what config.toml can say
    assert FineTune(stop_at=None).stop_at is None and FineTune(stop_at=0).stop_at == 0.0


@pytest.mark.parametrize("name", METHODS)
def test_whole_numbers_serve_where_a_float_is_meant(name):
    cls = METHODS[name]
    floats = {f.name for f in dataclasses.fields(cls) if f.type == "float"}
    whole = {n: v for n, v in {"epochs": 1, "epochs1": 1, "epochs2": 1, "lr": 1, "lr1": 1, "lr2": 1, "clip": 2}.items() if n in floats}
    method = cls(**whole)
    if hasattr(method, "omega"):
        method = cls(**{**whole, "omega": 0})
    if name != "retrain":
        method.start(trained(), data(), sample_cross_entropy, 0).step()
