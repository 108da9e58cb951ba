import torch

from entangle_fast.metrics import memory
from entangle_fast.metrics.memory import PeakMemory


def test_peak_memory_sees_what_is_held_for_a_moment():
    with PeakMemory() as peak:
        torch.ones(20_000_000).sum()  # 80 MB, gone again
    assert 70 < peak.mb < 200
    with PeakMemory() as nothing:
        pass
    assert nothing.mb < 20


def test_an_outcome_is_there_without_proc(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "none")
    monkeypatch.setattr(memory, "_RESET", tmp_path / "no" / "folder")
    with PeakMemory() as peak:
        torch.ones(1000).sum()
    assert peak.mb >= 0


def test_an_error_inside_passes():
    try:
        with PeakMemory() as peak:
            raise KeyError("x")
    except KeyError:
        assert peak.mb >= 0
