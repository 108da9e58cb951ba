"""What a model answers: logits, and what attacks and calibration are made of."""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..methods.data import Samples, SampleSet, answers
from ..methods.training import device_of
from ..ops import check


def logits(
    model: nn.Module, data: Samples, batch_size: int = 1024, name: str = "data", labelled: bool = True
) -> tuple[Tensor, Tensor]:
    """Class logits (n, C) float64 and labels (n,) int64 of a set, on the CPU. The model runs in eval mode and is left as found.

    name: of the argument, for errors.  labelled: whether labels must be classes of this model. Raises ValueError for data that
    cannot be read, an output that is not (n, C), C >= 2, or labels that do not fit it; FloatingPointError when logits are not
    finite.
    """
    samples, labels = SampleSet(name, data, device_of(model)), []

    def take(out, y):
        check_logits(out, len(y))
        if labelled:
            check_labels(out, y, samples.name)
        check_numbers(samples.name, torch.isfinite(out), "not finite")
        labels.append(y.cpu())
        return out.cpu().double()

    return answers(model, samples, take, batch_size), torch.cat(labels)


def by_name(sets) -> Mapping[str, Samples]:
    """The test samples of a `tasks.Sets` by name; a mapping of names to data as it is. Raises TypeError for anything else."""
    if hasattr(sets, "test_fine"):
        return sets.test._asdict()
    if not isinstance(sets, Mapping):
        pair = isinstance(sets, (tuple, list)) and any(isinstance(t, Tensor) for t in sets)
        mend = ": {'data': ...}, or metrics.accuracy, which takes one set" if pair or isinstance(sets, (Dataset, DataLoader)) else ""
        raise TypeError(f"sets: got {type(sets).__name__}; needs a tasks.Sets (split a task), or a mapping of names to (x, y) or Datasets"
                        f"{mend}")  # fmt: skip
    return sets


def check_logits(out, n: int) -> None:
    """Raise ValueError unless ``out`` are class logits (n, C), C >= 2."""
    if not isinstance(out, Tensor) or out.dim() != 2 or len(out) != n or out.shape[1] < 2:
        got = tuple(out.shape) if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise ValueError(f"model: gave {got} for {n} samples; needs class logits (n, C), C >= 2: {check.logits_mend(out)}")


def check_labels(out: Tensor, y: Tensor, name: str = "y") -> None:
    """Raise ValueError unless y (n,) int64 are classes of logits ``out`` (..., n, C)."""
    n, classes = out.shape[-2:]
    if y.shape != (n,) or y.dtype != torch.int64:
        raise ValueError(f"{name}: got {y.dtype} labels of shape {tuple(y.shape)} for {n} samples; needs int64 ({n},): .long(), or "
                         ".argmax(1) of one-hot ones")
    if n and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise ValueError(f"{name}: got labels from {int(y.min())} to {int(y.max())}, needs 0 to {classes - 1}: the classes that the "
                         "model predicts")


def check_numbers(name: str, good: Tensor, else_they_are: str) -> None:
    """Raise FloatingPointError unless all of ``good`` is true, said of the logits of a set."""
    if not good.all():
        raise FloatingPointError(f"{name}: the model's logits are {else_they_are}; look for NaN in its weights and in the samples: a run "
                                 "that diverged needs a smaller lr")


def logit_confidence(out, y):
    """φ = log p_y − log(1 − p_y) of logits (..., n, C) and y (n,) → (..., n) float64.

    Carlini et al., "Membership Inference Attacks From First Principles", S&P 2022 [paper], in the form z_y − logsumexp of the
    other logits, which neither p = 0 nor p = 1 makes infinite.
    """
    check_labels(out, y)
    out = out.double()
    own = y.to(out.device).expand(out.shape[:-1]).unsqueeze(-1)
    others = out.scatter(-1, own, -torch.inf).logsumexp(-1)
    return out.gather(-1, own).squeeze(-1) - others
