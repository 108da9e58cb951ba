"""Factors live as long as their tape: a cycle would hold them until the collector happens to run."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import entangle_fast as ef


@pytest.mark.parametrize("stream", [(), ("gram",)])
def test_factors_are_freed_with_the_tape(stream):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 3))

    def run():
        with ef.capture(model) as tape:
            tape.backward(model(torch.randn(7, 1, 10, 10)).square().sum(1), stream=stream)
        assert tape.gram().shape == (7, 7)
        return weakref.ref(tape)

    gc.collect()
    gc.disable()
    try:
        assert run()() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("stream", [(), ("gram",)])
def test_losses_that_outlive_the_tape_hold_no_factors(stream):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 3))
    with ef.capture(model) as tape:
        losses = model(torch.randn(7, 1, 10, 10)).square().sum(1)
    tape.backward(losses, stream=stream)
    held = [factor.b for _, factor in tape._recorder.uses if hasattr(factor, "b")] or [tape.gram()]
    seen = [weakref.ref(x) for x in held]
    del tape, held
    assert losses.requires_grad and not any(x() is not None for x in seen)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps, lambda tape: copy.deepcopy({"step": [tape]})])
def test_a_tape_is_no_thing_to_copy(duplicate):
    model, x = nn.Linear(4, 2), torch.randn(3, 4)
    with ef.capture(model) as tape:
        tape.backward(model(x).square().sum(1))
    want = tape.gram()
    with pytest.raises(TypeError, match=r"^tape: it cannot be copied or pickled, .*; keep the tape itself, or copy what it answers"):
        duplicate(tape)
    assert torch.equal(copy.deepcopy(tape.gram()), want)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_a_backward_where_gradients_are_off(off):
    model, x = torch.nn.Linear(4, 1), torch.randn(3, 4)
    with ef.capture(model) as tape:
        losses = model(x).squeeze(1)
    with off():
        tape.backward(losses)
        found = tape.gram()
    torch.testing.assert_close(found, x @ x.T + 1)


def test_a_tape_with_itself_and_layers_of_two_dtypes():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4).double(), torch.nn.Tanh())
    head, x = torch.nn.Linear(4, 2), torch.randn(5, 3).double()
    named = {f"{i}.{k}": p for i, m in enumerate((model, head)) for k, p in m.named_parameters()}

    def run(**how):
        with ef.capture(named, batch_size=5) as tape:
            tape.backward(head(model(x).float()).square().sum(1), **how)
        return tape

    tape = run()
    torch.testing.assert_close(tape.gram(tape), tape.gram())
    assert tape.gram().dtype == run(stream=("gram",)).gram().dtype == torch.float64
