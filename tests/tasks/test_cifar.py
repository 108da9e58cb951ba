import os
import pickle
import pickletools

import numpy as np
import pytest
import torch

from entangle_fast.tasks import cifar, cifar10, cifar100

NAMES10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def records(n, labels):
    """Random pixels (n, 3072) uint8 and whole records with the label columns before them."""
    pixels = np.random.default_rng(n).integers(0, 256, (n, 3072), dtype=np.uint8)
    return pixels, np.concatenate([np.asarray(labels, np.uint8).reshape(n, -1), pixels], 1).tobytes()


@pytest.fixture
def binary10(tmp_path):
    for name in ("data_batch_1.bin", "data_batch_2.bin", "test_batch.bin"):
        (tmp_path / name).write_bytes(records(20, list(range(10)) * 2)[1])
    (tmp_path / "batches.meta.txt").write_text("\n".join(NAMES10) + "\n\n")
    return tmp_path


FINE = [f"fine{i}" for i in range(6)]
COARSE = ["even", "odd"]
PAIRS = [(f % 2, f) for f in range(6)] * 2


@pytest.fixture
def binary100(tmp_path):
    for name in ("train.bin", "test.bin"):
        (tmp_path / name).write_bytes(records(12, PAIRS)[1])
    (tmp_path / "fine_label_names.txt").write_text("\n".join(FINE) + "\n")
    (tmp_path / "coarse_label_names.txt").write_text("\n".join(COARSE) + "\n")
    return tmp_path


@pytest.fixture
def python100(tmp_path):
    batch = {b"data": records(12, PAIRS)[0], b"fine_labels": [f for _, f in PAIRS],
             b"coarse_labels": [c for c, _ in PAIRS], b"batch_label": b"training", b"filenames": [b"a.png"] * 12}
    for name in ("train", "test"):
        (tmp_path / name).write_bytes(pickle.dumps(batch, protocol=2))
    meta = {b"fine_label_names": [n.encode() for n in FINE], b"coarse_label_names": [n.encode() for n in COARSE]}
    (tmp_path / "meta").write_bytes(pickle.dumps(meta, protocol=2))
    return tmp_path


def test_cifar10_binary(binary10):
    task = cifar10(binary10, forget="dog")
    assert task.train_x.shape == (40, 3, 32, 32) and task.test_x.shape == (20, 3, 32, 32)
    assert torch.equal(task.test_x.reshape(20, -1), torch.from_numpy(records(20, [0] * 20)[0]))
    assert task.class_names == tuple(NAMES10) and task.superclass_names == ("animal", "vehicle")
    assert [NAMES10[i] for i in range(10) if task.superclass_of[i]] == ["airplane", "automobile", "ship", "truck"]
    assert task.split().train_fine.remote.unique().tolist() == [0, 1, 8, 9]


def test_cifar100_binary(binary100):
    task = cifar100(binary100, forget=["fine2"])
    assert task.train_y.tolist() == [f for _, f in PAIRS]
    assert task.superclass_of.tolist() == [0, 1, 0, 1, 0, 1] and task.superclass_names == ("even", "odd")
    assert task.split().test_fine.adjacent.unique().tolist() == [0, 4]
    assert torch.equal(task.train_x.reshape(12, -1), torch.from_numpy(records(12, PAIRS)[0]))


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_the_python_version_gives_the_same(binary100, python100, protocol):
    batch = pickle.loads((python100 / "train").read_bytes())
    (python100 / "train").write_bytes(pickle.dumps(batch, protocol=protocol))
    (binary100 / "train.bin").rename(binary100 / "aside.bin")
    if protocol == 5:  # numpy's protocol-5 arrays go by another route, which CIFAR never used
        with pytest.raises(pickle.UnpicklingError, match="refused"):
            cifar100(python100, forget="fine2")
        return
    plain = cifar100(python100, forget="fine2")
    (binary100 / "aside.bin").rename(binary100 / "train.bin")
    other = cifar100(binary100, forget="fine2")
    for name in ("train_x", "train_y", "test_x", "test_y", "superclass_of"):
        assert torch.equal(getattr(plain, name), getattr(other, name))
    assert plain.class_names == other.class_names


