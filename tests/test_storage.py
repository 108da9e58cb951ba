import errno
import json
import os
from dataclasses import dataclass

import numpy as np
import pytest
import tomlkit
import torch

from entangle_fast import storage
from entangle_fast.storage import (
    CheckpointError,
    atomic_write,
    load_json,
    load_metadata,
    load_tensors,
    save_json,
    save_tensors,
    save_toml,
)


def same_memory(a, b):
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def leftovers(folder):
    return [p.name for p in folder.iterdir() if p.name.endswith(".tmp")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (129,), (2, 3, 5)])
def test_round_trip(tmp_path, dtype, shape):
    tensor = torch.randn(shape).mul(3).to(dtype)
    save_tensors(tmp_path / "t.safetensors", {"x": tensor})
    got = load_tensors(tmp_path / "t.safetensors")["x"]
    assert got.dtype == dtype and got.shape == tensor.shape and torch.equal(got, tensor)


def test_tied_module_stays_tied_and_is_stored_once(tmp_path):
    model = torch.nn.Sequential(torch.nn.Embedding(50, 40), torch.nn.Linear(40, 50, bias=False))
    model[1].weight = model[0].weight
    path = save_tensors(tmp_path / "m.safetensors", model.state_dict())
    assert path.stat().st_size < 1.5 * 50 * 40 * 4
    got = load_tensors(path)
    assert list(got) == ["0.weight", "1.weight"] and same_memory(got["0.weight"], got["1.weight"])
    got["0.weight"][3, 4] = 7.0
    assert got["1.weight"][3, 4] == 7.0
    model.load_state_dict(got)


def test_views_of_one_buffer(tmp_path):
    flat = torch.arange(24.0)
    tensors = {"a": flat[2:8].view(2, 3), "t": flat[2:8].view(2, 3).t(), "b": flat[8:20:3], "alone": torch.ones(2)}
    path = save_tensors(tmp_path / "v.safetensors", tensors)
    got = load_tensors(path)
    assert set(got) == set(tensors) and all(torch.equal(got[n], tensors[n]) for n in tensors)
    assert got["t"].stride() == tensors["t"].stride()
    got["a"][0, 1] = -1
    assert got["t"][1, 0] == -1 and same_memory(got["a"], got["b"]) and not same_memory(got["a"], got["alone"])
    again = load_tensors(save_tensors(tmp_path / "w.safetensors", got))
    assert all(torch.equal(again[n], got[n]) for n in got)


def test_awkward_tensors(tmp_path):
    base = torch.randn(3, 1)
    tensors = {
        "wide": base.expand(3, 1000),
        "base": base,
        "conv": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "grad": torch.randn(3, requires_grad=True),
        "e1": torch.empty(0),
        "e2": torch.empty(0),
    }
    got = load_tensors(save_tensors(tmp_path / "a.safetensors", tensors))
    assert all(torch.equal(got[n], tensors[n]) for n in tensors)
    row = torch.randn(10_000, 10)[5]
    assert save_tensors(tmp_path / "row.safetensors", {"row": row}).stat().st_size < 1000
    assert load_tensors(save_tensors(tmp_path / "none.safetensors", {})) == {}


@pytest.mark.parametrize("bad", [torch.eye(3).to_sparse(), torch.empty(3, device="meta")])
def test_what_cannot_be_stored(tmp_path, bad):
    with pytest.raises(CheckpointError, match="'odd'.*needs a dense"):
        save_tensors(tmp_path / "x.safetensors", {"odd": bad})
    x = torch.zeros(4)
    with pytest.raises(CheckpointError, match="share memory.*clone"):
        save_tensors(tmp_path / "x.safetensors", {"f": x, "i": x.view(torch.int32)})
    assert not list(tmp_path.iterdir())


def test_metadata(tmp_path):
    x = torch.zeros(4)
    path = save_tensors(tmp_path / "x.safetensors", {"a": x, "b": x}, metadata={"step": "7"})
    assert load_metadata(path) == {"step": "7"}


