"""Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747; MIT, Zalando SE): the shipped slice or the full set.

The slice is two xz files. Each one, unpacked, is ten equal blocks, one a class in label order; a block is the class's
images one after another, each 28x28 and scanned by rows (footwear) or by columns (the rest): the scan under which
xz packs that class best. Labels follow from the block, the number of images from the length.
"""
import gzip
import lzma
import os
import zlib
from pathlib import Path

import numpy as np
import torch

from .image_classes import ImageClasses

CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot")
SUPERCLASSES = ("tops", "trousers", "footwear", "bag")
SUPERCLASS_OF = (0, 1, 0, 0, 0, 2, 0, 2, 3, 2)
SCANNED_BY_ROWS = frozenset({5, 7, 8, 9})
SIDE = 28

_DATA = Path(__file__).parent / "data"
_SYSTEM = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it
_FILES = {"train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
          "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")}


def fashion_mnist(folder=None, *, forget="Shirt", labels="super", full=None):
    """Load Fashion-MNIST as an `ImageClasses` task.

    folder  a folder with the four IDX files, plain or gzipped. Without it: the folder that the environment variable
            ENTANGLE_FAST_DATA names (or its sub-folder ``fashion-mnist``), else /usr/share/datasets/fashion-mnist.
    forget  class name or index, or a list of them.
    labels  "super" (4 classes: tops, trousers, footwear, bag) or "fine" (10).
    full    None: the full set (60,000 + 10,000) where one is found, else the slice in the package; False: the slice,
            whatever is installed (so that numbers compare between machines); True: the full set or an error.

    The task's `source` says which was read. Raises FileNotFoundError when a folder that was named lacks the files,
    ValueError for damaged files.
    """
    if full is False and folder is not None:
        raise ValueError("full: got False together with a folder; leave one of the two out")
    found = None if full is False else _find(folder)
    if found is None and full:
        raise FileNotFoundError(
            f"full: got True, but there is no full Fashion-MNIST in {_SYSTEM}; install the package "
            "dataset-fashion-mnist, pass folder=, or set ENTANGLE_FAST_DATA")
    read = (lambda split: read_slice(_DATA / f"fashion_mnist_{split}.xz")) if found is None else (
        lambda split: _read_full(found, split))
    (train_x, train_y), (test_x, test_y) = read("train"), read("test")
    return ImageClasses(
        train_x, train_y, test_x, test_y, class_names=CLASSES, superclass_names=SUPERCLASSES,
        superclass_of=torch.tensor(SUPERCLASS_OF), labels=labels, forget=forget,
        source="Fashion-MNIST, the package's slice" if found is None else f"Fashion-MNIST, {found}")


def read_slice(path):
    """One file of the slice -> images (n, 1, 28, 28) uint8, labels (n,) int64, sorted by class.

    Raises ValueError when the file is damaged or its length is not ten equal blocks of whole images.
    """
    try:
        flat = np.frombuffer(lzma.decompress(Path(path).read_bytes(), format=lzma.FORMAT_XZ), np.uint8)
    except lzma.LZMAError as error:
        raise ValueError(f"{path}: damaged ({error}); reinstall the package") from error
    if flat.size == 0 or flat.size % (len(CLASSES) * SIDE * SIDE):
        raise ValueError(f"{path}: unpacks to {flat.size} bytes, needs a multiple of {len(CLASSES) * SIDE * SIDE}; "
                         "reinstall the package")
    x = flat.reshape(len(CLASSES), -1, SIDE, SIDE).copy()
    for c in set(range(len(CLASSES))) - SCANNED_BY_ROWS:
        x[c] = x[c].transpose(0, 2, 1).copy()
    y = torch.arange(len(CLASSES)).repeat_interleave(x.shape[1])
    return torch.from_numpy(x.reshape(-1, 1, SIDE, SIDE)), y


def read_idx(path):
    """An IDX file of bytes (``.gz`` or plain) -> tensor uint8 of the shape in its header.

    Raises ValueError when the header is not that of an unsigned-byte IDX file or the length does not match it.
    """
    path = Path(path)
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path}: cannot be read ({error}); fetch it again") from error
    if len(raw) < 4 or raw[:3] != b"\0\0\x08" or len(raw) < 4 + 4 * raw[3]:
        raise ValueError(f"{path}: starts with {raw[:4]!r}, needs the IDX header 00 00 08 <dimensions>; "
                         "pass the original IDX file")
    head = 4 + 4 * raw[3]
    shape = tuple(int.from_bytes(raw[i:i + 4], "big") for i in range(4, head, 4))
    need = int(np.prod(shape, dtype=object))
    if len(raw) - head != need:
        raise ValueError(f"{path}: holds {len(raw) - head} bytes of data, its header says {need}; fetch it again")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=head).reshape(shape).copy())


def _idx_path(folder, stem):
    """The plain or gzipped file of that stem, or None."""
    return next((p for p in (folder / stem, folder / f"{stem}.gz") if p.is_file()), None)


def _missing(folder):
    return [stem for stems in _FILES.values() for stem in stems if _idx_path(folder, stem) is None]


def _find(folder):
    """The folder of the full set, or None when none was named and none is installed."""
    if folder is not None:
        named, tried = f"folder: got {str(folder)!r}", [Path(folder)]
    elif os.environ.get("ENTANGLE_FAST_DATA"):
        root = Path(os.environ["ENTANGLE_FAST_DATA"])
        named, tried = f"ENTANGLE_FAST_DATA: got {str(root)!r}", [root / "fashion-mnist", root]
    else:
        return None if _missing(_SYSTEM) else _SYSTEM
    for candidate in tried:
        if not _missing(candidate):
            return candidate
    raise FileNotFoundError(f"{named}, which lacks {', '.join(_missing(tried[-1]))} (plain or .gz); "
                            "put the four IDX files there, or pass full=False for the slice in the package")


def _read_full(folder, split):
    image_path, label_path = (_idx_path(folder, stem) for stem in _FILES[split])
    x, y = read_idx(image_path), read_idx(label_path)
    if x.dim() != 3 or y.dim() != 1 or len(x) != len(y):
        raise ValueError(f"{image_path}: has shape {tuple(x.shape)} beside labels {tuple(y.shape)}; "
                         "needs (n, height, width) beside (n,); fetch both files again")
    return x.unsqueeze(1), y.long()
