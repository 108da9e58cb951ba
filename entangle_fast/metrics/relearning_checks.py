"""What `relearn` refuses: each function raises ValueError naming the argument, what it got and what it needs."""

from __future__ import annotations

import math

from torch import nn

from ..methods.checks import check_samples
from ..methods.data import SampleSet
from ..methods.training import device_of
from ..ops import check
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
        if not check.whole(value) or value < 1:
            raise ValueError(f"{name}: got {value!r}; needs a whole number >= 1")
    if not seeds or any(not check.whole(s) or s < 0 for s in seeds) or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: got {seeds}; needs how many (>= 1), or different whole numbers >= 0")


def checked_sets(model: nn.Module, **sets) -> dict[str, SampleSet]:
    """Those of the sets that are given (forget must be), ready to be read: of samples that the model takes, labels that it predicts."""
    found = {name: SampleSet(name, data, device_of(model)) for name, data in sets.items() if data is not None or name == "forget"}
    for samples in found.values():
        check_samples(model, samples, None, classes=True)
    return found
