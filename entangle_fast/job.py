"""The whole job: a model, three sets and a method in; an unlearned model, its history and its report out."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from .job_run import Run
from .lock import held
from .methods.process import sample_cross_entropy
from .ops.check import whole
from .report import UNFINISHED, run_in
from .result import Result


@torch.enable_grad()
def unlearn(
    model: nn.Module, *, forget, adjacent, remote, method=None, test=None, loss=sample_cross_entropy, seed: int = 0,
    out=None, resume: bool = False, overwrite: bool = False, progress: bool = True, checkpoint_every: int = 50,
    eval_every: int = 0, augment=None, allow_overlap: bool = False,
) -> Result:  # fmt: skip
    """Make a trained model forget some samples while keeping those that are entangled with them.

    Args:
        model: a trained classifier, changed in place; it runs in eval mode (frozen BatchNorm statistics).
        forget, adjacent, remote: disjoint sets, each (x, y) tensors, a map-style Dataset, or a DataLoader of one without
            collate_fn, whose Dataset alone is used. ``adjacent`` are the retain samples close to the forget set, ``remote``
            the others (tasks.split_by_knn finds them).
        method: a dataclass of entangle_fast.methods; default Entangled().
        test: a tasks.Sets, or a mapping of the three names to (x, y) or a Dataset; default: the training samples themselves.
        loss: (output, y) → per-sample losses (n,); default cross-entropy.
        seed: fixes everything random: the same seed gives the same bits on the same machine.
        out: folder to write to; checkpoints every ``checkpoint_every`` steps, the full record at the end. One that holds
            a run, finished or not, is refused without ``resume`` or ``overwrite``, one that another process writes to in any case.
        resume: continue the run whose checkpoint lies in ``out``, to the bit; without one start anew; of a finished run
            give the result, its weights in ``model``. Method, options, seed and data must be those of the run: of tensors
            every byte is compared, of other Datasets class, length, Subset rows and ``targets`` alone; loss and augment
            cannot be.
        overwrite: start anew in a folder that holds a run; its files stay until there are new ones.
        progress: show a progress bar, or lines where stderr is no terminal.
        eval_every: steps between accuracies in the history; 0: only at stage ends.
        augment: (x, generator) → x, applied to training batches (tasks.RandomShift).
        allow_overlap: do not refuse samples that are in two sets.

    Returns: a Result.

    Raises:
        ValueError: empty sets; overlapping ones, where both are tensors (equal samples and labels) or stand on one Dataset
            object (equal rows; not two objects with the same samples); labels out of range, no trainable parameter,
            non-finite parameters, an ``out`` that is a file, holds a run or is being written by another, …
        NonFinite: a loss became NaN or infinite; the step was not taken, the model is as it was before it.
        CheckpointError: a run with other settings or other data, or files that cannot be read or written.
        KeyboardInterrupt: after the step in progress, and after the checkpoint was written if ``out`` is given; it says how to go on. The
            model is as that step left it, half unlearned. A second ctrl-C does not wait for the step.

    >>> import torch, entangle_fast as ef
    >>> x, y, model = torch.randn(60, 4), torch.arange(60) % 2, torch.nn.Linear(4, 2)
    >>> result = ef.unlearn(model, forget=(x[:20], y[:20]), adjacent=(x[20:40], y[20:40]), remote=(x[40:], y[40:]),
    ...                     method=ef.FineTune(epochs=2), progress=False)
    >>> sorted(result.after)
    ['adjacent', 'forget', 'per_class', 'remote']
    """
    _refuse_kinds(model, loss, seed, out, augment, checkpoint_every, eval_every)
    with claimed(out, resume, overwrite):
        sets = (forget, adjacent, remote)
        run = Run(model, sets, method, test, loss, int(seed), out, checkpoint_every, eval_every, augment, allow_overlap)
        return run.go(resume, progress)


def _refuse_kinds(model, loss, seed, out, augment, checkpoint_every, eval_every) -> None:
    """Raise TypeError for what cannot be a model, a loss, a seed, a folder, an augmentation or a count, ValueError for one below 0."""
    for name, x, fits, needs in (
        ("model", model, isinstance(model, nn.Module), "a torch.nn.Module"),
        ("loss", loss, callable(loss), "a function (output, y) → per-sample losses (n,)"),
        ("seed", seed, whole(seed), "a whole number"),
        ("checkpoint_every", checkpoint_every, whole(checkpoint_every), "a whole number of steps, 0 for never"),
        ("eval_every", eval_every, whole(eval_every), "a whole number of steps, 0 for stage ends only"),
        ("out", out, out is None or isinstance(out, (str, os.PathLike)), "a folder's path, or None"),
        ("augment", augment, augment is None or callable(augment), "a function (x, generator) → x, or None"),
    ):
        if not fits:
            raise TypeError(f"{name}: got {type(x).__name__}; needs {needs}")
    for name, count, needs in (
        ("seed", seed, "a whole number"), ("checkpoint_every", checkpoint_every, "a number of steps"),
        ("eval_every", eval_every, "a number of steps"),
    ):  # fmt: skip
        if count < 0:
            raise ValueError(f"{name}: got {count}; needs {needs} >= 0")
    if torch.is_inference_mode_enabled():
        raise ValueError("model: unlearning under torch.inference_mode, where nothing has a gradient; call it outside")


@contextlib.contextmanager
def claimed(out, resume: bool, overwrite: bool) -> Iterator[None]:
    """Hold the folder of a run. Raises ValueError for what cannot be a folder, for one that another process writes to, and for one
    that holds a run, unless it is said what to do with it."""
    if resume and overwrite:
        raise ValueError("resume, overwrite: got both; resume goes on with the run in the folder, overwrite starts anew: give one")
    if out is None:
        if resume:
            raise ValueError("resume: needs the folder out= in which the checkpoint lies")
        yield
        return
    there = next((path for path in (Path(out), *Path(out).parents) if os.path.lexists(path)), None)
    if there is not None and not there.is_dir():
        raise ValueError(f"out: got {out}, where {there} is a file; needs a folder, there or to be made: give another path")
    with held(out):
        there = "" if resume or overwrite else run_in(out)
        if there == UNFINISHED:
            raise ValueError(f"out: {out} holds {there}; resume=True (--resume) goes on with it, "
                             "overwrite=True (--overwrite) starts anew")  # fmt: skip
        if there:
            raise ValueError(f"out: {out} holds {there}; give another folder, or overwrite=True (--overwrite) to run again into it")
        yield
