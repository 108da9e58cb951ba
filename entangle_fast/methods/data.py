"""The three sets a method works on, as batches whose order is a pure function of the seed; how any set of samples is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.utils import data as loading
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate

from .training import batch_order, in_mode, sent

NAMES = ("forget", "adjacent", "remote")
Samples = tuple[Tensor, Tensor] | Dataset  # (x, y), or a map-style Dataset of such pairs: what functions that need samples take


class SampleSet:
    """One set of samples: tensors (x, y) held in memory, or a map-style dataset read sample by sample.

    Args:
        name: for messages.  data: (x, y) tensors, a torch Dataset of (x, y) pairs, a DataLoader of one, or a SampleSet, whose name stays.
        device: where batches are put.  seed: fixes the order of the batches.
        augment: (x, generator) → x, applied to training batches only; its draws are a function of seed and batch.
    """

    def __init__(self, name: str, data, device, seed: int = 0, augment=None):
        if isinstance(data, SampleSet):
            name, data = data.name, data.tensors or data.dataset
        self.name, self.device, self.seed, self.augment = name, torch.device(device), seed, augment
        if isinstance(data, DataLoader):
            _refuse_choices(name, data)
            data = data.dataset
        self.tensors, self.dataset = None, None
        if isinstance(data, IterableDataset) or (isinstance(data, Dataset) and not hasattr(data, "__len__")):
            raise ValueError(f"{name}: got {type(data).__name__}; needs (x, y) tensors or a map-style Dataset with a length")
        if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(t, Tensor) for t in data):
            x, y = data
            if not (x.dim() and y.dim()):
                raise ValueError(f"{name}: got x of shape {tuple(x.shape)} and y of shape {tuple(y.shape)}; needs a row for each sample")
            if len(x) != len(y):
                raise ValueError(f"{name}: {len(x)} samples but {len(y)} labels; needs one label per sample")
            self.tensors = (x, y)
        elif isinstance(data, Dataset):
            self.dataset = data
        else:
            raise ValueError(f"{name}: got {_kind(data)}; needs (x, y) tensors or a map-style Dataset{_mend(data)}")
        if len(self) == 0:
            raise ValueError(f"{name}: got no samples; needs at least one")

    def __len__(self) -> int:
        return len(self.tensors[0]) if self.tensors else len(self.dataset)

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Samples at ``rows`` (int64), on the device."""
        x, y = self.part(rows) if self.tensors else self._read(rows)
        return sent(x, self.device), sent(y, self.device)

    def part(self, rows: Tensor) -> Samples:
        """Samples at ``rows`` (int64) as data of their own: tensors where they lie, or a Subset, which reads none."""
        return tuple(t[sent(rows, t.device)] for t in self.tensors) if self.tensors else Subset(self.dataset, rows.tolist())

    def _read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        samples = [self._sample(i) for i in rows.tolist()]
        try:
            found = default_collate(samples)
        except (TypeError, RuntimeError) as error:
            why = _odd_one(rows.tolist(), samples) or error
            raise ValueError(f"{self.name}: its samples do not go into one batch: {why}; needs pairs (x, y) of tensors or numbers, x of "
                             "one shape: give the Dataset a transform") from error  # fmt: skip
        if not (isinstance(found, (tuple, list)) and len(found) == 2 and all(isinstance(t, Tensor) for t in found)):
            kinds = f" of {', '.join(type(t).__name__ for t in found)}" if isinstance(found, (tuple, list)) else ""
            raise ValueError(f"{self.name}: its batches are a {type(found).__name__}{kinds}; needs samples that are pairs (x, y)")
        return found

    def _sample(self, i: int):
        try:
            return self.dataset[i]
        except Exception as error:  # of the caller's own code: which sample it was, only this place knows
            raise ValueError(f"{self.name}: sample {i} of its {type(self.dataset).__name__} raised {type(error).__name__}: {error}; "
                             f"needs a pair (x, y) at every index from 0 to {len(self) - 1}") from error  # fmt: skip

    def labels(self) -> Tensor:
        """Labels of all samples in their own order, on the device; a Dataset is read through for them, in batches."""
        return self.tensors[1].to(self.device) if self.tensors else torch.cat([y for _, _, y in self.chunks()])

    @cached_property
    def digest(self) -> str:
        """32 hex digits that other samples, labels, or another order of them do not share.

        Of tensors, also in a TensorDataset or Subsets of one: every byte, read once. Of any other Dataset, whose samples
        may be slow to read or drawn anew each time: its class, length, Subset rows and ``targets``, where it has them.
        """
        if self.tensors:
            return _digest(self.tensors)
        base, rows = _rows_of(self.dataset)
        if type(base) is TensorDataset:
            return _digest(t if isinstance(rows, range) else t[torch.tensor(rows, device=t.device)] for t in base.tensors)
        found = [torch.tensor(rows)]
        try:
            found.append(torch.as_tensor(getattr(base, "targets", ())))
        except (TypeError, ValueError, RuntimeError):
            pass  # not numbers
        return _digest(found, type(base).__qualname__)

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

    def chunks(self, batch_size: int = 1024) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All samples in their own order, batch by batch, on the device: (rows, x, y). Raises ValueError for a batch_size < 1."""
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}; needs a whole number >= 1")
        for rows in torch.arange(len(self)).split(batch_size):
            yield rows, *self.take(rows)


def unlabelled(name: str, data: Tensor | Samples, device) -> SampleSet:
    """The set of one who reads no labels: x (n, ...) alone serves too."""
    return SampleSet(name, (data, torch.zeros(data.shape[:1])) if isinstance(data, Tensor) else data, device)


def answers(model: nn.Module, samples: SampleSet, take: Callable[[object, Tensor], Tensor], batch_size: int) -> Tensor:
    """take(model(x), y), (b, ...), of each batch of a set, joined on the CPU: how metrics and embeddings read data, tensors or Datasets.

    The model runs in eval mode without gradients and is left as found, also after an error.
    """
    with in_mode(model, False), torch.no_grad():
        return torch.cat([take(model(x), y).cpu() for _, x, y in samples.chunks(batch_size)])


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


def measured_sets(test, device) -> dict[str, SampleSet] | None:
    """The three sets that a model is measured on: of a tasks.Sets, or of a mapping of their names to what SampleSet takes.

    Raises ValueError for anything else; None stays None.
    """
    if test is None:
        return None
    if hasattr(test, "test_fine"):
        test = test.test._asdict()
    needs = "needs a tasks.Sets, or the three as in {'forget': (x, y), 'adjacent': (x, y), 'remote': (x, y)}"
    if not isinstance(test, Mapping):
        raise ValueError(f"test: got {type(test).__name__}; {needs}")
    if missing := [name for name in NAMES if name not in test]:
        raise ValueError(f"test: got {list(test)} without {', '.join(map(repr, missing))}; {needs}")
    return {name: SampleSet(f"test.{name}", test[name], device, 0) for name in NAMES}


def _refuse_overlap(sets: list[SampleSet]) -> None:
    """The same sample, with the same label, in two sets. Datasets are compared by identity, and Subsets by their rows."""
    pairs = list(combinations(sets, 2))
    for left, right in pairs:
        if left.tensors and right.tensors:
            _same_shape(left, right)
    keys = {s.name: _keys(*s.tensors) for s in sets if s.tensors}
    for left, right in pairs:
        shared = 0
        if left.tensors and right.tensors:
            shared = len(keys[left.name] & keys[right.name])
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


def _digest(tensors: Iterable[Tensor], label: str = "") -> str:
    found = blake2b(label.encode(), digest_size=16)
    for t in tensors:
        found.update(f"{t.dtype}{tuple(t.shape)}".encode())
        for part in t.detach().split(max(1, (len(t) << 24) // max(1, t.nbytes))):  # 16 MB: a copy, where one is needed, is small
            found.update(part.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def _rows_of(dataset: Dataset) -> tuple[Dataset, Sequence[int]]:
    """The data set below nested Subsets, and which of its rows are taken."""
    if not isinstance(dataset, Subset):
        return dataset, range(len(dataset))
    base, rows = _rows_of(dataset.dataset)
    return base, [rows[int(i)] for i in dataset.indices]


def _refuse_choices(name: str, loader: DataLoader) -> None:
    """Only the loader's data set is used: what else it does to samples must not be dropped silently."""
    sampler, batches, collate = loader.sampler, loader.batch_sampler, loader.collate_fn
    if isinstance(loader.dataset, IterableDataset):
        return
    if type(batches) not in (loading.BatchSampler, type(None)):
        sampler = batches
    every = type(sampler) is loading.SequentialSampler or type(sampler) is loading.RandomSampler and not sampler.replacement
    if not (every and len(sampler) == len(loader.dataset)):
        raise ValueError(f"{name}: got a DataLoader whose {type(sampler).__name__} chooses samples, but all of its data set would be used; "
                         "needs the samples themselves: torch.utils.data.Subset(dataset, indices)")  # fmt: skip
    if collate not in (default_collate, loading.default_convert):
        raise ValueError(f"{name}: got a DataLoader with a collate_fn, which would not be called; needs a Dataset of pairs (x, y): do it "
                         "in its __getitem__, padding to one length there")  # fmt: skip


