"""What is left of a model after unlearning, set by set: accuracy, calibration, distance to a retrained model."""
from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from ..methods.data import Samples
from ..ops import check
from .outputs import by_name, check_labels, logits

BINNINGS = ("mass", "width")


@check.kinds
def utility(
    model: nn.Module, sets: Mapping[str, Samples], *, retrained: nn.Module | None = None, bins=15, binning="mass", batch_size: int = 1024
) -> dict:
    """Figures of each set, as plain floats.

    sets       a `tasks.Sets` (its test samples, per class by fine class name), or a mapping of names to (x, y) tensors or map-style
               Datasets of such pairs, read in batches (per class by label).
    retrained  the model to compare with: one trained without the forget set. A Dataset is read a second time for it, so it must
               give the same samples again.
    bins, binning  of `calibration_error`.

    Returns {set: {"accuracy": %, "per_class": {class: %}, "ece": in [0, 1], "brier": in [0, 2]}}, and with `retrained`
    "kl_retrained": KL(retrained ‖ model) in nats, "agreement": % of equal predictions. Raises ValueError, FloatingPointError as
    `outputs.logits`, TypeError for sets that are neither.

    >>> import torch, entangle_fast as ef
    >>> x, y, model = torch.randn(9, 4), torch.arange(9) % 3, torch.nn.Linear(4, 3)
    >>> ef.metrics.utility(model, {"forget": (x, y)}, retrained=model)["forget"]["agreement"]
    100.0
    """
    found = {}
    for place, (name, data) in enumerate(by_name(sets).items()):
        out, y = logits(model, data, batch_size, name)
        right = (out.argmax(1) == y).double()
        row = {"accuracy": 100.0 * right.mean().item(),
               "per_class": {c: 100.0 * right[rows].mean().item() for c, rows in _classes(sets, place, y)},
               "ece": calibration_error(out.softmax(1), y, bins, binning), "brier": brier(out.softmax(1), y)}
        if retrained is not None:
            gold, _ = logits(retrained, data, batch_size, name, labelled=False)
            row |= {"kl_retrained": divergence(gold, out), "agreement": agreement(gold, out)}
        found[name] = row
    return found


def _classes(sets, place, y):
    """[(class, (n,) bool)] of one set: fine classes where they are known, else labels."""
    if hasattr(sets, "test_fine"):
        fine = sets.test_fine[place].cpu()
        return [(sets.class_names[c], fine == c) for c in fine.unique().tolist()]
    return [(str(c), y == c) for c in y.unique().tolist()]


def calibration_error(probabilities, y, bins=15, binning="mass"):
    """Expected calibration error: Σ_b |bin b|/n · |accuracy in b − mean confidence in b|, a float in [0, 1].

    probabilities (n, C), y (n,) int64. binning "mass": bins of equally many samples by confidence (Nguyen & O'Connor, EMNLP
    2015), the default, since a trained network's confidences crowd near 1; "width": equal intervals of [0, 1] (Guo et al.,
    ICML 2017). Samples of equal confidence share their mean correctness, so that their order does not matter.
    """
    check_labels(probabilities, y)
    if not check.whole(bins) or bins < 1 or binning not in BINNINGS or len(y) == 0:
        raise ValueError(f"bins, binning: got {bins!r} and {binning!r} for {len(y)} samples; needs a whole number >= 1, "
                         "'mass' or 'width', and at least one sample")
    confidence, predicted = probabilities.double().max(1)
    right = (predicted == y).double()
    if binning == "width":
        place = (confidence * bins).ceil().clamp(1, bins).long() - 1  # (lower, upper], as Guo et al.
    else:
        _, tie, count = confidence.unique(return_inverse=True, return_counts=True)
        right = (torch.zeros(len(count), dtype=torch.float64).index_add_(0, tie, right) / count)[tie]
        rank = torch.empty(len(y), dtype=torch.int64)
        rank[confidence.argsort(stable=True)] = torch.arange(len(y))
        place = rank * bins // len(y)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, right - confidence)
    return (gaps.abs().sum() / len(y)).item()


def brier(probabilities, y):
    """Mean of Σ_c (p_c − 1[y = c])²: a float in [0, 2] (Brier, Monthly Weather Review 1950).  (n, C), (n,) int64."""
    check_labels(probabilities, y)
    p = probabilities.double()
    return (p - F.one_hot(y, p.shape[1])).square().sum(1).mean().item()


def divergence(gold, out):
    """Mean over samples of KL(softmax(gold) ‖ softmax(out)), in nats: a float >= 0.  logits (n, C) each."""
    _alike(gold, out)
    gold, out = (z.double().log_softmax(1) for z in (gold, out))
    return F.kl_div(out, gold, reduction="batchmean", log_target=True).item()


def agreement(gold, out):
    """Share of samples on which both predict the same class, in %.  logits (n, C) each."""
    _alike(gold, out)
    return 100.0 * (gold.argmax(1) == out.argmax(1)).double().mean().item()


def _alike(gold, out):
    if gold.shape != out.shape or gold.dim() != 2 or len(gold) == 0:
        raise ValueError(f"retrained: gave logits {tuple(gold.shape)}, the model {tuple(out.shape)}; needs (n, C) of both, n > 0, "
                         "so models of the same classes")
