"""The three sets a method works on, as batches whose order is a pure function of the seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, default_collate

from .training import batch_order

NAMES = ("forget", "adjacent", "remote")


class SampleSet:
    """One set of samples: tensors (x, y) held in memory, or a map-style dataset read sample by sample.

    Args:
        name: for messages.  data: (x, y) tensors, a torch Dataset of (x, y) pairs, or a DataLoader of one.
        device: where batches are put.  seed: fixes the order of the batches.
        augment: (x, generator) → x, applied to training batches only; its draws are a function of seed and batch.
    """

    def __init__(self, name: str, data, device, seed: int, augment=None):
        self.name, self.device, self.seed, self.augment = name, torch.device(device), seed, augment
        if isinstance(data, DataLoader):
            data = data.dataset
        if isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
            raise ValueError(f"{name}: got {type(data).__name__}; needs (x, y) tensors or a map-style Dataset with a length")
        self.tensors, self.dataset = None, None
        if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(t, Tensor) for t in data):
            x, y = data
            if len(x) != len(y):
                raise ValueError(f"{name}: {len(x)} samples but {len(y)} labels; needs one label per sample")
            self.tensors = (x, y)
        elif isinstance(data, Dataset):
            self.dataset = data
        else:
            raise ValueError(f"{name}: got {type(data).__name__}; needs (x, y) tensors or a map-style Dataset")
        if len(self) == 0:
            raise ValueError(f"{name}: got no samples; needs at least one")

    def __len__(self) -> int:
        return len(self.tensors[0]) if self.tensors else len(self.dataset)

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Samples at ``rows`` (int64), on the device."""
        if self.tensors:
            x, y = (t[rows.to(t.device)] for t in self.tensors)
        else:
            x, y = default_collate([self.dataset[i] for i in rows.tolist()])
        return x.to(self.device), y.to(self.device)

    def batch(self, number: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Training batch ``number`` of the cycled set: (rows, x, y)."""
        rows = self.rows(number, size)
        x, y = self.take(rows)
        if self.augment is not None:
            own = (self.seed + NAMES.index(self.name)) * 1_000_003 + number
            x = self.augment(x, torch.Generator().manual_seed(own))
        return rows, x, y

    def rows(self, batch: int, size: int) -> Tensor:
        """Rows of batch number ``batch`` when the set is cycled in batches of ``size``, reshuffled at each pass."""
        size = min(size, len(self))
        start, found = batch * size, []
        while size:
            epoch, offset = divmod(start, len(self))
            part = self._order(epoch)[offset : offset + size]
            found.append(part)
            start, size = start + len(part), size - len(part)
        return torch.cat(found)

    def _order(self, epoch: int) -> Tensor:
        if getattr(self, "_cached", (None,))[0] != epoch:
            self._cached = (epoch, batch_order(len(self), self.seed + NAMES.index(self.name), epoch))
        return self._cached[1]

    def chunks(self, size: int = 1024):
        """All samples in their own order: (rows, x, y)."""
        for rows in torch.arange(len(self)).split(size):
            yield rows, *self.take(rows)


@dataclass
class Data:
    """Disjoint forget, adjacent and remote sets (methods.md §1)."""

    forget: SampleSet
    adjacent: SampleSet
    remote: SampleSet

    @classmethod
    def of(cls, forget, adjacent, remote, device, seed: int, *, augment=None, allow_overlap: bool = False) -> Data:
        """Raises ValueError for empty sets, sets that share samples, or that differ in sample shape or label kind."""
        made = [SampleSet(name, data, device, 1000 * seed, augment) for name, data in zip(NAMES, (forget, adjacent, remote))]
        if not allow_overlap:
            _refuse_overlap(made)
        return cls(*made)

    @property
    def retain(self) -> tuple[SampleSet, SampleSet]:
        return self.adjacent, self.remote

    def retain_sizes(self, size: int) -> list[tuple[SampleSet, int]]:
        """The adjacent and the remote set with their shares of ``size`` >= 2 samples: in proportion, each at least one."""
        n, m = map(len, self.retain)
        near = min(max(1, round(size * n / (n + m))), max(1, size - 1))
        return [(self.adjacent, near), (self.remote, max(1, size - near))]


def _refuse_overlap(sets: list[SampleSet]) -> None:
    """The same sample, with the same label, in two sets. Datasets are compared by identity, and Subsets by their rows."""
    for i, left in enumerate(sets):
        for right in sets[i + 1 :]:
            shared = 0
            if left.tensors and right.tensors:
                _same_shape(left, right)
                shared = len(_keys(*left.tensors) & _keys(*right.tensors))
            elif left.dataset is not None and right.dataset is not None:
                (a, mine), (b, theirs) = _rows_of(left.dataset), _rows_of(right.dataset)
                shared = len(set(mine) & set(theirs)) if a is b else 0
            if shared:
                raise ValueError(
                    f"{right.name}: {shared} of its samples are also in {left.name}; the sets must be disjoint: take them "
                    "out of one (allow_overlap=True if they are meant to be equal)"
                )


def _same_shape(left: SampleSet, right: SampleSet) -> None:
    a, b = (tuple(s.tensors[0].shape[1:]) for s in (left, right))
    if a != b:
        raise ValueError(f"{right.name}: samples of shape {b}, but {a} in {left.name}; needs one shape")


def _keys(x: Tensor, y: Tensor) -> set[bytes]:
    """A digest of each sample with its label."""
    rows = [t.detach().cpu().contiguous().reshape(len(t), -1).view(torch.uint8).numpy() for t in (x, y)]
    return {blake2b(a.tobytes() + b.tobytes(), digest_size=16).digest() for a, b in zip(*rows)}


def _rows_of(dataset: Dataset) -> tuple[Dataset, Sequence[int]]:
    """The data set below nested Subsets, and which of its rows are taken."""
    if not isinstance(dataset, Subset):
        return dataset, range(len(dataset))
    base, rows = _rows_of(dataset.dataset)
    return base, [rows[int(i)] for i in dataset.indices]