def python2_batch(pixels, labels):
    """The bytes that Python 2 with an old numpy wrote: 8-bit strings, numpy.core, the 'u1' dtype by STRING codes."""
    n = len(pixels)
    u1 = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    raw = pixels.tobytes()
    array = (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01(K"
             + bytes([n]) + b"M\x00\x0ct" + u1 + b"\x89T" + len(raw).to_bytes(4, "little") + raw + b"tb")
    listed = b"](" + b"".join(b"K" + bytes([v]) for v in labels) + b"e"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels" + listed + b"u."


def test_cifar10_as_python_2_wrote_it(tmp_path):
    pixels, _ = records(20, [0] * 20)
    raw = python2_batch(pixels, list(range(10)) * 2)
    pickletools.dis(raw, out=open(os.devnull, "w"))  # well formed
    for name in ("data_batch_1", "test_batch"):
        (tmp_path / name).write_bytes(raw)
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({b"label_names": [n.encode() for n in NAMES10]}, protocol=2))
    task = cifar10(tmp_path, forget="dog")
    assert torch.equal(task.train_x.reshape(20, -1), torch.from_numpy(pixels))
    assert task.train_y.tolist() == list(range(10)) * 2


class Malicious:
    def __init__(self, call, *arguments):
        self.call = call, arguments

    def __reduce__(self):
        return self.call


def test_a_malicious_pickle_is_refused_and_not_run(python100, tmp_path):
    mark = tmp_path / "ran"
    for value in (Malicious(os.system, f"touch {mark}"), Malicious(eval, f"open({str(mark)!r}, 'w')"),
                  Malicious(np.fromfile, str(python100 / "meta")), np.array([Malicious(os.mkdir, str(mark))], object),
                  np.zeros(3), Malicious(__import__("_codecs").encode, "x", "rot13")):
        (python100 / "train").write_bytes(pickle.dumps({b"data": value}, protocol=2))
        with pytest.raises(pickle.UnpicklingError, match="train: refused.*binary version"):
            cifar100(python100, forget="fine2")
    assert not mark.exists()


def test_a_pickle_cannot_change_what_reads_the_next_one(python100):
    good = (python100 / "train").read_bytes()
    # BUILD with slots state sets attributes on whatever the file named
    for name in (b"numpy\nndarray", b"numpy\ndtype", b"_codecs\nencode", b"numpy.core.multiarray\n_reconstruct"):
        (python100 / "train").write_bytes(b"\x80\x02c" + name + b"\n(N}X\x07\x00\x00\x00__doc__K\x01stb.")
        with pytest.raises(pickle.UnpicklingError, match="train: refused"):
            cifar100(python100, forget="fine2")
    assert all(isinstance(stand_in.__doc__, str) for stand_in in cifar._STAND_INS.values())
    (python100 / "train").write_bytes(good)
    assert len(cifar100(python100, forget="fine2").train_x) == 12


def test_damaged_files_are_named(binary10, python100):
    raw = (python100 / "train").read_bytes()
    for damaged in (raw[:100], b"", b"\xff" * 50):
        (python100 / "train").write_bytes(damaged)
        with pytest.raises(pickle.UnpicklingError, match="train: refused"):
            cifar100(python100, forget="fine2")
    (python100 / "train").write_bytes(pickle.dumps([1]))
    with pytest.raises(ValueError, match="holds a list"):
        cifar100(python100, forget="fine2")
    (python100 / "train").write_bytes(pickle.dumps({b"data": np.zeros((2, 9), np.uint8)}, protocol=2))
    with pytest.raises(ValueError, match="no \\(n, 3072\\) array"):
        cifar100(python100, forget="fine2")
    path = binary10 / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="data_batch_2.bin: holds"):
        cifar10(binary10, forget="dog")


def test_missing_files_are_named(binary100, tmp_path):
    with pytest.raises(FileNotFoundError, match="lacks test_batch, batches.meta"):
        cifar10(tmp_path / "empty", forget="dog")
    (binary100 / "coarse_label_names.txt").unlink()
    with pytest.raises(FileNotFoundError, match="lacks coarse_label_names.txt"):
        cifar100(binary100, forget="fine2")


def test_a_hierarchy_that_does_not_hold_is_refused(binary100):
    (binary100 / "test.bin").write_bytes(records(12, [(1, 0)] + PAIRS[1:])[1])
    with pytest.raises(ValueError, match="fine0 is under two coarse classes"):
        cifar100(binary100, forget="fine2")
    for name in ("train.bin", "test.bin"):
        (binary100 / name).write_bytes(records(10, [p for p in PAIRS if p[1] != 5])[1])
    with pytest.raises(ValueError, match="no sample of fine5"):
        cifar100(binary100, forget="fine2")
