"""The demo: train a small model on Fashion-MNIST superclasses, forget one class by every method, one table.

Superclass labels: tops, trousers, footwear, bag. The forgotten class and its neighbours share a label, so the test is
whether a method can drop the one and keep the others. A model retrained without the class still calls it by the
superclass (≈ 100 %): accuracy 0 on it is misclassification on purpose, not equivalence to retraining.
"""

from __future__ import annotations

import copy
import time
from dataclasses import asdict
from pathlib import Path

import torch

from . import report, storage
from .job import unlearn
from .lock import held
from .machine import machine_info
from .methods import Entangled, FineTune, GradientAscent, NegGradPlus, RandomLabels, Retrain
from .methods.training import fit
from .metrics import evaluate
from .metrics.memory import PeakMemory
from .progress import shown
from .tasks import RandomShift, SmallCNN, fashion_mnist
from .tasks.sets import NoneAdjacent

EPOCHS, PEAK_LR, BATCH = 8, 3e-3, 128  # of the original model and of the retrained one
SHOWN = 8  # class names in an error
AUGMENT = RandomShift(1)  # for every method and both trainings: the shipped slice has a third of the training images


def methods(quick: bool = False) -> list:
    """The unlearned models of the table, in the order in which they are made."""
    scale = 0.2 if quick else 1.0
    return [
        Entangled(**ENTANGLED, epochs2=4.5 * scale),
        GradientAscent(),
        FineTune(epochs=2 * scale),
        NegGradPlus(epochs=6 * scale),
        RandomLabels(epochs=6 * scale),
        Retrain(epochs=max(1, round(EPOCHS * scale)), lr=PEAK_LR, batch=BATCH),
    ]


# how these were chosen: CONTRIBUTING.md, "The demo's setting"
ENTANGLED = dict(
    away_from="forget_samples", lr1=1e-4, clip=5.0, lr2=4e-3, max_norm2=30.0, forget_batch2=128, remote_batch2=768,
    batch_limit=1,
)  # fmt: skip


def run(forget: str = "Sneaker", seeds: int = 3, out="runs/demo", quick: bool = False, progress: bool = True) -> dict:
    """Run the demo and write report.json, history.csv, losses.safetensors, config.toml and model.safetensors to ``out``.

    forget: a class name.  seeds: how many models are trained and unlearned.  quick: a fifth of the passes, to look around.
    Raises ValueError for a class that cannot be forgotten, and for a folder that another process writes to.
    Returns the report. Figures and the printed table are made from the folder by report_table.rebuild.
    """
    out = Path(out)
    if seeds < 1:
        raise ValueError(f"seeds: got {seeds}; needs at least one")
    task = fashion_mnist(forget=forget, full=False)
    sets = split_by_label(task)
    with held(out):
        return _fill(out, task, sets, forget, seeds, quick, progress)


def _fill(out: Path, task, sets, forget: str, seeds: int, quick: bool, progress: bool) -> dict:
    """Of `run`, in a folder that is held."""
    rows: dict[str, list[dict]] = {"original": []}
    history, losses = [], {}
    storage.save_toml(out / "config.toml", _settings(forget, seeds, quick))
    for seed in range(seeds):
        original, row = train_original(task, sets, seed, quick, progress)
        rows["original"].append(row)
        for method in methods(quick):
            model = copy.deepcopy(original)
            result = unlearn(model, **sets.train._asdict(), test=sets, method=method, seed=seed, augment=AUGMENT,
                             progress=progress)  # fmt: skip
            rows.setdefault(result.method, []).append(result.row())
            history += result.history
            losses |= result.losses
            if result.method == "entangled" and seed == 0:
                storage.save_tensors(out / "model.safetensors", model.state_dict())
                facts, described = result.facts, result.task
        found = {
            "methods": {name: report.aggregate(r) for name, r in rows.items()},
            "task": {**described, "dataset": "fashion_mnist", "labels": "super", "source": task.source, "goal": GOAL},
            "facts": facts, **machine_info(), "figures": [],
        }  # fmt: skip
        # after each seed: ctrl-C keeps the seeds that are done
        storage.save_tensors(out / report.LOSSES, losses)
        report.write_history(out, history)
        storage.save_json(out / report.REPORT, found)
    return found


def split_by_label(task):
    """task.split() for what has no trained model yet to find neighbours with. Raises ValueError where no class is adjacent by label."""
    try:
        return task.split()
    except NoneAdjacent as error:
        members = task.superclass_of.bincount()[task.superclass_of] if task.superclass_names else ()
        shared = [name for name, count in zip(task.class_names, members) if count > 1]
        mend = (f"forget fewer, or one of {', '.join(shared[:SHOWN])}{', …' if shared[SHOWN:] else ''}" if shared
                else "name superclasses, of an image folder in its superclasses.toml")  # fmt: skip
        raise ValueError(f"{error.problem}; here only classes of the same superclass are adjacent: {mend}") from error


GOAL = "misclassify the forgotten class while its neighbours keep their label; retraining alone does not do that here"


def model_for(task) -> SmallCNN:
    """A new model for the task's images."""
    # on the CPU pooling is slow in the default layout: CONTRIBUTING.md has the figures
    return SmallCNN(task.num_classes, *task.train_x.shape[1:3]).to(memory_format=torch.channels_last)


def train_original(task, sets, seed: int = 0, quick: bool = False, progress: bool = False):
    """The model that all methods start from, and its row of the report."""
    torch.manual_seed(seed)
    model = model_for(task)
    x, y = task.train_set()
    epochs = 1 if quick else EPOCHS
    with PeakMemory() as peak, shown(progress, f"training, seed {seed}", epochs, unit="epochs") as advance:
        start = time.perf_counter()
        fit(
            model, x, y, epochs=epochs, lr=PEAK_LR, batch_size=BATCH, seed=seed, augment=AUGMENT,
            progress=lambda epoch, epochs, loss: advance(epoch, ""),
        )  # fmt: skip
        seconds = time.perf_counter() - start
    return model, {"seed": seed, **evaluate(model, sets), "seconds": seconds, "peak_mb": peak.mb}


def _settings(forget, seeds, quick) -> dict:
    options = {type(m).name: asdict(m) for m in methods(quick)}
    original = {"epochs": EPOCHS, "lr": PEAK_LR, "batch": BATCH}
    return {"demo": {"forget": forget, "seeds": seeds, "quick": quick}, "original": original, "methods": options}
