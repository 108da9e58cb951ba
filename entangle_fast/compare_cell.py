"""One cell of a comparison, in a process of its own: ``python -m entangle_fast.compare_cell FOLDER WHAT SEED THREADS JOBS``."""

from __future__ import annotations

import copy
import json
import math
import os
import statistics
import sys
import threading
import time
import traceback
from importlib.util import find_spec
from pathlib import Path

import torch

from . import compare, demo, storage
from .compare_schedule import ORIGINAL, RETRAIN, TRAIN, Task
from .config_reading import from_toml
from .job import unlearn
from .job_run import task_facts
from .machine import machine_info
from .metrics.angle import gradient_angle
from .metrics.privacy import membership
from .metrics.relearning import relearn
from .metrics.utility import utility

ATTACKERS = ("sgd", "adam")


def work(folder: Path, task: Task, jobs: int = 1) -> None:
    """Train or measure what `task` says and write its file; a cell's failure is written into the cell, not raised."""
    config = from_toml(folder / compare.CONFIG, compare.CompareConfig)
    data = compare.load_task(config.task)
    sets = data.split()
    if task.what == TRAIN:
        model, row = demo.train_original(data, sets, task.seed, config.compare.quick)
        storage.save_tensors(task.made(folder), model.state_dict(), {"row": json.dumps(storage.plain(row))})
        return
    start = time.perf_counter()
    cell = {"method": task.what, "seed": task.seed, "jobs": jobs, "threads": torch.get_num_threads(), "commit": machine_info()["commit"]}
    try:
        cell |= {"state": "done", **_cell(folder, config, data, sets, task)}
    except Exception as error:  # whatever a method or an attack does wrong is this cell's, not the comparison's
        cell |= {"state": "failed", "error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    storage.save_json(task.made(folder), cell | {"wall_seconds": time.perf_counter() - start})


def _cell(folder, config, data, sets, task: Task) -> dict:
    path = Task(TRAIN, task.seed).made(folder)
    original = _load(data, path)
    retrained_path = path.with_name(f"{RETRAIN}-{task.seed}.safetensors")
    facts: dict = {}
    if task.what == ORIGINAL:
        model = original
        row = json.loads(storage.load_metadata(path)["row"])
    else:
        model = copy.deepcopy(original)
        method = compare.chosen(config)[task.what]
        result = unlearn(model, **sets.train._asdict(), test=sets, method=method, seed=task.seed, augment=demo.AUGMENT,
                         progress=False)  # fmt: skip
        row, facts = result.row(), result.facts
    if task.what == RETRAIN:
        storage.save_tensors(retrained_path, model.state_dict())
    retrained = _load(data, retrained_path) if retrained_path.is_file() else None
    more, details = measure_cell(model, original=original, retrained=retrained, sets=sets, seed=task.seed,
                                 attack_seeds=config.compare.attack_seeds, attack_steps=config.compare.attack_steps)  # fmt: skip
    return {"row": row | more, "facts": facts, "task": task_facts(sets), **details}


def measure_cell(model, *, original, retrained, sets, seed: int, attack_seeds: int, attack_steps: int) -> tuple[dict, dict]:
    """What stands beside a model's accuracies: (numbers for compare_report.COLUMNS, details).

    retrained: the model of the same seed trained without the forget set, or None: no distances then.
    Distances are taken on the test sets. Membership: forget training samples against test samples of the same classes.
    Relearning: on the forget training samples, ``attack_seeds`` runs an attacker of ``attack_steps`` steps; one that diverges measures
    nothing and is left out, its reason in details["notes"].
    """
    row, details = {}, {"notes": []}
    details["utility"] = utility(model, sets, retrained=retrained)
    if retrained is not None:
        gold = utility(retrained, {"forget": sets.test.forget})["forget"]["accuracy"]
        row["gap"] = abs(details["utility"]["forget"]["accuracy"] - gold)
        row["kl"] = statistics.fmean(found["kl_retrained"] for found in details["utility"].values())
    attacks = ("loss", "entropy", "classifier") if find_spec("sklearn") else ("loss", "entropy")
    found = membership(model, sets.train.forget, sets.test.forget, attacks=attacks, seed=seed)
    details["membership"] = found.summary()
    # on either side of 0.5 something is told
    row["mia"] = max(max(auc, 1 - auc) for auc in found.auc.values())
    row["angle"] = gradient_angle(model, sets.train.forget, sets.retain)
    for attacker in ATTACKERS:
        try:
            attack = relearn(model, original, sets.train.forget, attacker=attacker, steps=attack_steps, seeds=attack_seeds,
                             progress=False)  # fmt: skip
        except FloatingPointError as error:
            details["notes"].append(f"relearning by {attacker}: {error}")
            continue
        details[f"relearning_{attacker}"] = attack.summary()
        row[f"rcd_{attacker}"] = attack.median if math.isfinite(attack.median) else f">{attack_steps}"
    return row, details


def _load(data, path: Path) -> torch.nn.Module:
    model = demo.model_for(data)
    model.load_state_dict(storage.load_tensors(path))
    return model.eval()


def main(arguments: list[str]) -> None:
    folder, what, seed, threads, jobs = arguments
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(int(threads))
    work(Path(folder), Task(what, int(seed)), int(jobs))


def _end_with_parent() -> None:
    """However the comparison ended, its side of the pipe is closed then."""
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
