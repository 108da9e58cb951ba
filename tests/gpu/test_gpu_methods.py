"""Methods on a GPU: the host waits once a step, and the step is the CPU's (tests/methods/test_waits.py without one)."""

import contextlib

import pytest
import torch
from small import data, flat, sets, trained

from entangle_fast import methods
from entangle_fast.methods.data import Data
from entangle_fast.methods.process import sample_cross_entropy

pytest.importorskip("triton")


@contextlib.contextmanager
def waiting(mode: str):
    """default: the host may wait; error: torch raises where it would."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("name", [name for name in methods.METHODS if name != "retrain"])  # whose one step is a training
def test_a_step_waits_once_and_is_that_of_the_cpu(name, monkeypatch):
    config = methods.METHODS[name]()
    here = config.start(trained(torch.float64), data(dtype=torch.float64), sample_cross_entropy, 0)
    there = config.start(trained(torch.float64).cuda(), Data.of(**sets(torch.float64), device="cuda", seed=0), sample_cross_entropy, 0)
    settle, eigh, waits = there.settle, torch.linalg.eigh, []

    def read():
        waits.extend(["flags"] * bool(there._unread))
        with waiting("default"):
            settle()

    def solved(k):
        with waiting("default"):
            return eigh(k)

    monkeypatch.setattr(there, "settle", read)
    monkeypatch.setattr(torch.linalg, "eigh", solved)  # it looks whether it converged
    for _ in range(min(here.total, 5)):
        stage, k = there.where()
        waits.clear()
        with waiting("error" if k else "default"):  # the first step of a stage compiles
            there.step()
        here.step()
        assert k == 0 or len(waits) == (stage != "dampen")
    torch.testing.assert_close(flat(there.model).cpu(), flat(here.model), rtol=1e-6, atol=1e-7)
