"""What an unlearning method is given: forget, adjacent and remote samples, to train on and to test on."""
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..ops import check


class NoneAdjacent(ValueError):
    """No sample is adjacent by label. `problem` says so without the mend, which is another one in a config file."""

    def __init__(self, problem, mend):
        super().__init__(f"{problem}; {mend}")
        self.problem = problem


class Triple(NamedTuple):
    """One thing for each of the three sets."""

    forget: Any
    adjacent: Any
    remote: Any


@dataclass(frozen=True)
class Sets:
    """Disjoint forget, adjacent and remote sets (Cheng et al. 2026, arXiv 2603.26569, section 3).

    train, test              Triple of (x, y): x (n, C, H, W) float32, normalised; y (n,) int64, what the model predicts
    train_fine, test_fine    Triple of (n,) int64: the fine class of each sample, for figures per class
    train_index, test_index  Triple of (n,) int64: where each sample lies in the task's train or test data
    label_names              names of y's values
    class_names              names of the fine classes

    `forget`, `adjacent`, `remote` are short for those of `train`; `retain` is adjacent and remote together.
    Raises ValueError when a set is empty, two sets share a sample, lengths differ or a label is out of range.
    """

    train: Triple
    test: Triple
    train_fine: Triple
    test_fine: Triple
    train_index: Triple
    test_index: Triple
    label_names: tuple
    class_names: tuple

    def __post_init__(self):
        for split in ("train", "test"):
            samples, fine, index = (getattr(self, split + suffix) for suffix in ("", "_fine", "_index"))
            for name, (x, y), f, i in zip(Triple._fields, samples, fine, index):
                where = f"{split}.{name}"
                if len(x) == 0:
                    raise ValueError(f"{where}: got 0 samples, needs at least one; forget other classes or choose "
                                     "another adjacency")
                if not len(x) == len(y) == len(f) == len(i):
                    raise ValueError(f"{where}: got {len(x)} samples, {len(y)} labels, {len(f)} fine labels and "
                                     f"{len(i)} indices; needs as many of each")
                check_labels(where, y, self.label_names)
                check_labels(f"{split}_fine.{name}", f, self.class_names)
            values, counts = torch.cat(tuple(index)).unique(return_counts=True)
            if (counts > 1).any():
                shared = values[counts > 1]
                raise ValueError(f"{split}_index: {len(shared)} samples are in more than one set or twice in one, "
                                 f"the first is {int(shared[0])}; needs disjoint sets: give each sample to one")

    forget = property(lambda self: self.train.forget)
    adjacent = property(lambda self: self.train.adjacent)
    remote = property(lambda self: self.train.remote)

    @property
    def retain(self):
        """(x, y) of the adjacent and the remote training samples together (a copy)."""
        return tuple(torch.cat(pair) for pair in zip(self.train.adjacent, self.train.remote))

    @property
    def num_classes(self):
        """How many values y takes: the width of the model's output."""
        return len(self.label_names)


def check_labels(name, y, names):
    """Raise ValueError, or TypeError for no tensor, unless y is (n,) int64 with values in [0, len(names))."""
    check.tensor(name, y)
    if y.dim() != 1 or y.dtype != torch.int64:
        raise ValueError(f"{name}: got labels of shape {tuple(y.shape)} and {y.dtype}; needs (n,) int64")
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < len(names):
        raise ValueError(f"{name}: got labels from {int(y.min())} to {int(y.max())}, needs 0 to {len(names) - 1} "
                         f"({len(names)} names); name every class, or mend the labels")
