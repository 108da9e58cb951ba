"""What `relearn` refuses: each function raises ValueError naming the argument, what it got and what it needs."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..methods.training import device_of, in_mode
from .relearning_attackers import LEARNING_RATES


def positive(name: str, value) -> None:
    """A finite number > 0."""
    if not (isinstance(value, (int, float)) and value > 0 and math.isfinite(value)):
        raise ValueError(f"{name}: got {value!r}; needs a finite number > 0")


def check_options(
    *, attacker, lr, momentum, batch, share, shots, tolerance, seeds, steps, eval_every, eval_samples, batched
) -> None:  # fmt: skip
    """Options of `relearn` out of range."""
    if attacker not in LEARNING_RATES:
        raise ValueError(f"attacker: got {attacker!r}; needs one of {', '.join(LEARNING_RATES)}")
    if batched not in ("auto", "vmap", "loop"):
        raise ValueError(f"batched: got {batched!r}; needs 'auto', 'vmap' or 'loop'")
    positive("lr", lr)
    positive("tolerance", tolerance)
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum: got {momentum!r}; needs a number in [0, 1)")
    if not 0 < share <= 1:
        raise ValueError(f"share: got {share!r}; needs a share in (0, 1]")
    for name, value in (("batch", batch), ("steps", steps), ("eval_every", eval_every), ("shots", shots),
                        ("eval_samples", 1 if eval_samples is None else eval_samples)):  # fmt: skip
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: got {value!r}; needs a whole number >= 1")
    if not seeds or any(not isinstance(s, int) or s < 0 for s in seeds) or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: got {seeds}; needs how many (>= 1), or different whole numbers >= 0")


def check_sets(model: nn.Module, **sets) -> None:
    """Each set is (x, y) with labels that the model predicts."""
    for name, given in sets.items():
        if given is None:
            continue
        if not (isinstance(given, (tuple, list)) and len(given) == 2 and all(isinstance(t, Tensor) for t in given)):
            raise ValueError(f"{name}: got {type(given).__name__}; needs tensors (x, y)")
        x, y = given
        if len(x) == 0 or y.shape != (len(x),) or y.dtype != torch.int64:
            raise ValueError(f"{name}: got {len(x)} samples and {y.dtype} labels of shape {tuple(y.shape)}; needs at least one "
                             "sample, and int64 labels (n,)")  # fmt: skip
        with in_mode(model, False), torch.no_grad():
            logits = model(x[:1].to(device_of(model)))
        if logits.dim() != 2 or y.min() < 0 or y.max() >= logits.shape[1]:
            raise ValueError(f"{name}: labels from {int(y.min())} to {int(y.max())}, but the model's output for one sample is of shape "
                             f"{tuple(logits.shape)}; needs logits (1, classes) and labels in [0, classes)")  # fmt: skip
