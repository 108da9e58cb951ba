import sys
import types

import pytest
import torch

import entangle_fast as ef


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_error_says_what_is_missing():
    with pytest.raises(ef.BackendError, match="no GPU: torch .*on the CPU there is nothing to compile"):
        ef.warmup()


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="device: got 'cpu'"):
        ef.warmup("cpu")
    with pytest.raises(ValueError, match="dtypes: got torch.float64"):
        ef.warmup(dtypes=(torch.float32, torch.float64))


@pytest.fixture
def gpu(monkeypatch):
    """A machine that says it has one GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.device("cpu"))  # a context that changes nothing here


def test_it_hands_over_to_the_kernels(gpu, monkeypatch):
    calls = []
    kernels = types.SimpleNamespace(warmup=lambda *args: calls.append(args))
    monkeypatch.setitem(sys.modules, "entangle_fast.kernels.warmup", kernels)
    ef.warmup("cuda", [torch.float16], sweep=True)
    assert calls == [(torch.device("cuda:0"), (torch.float16,), True)]
    with pytest.raises(ValueError, match="device: got 'cuda:1'; this machine has 1"):
        ef.warmup("cuda:1")


def test_without_triton_the_error_says_so(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [m for m in sys.modules if m.startswith("entangle_fast.kernels.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ef.BackendError, match=r"triton is not installed; .*entangle_fast\[triton\]"):
        ef.warmup()
