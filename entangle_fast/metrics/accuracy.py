"""Accuracy, per set and per class."""
import torch

from ..methods.training import device_of, in_mode


def predict(model, x, batch_size=1024):
    """Predicted classes (n,) int64, on the CPU, of x (n, ...). The model runs in eval mode and is left as found.

    Equivalent to: ``model(x).argmax(1)``

    Raises ValueError when x is empty, FloatingPointError when logits are NaN (an argmax of NaN looks like a class).
    """
    if len(x) == 0:
        raise ValueError("x: got 0 samples, needs at least one")
    device, predicted = device_of(model), []
    with in_mode(model, False), torch.no_grad():
        for batch in x.split(batch_size):
            logits = model(batch.to(device))
            if torch.isnan(logits).any():
                raise FloatingPointError("the model's logits are NaN; look for NaN in its weights and in x: a run that "
                                         "diverged needs a smaller lr")
            predicted.append(logits.argmax(1).cpu())
    return torch.cat(predicted)


def accuracy(model, x, y, batch_size=1024):
    """Share of samples predicted right, in %: a float. x (n, ...), y (n,) int64. Raises as `predict`.

    Equivalent to: ``100 * (model(x).argmax(1) == y).double().mean().item()``
    """
    return 100.0 * (_predict_for(model, x, y, batch_size) == y.cpu()).double().mean().item()


def evaluate(model, sets, batch_size=1024):
    """Accuracy in % on the test samples of `sets` (a `tasks.Sets`), as plain floats.

    Returns {"forget": %, "adjacent": %, "remote": %, "per_class": {fine class name: %}}; classes without test samples
    are left out. Raises as `predict`.
    """
    right = [_predict_for(model, x, y, batch_size) == y.cpu() for x, y in sets.test]
    fine = torch.cat([f.cpu() for f in sets.test_fine])
    result = {name: 100.0 * r.double().mean().item() for name, r in zip(sets.test._fields, right)}
    right = torch.cat(right)
    result["per_class"] = {name: 100.0 * right[fine == c].double().mean().item()
                           for c, name in enumerate(sets.class_names) if (fine == c).any()}
    return result


def _predict_for(model, x, y, batch_size):
    if y.shape != (len(x),):
        raise ValueError(f"y: got shape {tuple(y.shape)} for {len(x)} samples; needs ({len(x)},)")
    return predict(model, x, batch_size)
