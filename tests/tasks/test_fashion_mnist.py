import gzip
import time

import pytest
import torch

from entangle_fast.tasks import fashion_mnist
from entangle_fast.tasks.fashion_mnist import _DATA, CLASSES, read_idx, read_slice
from entangle_fast.tasks.make_slice import main, pack


def idx(tensor):
    shape = b"".join(n.to_bytes(4, "big") for n in tensor.shape)
    return b"\0\0\x08" + bytes([tensor.dim()]) + shape + tensor.numpy().tobytes()


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("ENTANGLE_FAST_DATA", raising=False)


@pytest.fixture
def full_set(tmp_path):
    """A folder in the full set's format, three images a class, classes mixed, one of the four files gzipped."""
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "t10k"):
        x = torch.randint(0, 256, (30, 28, 28), generator=generator, dtype=torch.uint8)
        y = torch.arange(10, dtype=torch.uint8).repeat(3)
        (tmp_path / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(x)))
        (tmp_path / f"{split}-labels-idx1-ubyte").write_bytes(idx(y))
    return tmp_path


def test_the_shipped_slice_is_small_balanced_quick_and_licensed():
    started = time.perf_counter()
    task = fashion_mnist(full=False)
    assert time.perf_counter() - started < 5
    assert task.train_x.shape == (19000, 1, 28, 28) and task.test_x.shape == (3700, 1, 28, 28)
    assert task.train_y.bincount().tolist() == [1900] * 10 and task.test_y.bincount().tolist() == [370] * 10
    assert sum(p.stat().st_size for p in _DATA.iterdir()) <= 7_900_000
    assert "Zalando" in (_DATA / "LICENSE.fashion-mnist").read_text()
    assert "slice" in task.source


def test_the_slice_holds_the_images_upright():
    # a trouser is taller than wide, a sneaker wider than tall: a wrong scan would swap them
    task = fashion_mnist(full=False)
    for name, tall in (("Trouser", True), ("Sneaker", False)):
        ink = (task.train_x[task.train_y == CLASSES.index(name)] > 60).float().mean(0)[0] > 0.3
        height, width = ink.any(1).sum(), ink.any(0).sum()
        assert (height > width) == tall


def test_pack_and_read_slice_are_inverse(full_set, tmp_path):
    task = fashion_mnist(full_set)
    (tmp_path / "s.xz").write_bytes(pack(task.train_x, task.train_y, 2))
    x, y = read_slice(tmp_path / "s.xz")
    assert y.tolist() == [c for c in range(10) for _ in range(2)]
    for c in range(10):
        assert torch.equal(x[y == c], task.train_x[task.train_y == c][:2])
    with pytest.raises(ValueError, match="per_class: got 4"):
        pack(task.train_x, task.train_y, 4)


def test_make_slice_writes_both_files(full_set, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    main([str(full_set), "--out", str(out), "--train-per-class", "3", "--test-per-class", "1"])
    assert len(read_slice(out / "fashion_mnist_train.xz")[1]) == 30
    assert len(read_slice(out / "fashion_mnist_test.xz")[1]) == 10
    assert "10 images" in capsys.readouterr().out


def test_a_damaged_slice_is_named(full_set, tmp_path):
    task = fashion_mnist(full_set)
    packed = bytearray(pack(task.train_x, task.train_y, 1))
    packed[len(packed) // 2] ^= 0xFF
    (tmp_path / "s.xz").write_bytes(packed)
    with pytest.raises(ValueError, match="s.xz: damaged"):
        read_slice(tmp_path / "s.xz")


def test_where_the_full_set_is_looked_for(full_set, tmp_path, monkeypatch):
    assert len(fashion_mnist(full_set).train_x) == 30
    monkeypatch.setenv("ENTANGLE_FAST_DATA", str(full_set))
    assert len(fashion_mnist().train_x) == 30
    assert len(fashion_mnist(full=False).train_x) == 19000
    monkeypatch.setenv("ENTANGLE_FAST_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="ENTANGLE_FAST_DATA.*full=False"):
        fashion_mnist()
    assert len(fashion_mnist(full_set).train_x) == 30  # the argument wins
    with pytest.raises(FileNotFoundError, match="folder: got"):
        fashion_mnist(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="full: got False together"):
        fashion_mnist(full_set, full=False)


def test_superclasses():
    task = fashion_mnist(full=False, forget="Sneaker")
    of = {name: task.superclass_names[s] for name, s in zip(task.class_names, task.superclass_of.tolist())}
    assert {n for n in of if of[n] == "tops"} == {"T-shirt", "Pullover", "Dress", "Coat", "Shirt"}
    assert {n for n in of if of[n] == "footwear"} == {"Sandal", "Sneaker", "Boot"}
    assert of["Bag"] == "bag" and of["Trouser"] == "trousers"


@pytest.mark.parametrize("raw, message", [
    (b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", "needs the IDX header"),
    (b"\0\0", "needs the IDX header"),
    (b"\0\0\x08\x03\0\0", "needs the IDX header"),
    (b"\0\0\x08\x01\0\0\0\x05abc", "holds 3 bytes of data, its header says 5"),
    (b"\0\0\x08\x03" + b"\xff" * 12, "its header says"),
])
def test_read_idx_refuses_damage(tmp_path, raw, message):
    (tmp_path / "f").write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        read_idx(tmp_path / "f")


def test_read_idx_refuses_damaged_gzip(tmp_path):
    whole = gzip.compress(idx(torch.zeros(9, dtype=torch.uint8)))
    for raw in (whole[:-9], b"plain"):
        (tmp_path / "f.gz").write_bytes(raw)
        with pytest.raises(ValueError, match="f.gz: cannot be read"):
            read_idx(tmp_path / "f.gz")