def _odd_one(rows: list[int], samples: list) -> str:
    """The first sample that is made otherwise than the first, and how."""
    forms = [_form(sample) for sample in samples]
    odd = next((k for k, form in enumerate(forms) if form != forms[0]), None)
    return "" if odd is None else f"sample {rows[odd]} is {forms[odd]}, sample {rows[0]} {forms[0]}"


def _form(sample) -> str:
    if isinstance(sample, (tuple, list)):
        return f"({', '.join(map(_form, sample))})"
    return f"{type(sample).__name__} {tuple(sample.shape)}" if hasattr(sample, "shape") else type(sample).__name__


def _kind(data) -> str:
    """Its type, of two parts theirs too."""
    got = type(data).__name__
    return f"{got} of {' and '.join(type(part).__name__ for part in data)}" if isinstance(data, (tuple, list)) and len(data) == 2 else got


def _mend(data) -> str:
    if isinstance(data, Tensor):
        return ": give its labels too, as a pair"
    if isinstance(data, Mapping) and data:
        return f": give one of its entries, {', '.join(map(repr, list(data)[:3]))}"
    arrays = [hasattr(part, "__array__") and not isinstance(part, Tensor) for part in (data if isinstance(data, (tuple, list)) else [data])]
    if any(arrays):
        return ": torch.from_numpy(...)"
    pairs = isinstance(data, list) and len(data) > 0 and all(isinstance(part, (tuple, list)) and len(part) == 2 for part in data)
    lists = isinstance(data, tuple) and any(isinstance(part, list) for part in data)
    return ": torch.stack the x, torch.tensor(...) of the y, as a pair" if pairs else ": torch.tensor(...) of a list" if lists else ""
