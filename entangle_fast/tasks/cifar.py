"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from a folder: the binary version, or the python version read safely."""
import pickle
from pathlib import Path

import numpy as np
import torch

from .image_classes import ImageClasses

SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32
ANIMALS = frozenset({"bird", "cat", "deer", "dog", "frog", "horse"})


def cifar10(folder, *, forget, labels="super"):
    """CIFAR-10 as an `ImageClasses` task; superclasses are animal and vehicle.

    folder  ``cifar-10-batches-bin`` (data_batch_*.bin, test_batch.bin, batches.meta.txt) or ``cifar-10-batches-py``
            (data_batch_*, test_batch, batches.meta).
    Raises FileNotFoundError when a file is missing, ValueError when one is damaged, pickle.UnpicklingError when a
    file of the python version asks for anything but plain data.
    """
    folder = Path(folder)
    if (folder / "test_batch.bin").exists():
        names = _names(folder / "batches.meta.txt")
        train = [_binary(path, 1) for path in _batches(folder, "data_batch_[0-9].bin")]
        test = _binary(folder / "test_batch.bin", 1)
    else:
        _need(folder, "test_batch", "batches.meta")
        names = _strings(_plain(folder / "batches.meta"), "label_names", folder / "batches.meta")
        train = [_python(path, "labels") for path in _batches(folder, "data_batch_[0-9]")]
        test = _python(folder / "test_batch", "labels")
    x, y = torch.cat([x for x, _ in train]), torch.cat([y for _, y in train])[:, 0]
    return ImageClasses(
        x, y, test[0], test[1][:, 0], class_names=names, superclass_names=("animal", "vehicle"),
        superclass_of=torch.tensor([0 if name in ANIMALS else 1 for name in names]),
        labels=labels, forget=forget, source=f"CIFAR-10, {folder}")


def cifar100(folder, *, forget, labels="super"):
    """CIFAR-100 as an `ImageClasses` task; superclasses are its 20 coarse classes.

    folder  ``cifar-100-binary`` (train.bin, test.bin, fine_label_names.txt, coarse_label_names.txt) or
            ``cifar-100-python`` (train, test, meta).
    Raises as `cifar10`; ValueError also when a fine class has no sample or is under two coarse classes.
    """
    folder = Path(folder)
    if (folder / "train.bin").exists():
        _need(folder, "test.bin")
        fine_names, coarse_names = (_names(folder / f"{kind}_label_names.txt") for kind in ("fine", "coarse"))
        (train_x, train_y), (test_x, test_y) = (_binary(folder / f"{split}.bin", 2) for split in ("train", "test"))
    else:
        _need(folder, "train", "test", "meta")
        meta = _plain(folder / "meta")
        fine_names, coarse_names = (
            _strings(meta, f"{kind}_label_names", folder / "meta") for kind in ("fine", "coarse"))
        (train_x, train_y), (test_x, test_y) = (
            _python(folder / split, "coarse_labels", "fine_labels") for split in ("train", "test"))
    return ImageClasses(
        train_x, train_y[:, 1], test_x, test_y[:, 1], class_names=fine_names, superclass_names=coarse_names,
        superclass_of=_hierarchy(torch.cat([train_y, test_y]), fine_names, folder),
        labels=labels, forget=forget, source=f"CIFAR-100, {folder}")


def _hierarchy(pairs, names, folder):
    """(n, 2) coarse and fine labels -> (classes,) fine class -> coarse class."""
    superclass_of = torch.full((len(names),), -1)
    for coarse, fine in pairs.unique(dim=0).tolist():
        if fine >= len(names):
            raise ValueError(f"{folder}: holds fine label {fine}, but names {len(names)} classes; fetch it again")
        if superclass_of[fine] >= 0:
            raise ValueError(f"{folder}: {names[fine]} is under two coarse classes ({int(superclass_of[fine])} and "
                             f"{coarse}); fetch it again")
        superclass_of[fine] = coarse
    if (superclass_of < 0).any():
        absent = [name for name, coarse in zip(names, superclass_of.tolist()) if coarse < 0]
        raise ValueError(f"{folder}: has no sample of {', '.join(absent)}, so their coarse class is unknown; "
                         "fetch it again")
    return superclass_of


def _need(folder, *names):
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"folder: {folder} lacks {', '.join(missing)}; pass the unpacked folder of CIFAR's "
                                "binary version (.bin files) or of its python version")


