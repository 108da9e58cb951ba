"""Make the slice of Fashion-MNIST that the package ships, from a folder with the full IDX files.

    python -m entangle_fast.tasks.make_slice FOLDER

Takes the first k images of each class in the official order, so the same folder always gives the same files.
The format is described in `fashion_mnist`.
"""
import argparse
import lzma
from pathlib import Path

import numpy as np

from .fashion_mnist import CLASSES, SCANNED_BY_ROWS, fashion_mnist

# lc=4: eight bits of grey, of which the high four of the previous pixel tell most about the next one
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0}]


def pack(x, y, per_class):
    """Images (n, 1, 28, 28) uint8 and labels (n,) -> the bytes of a slice file with `per_class` images a class.

    Raises ValueError when a class has fewer images than that.
    """
    blocks = []
    for c, name in enumerate(CLASSES):
        block = x[y == c][:per_class, 0].numpy()
        if len(block) < per_class:
            raise ValueError(f"per_class: got {per_class}, but {name} has {len(block)} images; ask for no more")
        blocks.append(np.ascontiguousarray(block if c in SCANNED_BY_ROWS else block.transpose(0, 2, 1)))
    return lzma.compress(b"".join(b.tobytes() for b in blocks), check=lzma.CHECK_CRC64, filters=_FILTERS)


def main(arguments=None):
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="folder with the four IDX files, plain or .gz")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--train-per-class", type=int, default=1900)
    parser.add_argument("--test-per-class", type=int, default=370)
    options = parser.parse_args(arguments)
    task = fashion_mnist(options.folder)
    for split, x, y, per_class in (("train", task.train_x, task.train_y, options.train_per_class),
                                   ("test", task.test_x, task.test_y, options.test_per_class)):
        packed = pack(x, y, per_class)
        (options.out / f"fashion_mnist_{split}.xz").write_bytes(packed)
        print(f"{split}: {per_class * len(CLASSES)} images, {len(packed)} bytes")


if __name__ == "__main__":
    main()