def test_loaded_tensors_outlive_a_new_save(tmp_path):
    path = save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(9)})
    old = load_tensors(path)
    save_tensors(path, {"a": torch.zeros(9)})
    assert old["a"].sum() == 9 and load_tensors(path)["a"].sum() == 0


def test_damaged_and_forged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.safetensors"):
        load_tensors(tmp_path / "none.safetensors")
    good = save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(100)}).read_bytes()
    for content in (b"", b"PK\x03\x04 pickle", good[:50], good[:-1], b"\xff" * 64):
        (tmp_path / "x.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match="x.safetensors"):
            load_tensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "view",
    [
        ["a", 0, [10**15], [0]],
        ["a", 90, [20], [1]],
        ["a", 0, [10], [-1]],
        ["a", -5, [2], [1]],
        ["b", 0, [1], [1]],
        ["a", 0, "x", [1]],
        ["a"],
        3,
    ],
)
def test_forged_views(tmp_path, view):
    header = {storage._VIEWS: json.dumps({"views": {"v": view}})}
    save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(100)}, metadata=header)
    with pytest.raises(CheckpointError, match="x.safetensors"):
        load_tensors(tmp_path / "x.safetensors")


def test_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.bin"
    atomic_write(path, b"old")

    def full(temporary):
        temporary.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match=r"x\.bin.*No space left.*untouched"):
        atomic_write(path, full)
    assert path.read_bytes() == b"old" and not leftovers(tmp_path)

    def no_sync(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_sync)
    with pytest.raises(CheckpointError):
        save_tensors(path, {"a": torch.ones(3)})
    assert path.read_bytes() == b"old" and not leftovers(tmp_path)


def test_really_full_disk(tmp_path):
    resource = pytest.importorskip("resource")
    signal = pytest.importorskip("signal")
    path = save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(10)})
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))
        with pytest.raises(CheckpointError, match="x.safetensors"):
            save_tensors(path, {"a": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert load_tensors(path)["a"].sum() == 10 and not leftovers(tmp_path)


def test_interrupt_while_writing(tmp_path):
    def stop(temporary):
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "x", stop)
    assert not list(tmp_path.iterdir())


def test_folders_are_made_and_a_folder_in_the_way_is_an_error(tmp_path):
    assert atomic_write(tmp_path / "a" / "b" / "x", b"1").read_bytes() == b"1"
    with pytest.raises(CheckpointError, match="could not be written"):
        atomic_write(tmp_path / "a" / "b", b"1")
    with pytest.raises(CheckpointError, match="could not be written"):
        atomic_write(tmp_path / "a" / "b" / "x" / "y", b"1")
    assert not leftovers(tmp_path / "a")


@dataclass
class Point:
    x: float
    path: object


def test_json(tmp_path):
    data = {
        "nan": float("nan"),
        "t": torch.tensor([1.0, float("inf")]),
        "n": np.float32(2),
        3: (1, True, None),
        "d": Point(1.5, tmp_path),
        "é": "ü",
    }
    got = load_json(save_json(tmp_path / "x.json", data))
    assert got == {
        "nan": None,
        "t": [1.0, None],
        "n": 2.0,
        "3": [1, True, None],
        "d": {"x": 1.5, "path": str(tmp_path)},
        "é": "ü",
    }
    with pytest.raises(TypeError, match="plain"):
        save_json(tmp_path / "y.json", {"f": print})
    for bad in (b"[1]", b"{", b"\xff", b"[" * 100_000):
        (tmp_path / "x.json").write_bytes(bad)
        with pytest.raises(CheckpointError, match="x.json"):
            load_json(tmp_path / "x.json")


def test_toml(tmp_path):
    path = save_toml(tmp_path / "x.toml", {"a": {"b": 1, "none": None, "l": ["x"]}, "c": 1e-6})
    assert tomlkit.parse(path.read_text()) == {"a": {"b": 1, "l": ["x"]}, "c": 1e-6}