def _batches(folder, pattern):
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise FileNotFoundError(f"folder: {folder} lacks {pattern}; pass the whole unpacked folder")
    return paths


def _names(path):
    _need(path.parent, path.name)
    return tuple(line.strip() for line in path.read_text().splitlines() if line.strip())


def _binary(path, label_bytes):
    """A .bin file -> x (n, 3, 32, 32) uint8, y (n, label_bytes) int64."""
    raw = np.frombuffer(path.read_bytes(), np.uint8)
    if raw.size == 0 or raw.size % (label_bytes + PIXELS):
        raise ValueError(f"{path}: holds {raw.size} bytes, needs a multiple of {label_bytes + PIXELS}; fetch it again")
    raw = torch.from_numpy(raw.reshape(-1, label_bytes + PIXELS).copy())
    return raw[:, label_bytes:].reshape(-1, *SHAPE).contiguous(), raw[:, :label_bytes].long()


def _python(path, *label_keys):
    """A file of the python version -> x (n, 3, 32, 32) uint8, y (n, len(label_keys)) int64."""
    batch = _plain(path)
    data = batch.get("data")
    data = data.array if isinstance(data, _Array) else None
    if data is None or data.ndim != 2 or data.shape[1] != PIXELS:
        raise ValueError(f"{path}: its 'data' is no (n, {PIXELS}) array of bytes; fetch it again")
    labels = [batch.get(key) for key in label_keys]
    for key, values in zip(label_keys, labels):
        if not isinstance(values, list) or len(values) != len(data) or not all(type(v) is int for v in values):
            raise ValueError(f"{path}: its {key!r} is no list of {len(data)} whole numbers; fetch it again")
    return torch.from_numpy(data.reshape(-1, *SHAPE).copy()), torch.tensor(labels).T.contiguous()


def _strings(batch, key, path):
    values = batch.get(key)
    if not isinstance(values, list) or not all(isinstance(v, (str, bytes)) for v in values):
        raise ValueError(f"{path}: its {key!r} is no list of names; fetch it again")
    return tuple(v.decode() if isinstance(v, bytes) else v for v in values)


# A pickle runs what it names. So nothing that a file names is ever called: the stand-ins below only take data, and any
# other name is refused. Each has a __setstate__, since a pickle may otherwise set attributes on whatever it named.

class _Array:
    """Stands for numpy.ndarray; `array` is (…) uint8 once its state was set."""

    array = None

    def __setstate__(self, state):
        match state:
            case (_, tuple(shape), _Dtype(), False, bytes(raw)) if all(type(s) is int and s >= 0 for s in shape):
                if int(np.prod(shape, dtype=object)) == len(raw):
                    self.array = np.frombuffer(raw, np.uint8).reshape(shape)
                    return
        raise pickle.UnpicklingError("holds an array that is not of bytes in C order")


class _Dtype:
    """Stands for numpy.dtype; only bytes are taken."""

    def __init__(self, name, *_):
        if name not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"holds an array of {name!r}, needs u1")

    def __setstate__(self, state):
        pass  # byte order and alignment: a byte has none


def _encode(text, encoding="latin1"):
    """Stands for _codecs.encode, by which Python 3 writes bytes in old protocols."""
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"encodes by {encoding!r}, needs latin1")
    return text.encode("latin1")


def _reconstruct(*_):
    """Stands for numpy's function of that name, which makes an empty array."""
    return _Array()


def _refuse_state(state):
    raise pickle.UnpicklingError("changes a function that it names")


_encode.__setstate__ = _reconstruct.__setstate__ = _refuse_state

_STAND_INS = {
    ("_codecs", "encode"): _encode,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"asks for {module}.{name}")
        return _STAND_INS[module, name]


def _plain(path):
    """A pickled dict of plain data and uint8 arrays (as `_Array`), with str keys."""
    with open(path, "rb") as file:
        try:
            batch = _Unpickler(file, encoding="bytes").load()
        except Exception as error:  # a damaged pickle can raise anything
            raise pickle.UnpicklingError(f"{path}: refused ({error}). CIFAR's own files hold dicts, lists, numbers, "
                                         "names and byte arrays; fetch it from its source, or use the binary version"
                                         ) from error
    if not isinstance(batch, dict):
        raise ValueError(f"{path}: holds a {type(batch).__name__}, needs a dict; fetch it again")
    return {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
