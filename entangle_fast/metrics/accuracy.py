"""Accuracy, per set and per class."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from ..methods.training import device_of, in_mode
from ..ops import check


@check.kinds
def predict(model: nn.Module, x: Tensor, batch_size: int = 1024) -> Tensor:
    """Predicted classes (n,) int64, on the CPU, of x (n, ...). The model runs in eval mode and is left as found.

    Equivalent to: ``model(x).argmax(1)``

    Raises ValueError when x is empty, FloatingPointError when logits are NaN (an argmax of NaN looks like a class).
    """
    check.samples("x", x)
    device, predicted = device_of(model), []
    with in_mode(model, False), torch.no_grad():
        for batch in x.split(batch_size):
            logits = model(batch.to(device))
            if torch.isnan(logits).any():
                raise FloatingPointError("the model's logits are NaN; look for NaN in its weights and in x: a run that "
                                         "diverged needs a smaller lr")
            predicted.append(logits.argmax(1).cpu())
    return torch.cat(predicted)


@check.kinds
def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 1024) -> float:
    """Share of samples predicted right, in %: a float. x (n, ...), y (n,) int64. Raises as `predict`.

    Equivalent to: ``100 * (model(x).argmax(1) == y).double().mean().item()``
    """
    return 100.0 * (_predict_for(model, x, y, batch_size) == y.cpu()).double().mean().item()


@check.kinds
def evaluate(model: nn.Module, sets, batch_size: int = 1024) -> dict:
    """Accuracy in % on the test samples of `sets` (a `tasks.Sets`), as plain floats.

    Returns {"forget": %, "adjacent": %, "remote": %, "per_class": {fine class name: %}}; classes without test samples
    are left out. Raises as `predict`.
    """
    if not hasattr(sets, "test_fine"):
        raise TypeError(f"sets: got {type(sets).__name__}; needs a tasks.Sets: split a task, or utility for a mapping of names to (x, y)")
    right = [_predict_for(model, x, y, batch_size) == y.cpu() for x, y in sets.test]
    fine = torch.cat([f.cpu() for f in sets.test_fine])
    result = {name: 100.0 * r.double().mean().item() for name, r in zip(sets.test._fields, right)}
    right = torch.cat(right)
    result["per_class"] = {name: 100.0 * right[fine == c].double().mean().item()
                           for c, name in enumerate(sets.class_names) if (fine == c).any()}
    return result


def _predict_for(model, x, y, batch_size):
    check.samples("x", x)
    if y.shape != (len(x),):
        raise ValueError(f"y: got shape {tuple(y.shape)} for {len(x)} samples; needs ({len(x)},)")
    return predict(model, x, batch_size)
