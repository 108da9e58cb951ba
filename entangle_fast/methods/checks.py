"""What is wrong with a model or with samples, said before the first step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor, nn

from .. import ops
from .data import SampleSet
from .process import Loss, per_sample
from .training import draws_undone, in_mode

CALLERS = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError)  # what misused code of the caller's raises
TRIED = 16  # samples: mixing augmentations and losses over pairs need more than one or two


def check_parameters(model: nn.Module) -> None:
    """Raise ValueError unless some parameter trains and all of them hold finite values."""
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model: no trainable parameter; set requires_grad_(True) on those that shall be changed")
    for name, p in model.named_parameters():
        if p.is_meta:
            raise ValueError(f"model: parameter {name!r} is on the meta device and has no values; load the weights first")
        if not torch.isfinite(p.detach()).all():
            raise ValueError(f"model: parameter {name!r} holds NaN or infinite values; load weights that are finite")


def check_samples(model: nn.Module, samples: SampleSet, loss: Loss | None, classes: bool, trains: bool = False) -> None:
    """Put a few samples of a set through model, loss and augmentation: shapes go together, labels are in range, and what has to have a
    gradient has one.

    loss: where it is the user's own.  classes: labels must be class indices, for the default loss or for accuracies.
    trains: the model is trained on them, so that its output needs a gradient.
    The labels of tensors are looked at one and all, those of a Dataset as far as they are read.

    Raises ValueError and TypeError naming the set, the model, the loss or augment.
    """
    name = samples.name
    with draws_undone(samples.device):  # data sets, models, losses and augmentations may draw
        x, y = samples.take(torch.arange(min(TRIED, len(samples))))
        labels = samples.tensors[1] if samples.tensors else y
        if classes:
            _check_kind(name, labels)
        with in_mode(model, False), torch.enable_grad():
            output = _output(model, name, x, trains)
        if classes:
            _check_classes(name, output, len(x), labels)
        if loss is not None:
            with in_mode(model, False), torch.enable_grad():
                check_loss(loss, output, y)
        if samples.augment is not None:
            _check_augment(model, samples.augment, x, name)


def _output(model: nn.Module, name: str, x: Tensor, trains: bool):
    try:
        output = model(x)
    except CALLERS as error:
        raise ValueError(f"{name}: the model cannot take {x.dtype} samples of shape {tuple(x.shape[1:])}: {error}; "
                         "give them as it was trained on") from error  # fmt: skip
    if trains and isinstance(output, Tensor) and not output.requires_grad:
        raise ValueError("model: its output depends on none of its trainable parameters, or runs under torch.no_grad or .detach(); "
                         "needs one that a gradient flows through")  # fmt: skip
    return output


def _check_classes(name: str, output, n: int, labels: Tensor) -> None:
    if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[1] < 2:
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"model: gives {got} for {n} samples; needs logits (n, C), C >= 2: {ops.check.logits_mend(output)}")
    width = output.shape[1]
    if labels.min() < 0 or labels.max() >= width:
        bad = int(labels.max()) if labels.max() >= width else int(labels.min())
        raise ValueError(f"{name}: label {bad} is outside [0, {width}), the classes the model predicts; "
                         "check the labels or the model")  # fmt: skip


def check_loss(loss: Loss, output, y: Tensor) -> None:
    """Raise ValueError or TypeError unless loss(output, y) is (n,), and has a gradient where ``output`` has one.

    That the arguments are swapped is told by their names, or by the loss serving that way only; so is an output (n, 1), or labels that
    are no floating-point numbers, as of binary cross-entropy.
    """
    mend = "it is called as loss(output, y): give lambda output, y: loss(y, output)"
    names = _first_two(loss)
    if names and names[0] in _LABELS and names[1] in _OUTPUTS:
        raise ValueError(f"loss: its arguments are ({names[0]}, {names[1]}), {mend}")
    try:
        per_sample(loss(output, y), len(y), output)
    except CALLERS as error:
        if _serves(loss, y, output, output):
            raise ValueError(f"loss: serves as loss(y, output) only, but {mend}") from error
        for form, *given in _forms(output, y):
            if _serves(loss, *given, output):
                raise ValueError(f"loss: serves as {form} only, but with {_said(output)} and {_said(y)} it is called as loss(output, y): "
                                 f"give lambda output, y: {form}") from error  # fmt: skip
        if str(error).startswith("loss: "):
            raise
        raise ValueError(f"loss: raised {type(error).__name__} when called as loss(output, y) with {_said(output)} and {_said(y)}: "
                         f"{error}; needs a function (output, y) → per-sample losses (n,)") from error  # fmt: skip


def _forms(output, y: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Other arguments that a loss may be made for, and how they are spelled: no dimension of one, labels like the output."""
    if not isinstance(output, Tensor):
        return
    outputs, labels = [("output", output)], [("y", y)]
    for name, forms in (("output", outputs), ("y", labels)):
        if (x := forms[0][1]).dim() == 2 and x.shape[1] == 1:
            forms.append((f"{name}.squeeze(1)", x.squeeze(1)))
    if not y.is_floating_point():
        labels += [(f"{name}.float()", x.float()) for name, x in labels]
    for (left, x), (right, z) in product(outputs, labels):
        yield f"loss({left}, {right})", x, z


def _serves(loss: Loss, first, second, output) -> bool:
    """Whether the loss takes these."""
    try:
        per_sample(loss(first, second), len(first), output)
    except Exception:  # whatever it says of arguments that it was not made for
        return False
    return True


def _first_two(function: Callable) -> list[str]:
    """The names of the first two arguments, as far as they have names."""
    try:
        given = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    names = [p.name.lower() for p in given if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return names[:2] if len(names) > 1 else []


def _check_augment(model: nn.Module, augment: Callable, x: Tensor, name: str) -> None:
    needs = "needs a function (x, generator) → x, as tasks.RandomShift is"
    try:
        found = augment(x, torch.Generator().manual_seed(0))
    except CALLERS as error:
        raise ValueError(f"augment: raised {type(error).__name__} when called as augment(x, generator) with {_said(x)}: {error}; "
                         f"{needs}") from error  # fmt: skip
    if not isinstance(found, Tensor):
        raise TypeError(f"augment: gave a {type(found).__name__}; {needs}")
    if found.dim() == 0 or len(found) != len(x):
        raise ValueError(f"augment: gave shape {tuple(found.shape)} for {_said(x)}; needs as many samples as it got: {needs}")
    try:
        with in_mode(model, False), torch.no_grad():
            model(found)
    except CALLERS as error:
        raise ValueError(f"augment: the model cannot take {_said(found)}, made of {_said(x)} of {name}: {error}; {needs}") from error


def _said(x) -> str:
    return f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"


_LABELS = {"target", "targets", "label", "labels", "y_true", "truth"}
_OUTPUTS = {"input", "logit", "logits", "output", "outputs", "pred", "preds", "prediction", "predictions", "scores", "y_hat", "y_pred"}


def _check_kind(name: str, labels: Tensor) -> None:
    if labels.dim() != 1:
        mend = ".squeeze(1)" if labels.dim() == 2 and labels.shape[1] == 1 else ".argmax(1), if they are one-hot"
        raise ValueError(f"{name}: labels have shape {tuple(labels.shape)}; needs class indices (n,): use {mend}")
    if labels.dtype != torch.int64:
        raise ValueError(f"{name}: labels are {labels.dtype}; needs int64 class indices: use .long()")
