"""Accuracy, per set and per class."""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..methods.data import Samples, SampleSet, answers, unlabelled
from ..methods.training import device_of
from ..ops import check
from .outputs import by_name, check_labels, check_logits, check_numbers


@check.kinds
def predict(model: nn.Module, data: Tensor | Samples, batch_size: int = 1024) -> Tensor:
    """Predicted classes (n,) int64, on the CPU. The model runs in eval mode and is left as found.

    data  x (n, ...), or as in `accuracy`, the labels unread.

    Equivalent to: ``model(data).argmax(1)``

    Raises ValueError for data that is empty or cannot be read, and a model whose output is not (n, C), C >= 2;
    FloatingPointError when logits are NaN (an argmax of NaN looks like a class).
    """
    samples = unlabelled("data", data, device_of(model))
    return answers(model, samples, lambda out, y: _classes(out, y, samples.name), batch_size)


@check.kinds
def accuracy(model: nn.Module, data: Samples, batch_size: int = 1024) -> float:
    """Share of samples predicted right, in %: a float.

    data  (x, y) tensors, x (n, ...), y (n,) int64, or a map-style Dataset of such pairs, read in batches.

    Equivalent to: ``100 * (model(data[0]).argmax(1) == data[1]).double().mean().item()``

    Raises as `predict`; ValueError for labels that are no classes of the model's too.
    """
    return _percent(_right(model, "data", data, batch_size))


@check.kinds
def evaluate(model: nn.Module, sets: Mapping[str, Samples], batch_size: int = 1024) -> dict:
    """Accuracy in % of each set, as plain floats.

    sets  a `tasks.Sets` (its test samples), or a mapping of names to what `accuracy` takes: as the ``test`` of `ef.unlearn`.

    Returns {set: %, "per_class": {fine class name: %}}; classes without test samples are left out, and "per_class" is empty
    for a mapping, whose classes have no names (`utility` has them by label). Raises as `accuracy`, naming the set.

    >>> import torch, entangle_fast as ef
    >>> x, y = torch.eye(3), torch.tensor([0, 1, 1])
    >>> ef.metrics.evaluate(torch.nn.Identity(), {"forget": (x[:1], y[:1]), "remote": torch.utils.data.TensorDataset(x[1:], y[1:])})
    {'forget': 100.0, 'remote': 50.0, 'per_class': {}}
    """
    right = {name: _right(model, name, data, batch_size) for name, data in by_name(sets).items()}
    found: dict = {name: _percent(r) for name, r in right.items()}
    found["per_class"] = {}
    if hasattr(sets, "test_fine"):
        all_right, fine = torch.cat([*right.values()]), torch.cat([f.cpu() for f in sets.test_fine])
        found["per_class"] = {name: _percent(all_right[fine == c]) for c, name in enumerate(sets.class_names) if (fine == c).any()}
    return found


def _right(model, name, data, batch_size):
    """Whether each sample is predicted right: (n,) bool."""
    samples = SampleSet(name, data, device_of(model))

    def take(out, y):
        classes = _classes(out, y, samples.name)
        check_labels(out, y, samples.name)
        return classes == y

    return answers(model, samples, take, batch_size)


def _classes(out, y, name):
    check_logits(out, len(y))
    check_numbers(name, ~torch.isnan(out), "NaN")
    return out.argmax(1)


def _percent(right):
    return 100.0 * right.double().mean().item()
