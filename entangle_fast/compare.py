"""Methods against methods: every method on every seed, each in a process of its own, into one folder.

    config.toml                 the settings; ``entangle-fast compare FOLDER/config.toml`` takes it
    models/original-SEED, models/retrain-SEED .safetensors
    cells/METHOD-SEED.json      what was measured, or the error; written whole or not at all
    report.json, index.html, figures

A folder is continued: finished cells are kept, failed ones are tried again, methods and seeds may be added, other
settings are refused.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import demo, job_config, storage
from .compare_schedule import CELLS, ORIGINAL, RETRAIN, TRAIN, Task, drive
from .config import TaskConfig
from .config_reading import ConfigError, from_dict, from_toml, nearest, to_dict
from .lock import LOCK, held
from .methods import METHODS
from .progress import say

CONFIG = "config.toml"
SAME = ("quick", "attack_seeds", "attack_steps")  # what cells of one folder share, beside the task and their method's options


@dataclass(kw_only=True)
class CompareOptions:
    """methods: names in METHODS, all of them when empty; seeds: 0 … seeds−1; jobs: cells at once, which share the cores.

    attack_seeds, attack_steps: relearning runs for each attacker and model, and their steps.
    quick: a fifth of the passes, to look around.
    """

    methods: list[str] = field(default_factory=list)
    seeds: int = 3
    jobs: int = 2
    attack_seeds: int = 3
    attack_steps: int = 200
    quick: bool = False
    out: str = "runs/compare"
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("seeds", "jobs", "attack_seeds", "attack_steps"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"got {value}, needs at least one", key=(name,))


@dataclass(kw_only=True)
class CompareConfig:
    """A comparison. method: for each name, options other than the demo's (or, without those, the defaults); a name that
    compare.methods lacks is added to the run."""

    task: TaskConfig
    compare: CompareOptions = field(default_factory=CompareOptions)
    method: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.task.adjacency != "label":
            raise ConfigError(
                f'got {self.task.adjacency!r}, needs "label": with neighbours every seed would have sets of its own',
                key=("task", "adjacency"),
            )


def read_config(path: str | os.PathLike | None = None, **given: Any) -> CompareConfig:
    """The comparison of a TOML file (CompareConfig), of options, or of both: options that are not None go before the file's.

    given: forget, labels, and the fields of CompareOptions. out is runs/compare-CLASS where nothing says otherwise.
    Raises as config.from_toml.
    """
    given = {key: value for key, value in given.items() if value is not None}
    task = {key: given.pop(key) for key in ("forget", "labels") if key in given}
    if path is None:
        config = from_dict(CompareConfig, {"task": {"forget": ["Sneaker"], **task}, "compare": given}, "compare")
    else:
        config = from_toml(path, CompareConfig)
        config = CompareConfig(task=replace(config.task, **task), compare=replace(config.compare, **given), method=config.method)
    if config.compare.out == CompareOptions.out:
        config.compare.out += "-" + "-".join(config.task.forget).lower().replace("/", "-")
    return config


def chosen(config: CompareConfig) -> dict[str, Any]:
    """{name: method} in the order of METHODS, retrain last: the demo's settings, else defaults, then config.method's.

    Raises ConfigError for a name that is no method, or an option that the method lacks.
    """
    for key, names in ((("compare", "methods"), config.compare.methods), (("method",), config.method)):
        for name in names:
            if name not in METHODS:
                raise ConfigError(f"got {name!r}; {nearest(name, METHODS)}", key=key)
    quick = config.compare.quick
    tuned = {type(m).name: m for m in demo.methods(quick)}
    order = list(METHODS)
    names = sorted({*(config.compare.methods or METHODS), *config.method, RETRAIN}, key=lambda n: (n == RETRAIN, order.index(n)))
    methods = {}
    for name in names:
        base = to_dict(tuned[name] if name in tuned else METHODS[name]())
        if quick and name not in tuned:
            base |= {k: _fifth(v) for k, v in base.items() if "epochs" in k and isinstance(v, (int, float))}
        methods[name] = from_dict(METHODS[name], {**base, **config.method.get(name, {})}, f"method.{name}")
    return methods


def _fifth(epochs: int | float) -> int | float:
    return max(1, round(epochs / 5)) if isinstance(epochs, int) else epochs / 5


def load_task(config: TaskConfig):
    """The data: without a path the package's slice of Fashion-MNIST, as in the demo, so that machines compare."""
    if config.dataset == "fashion_mnist" and config.path is None:
        return demo.fashion_mnist(forget=config.forget, labels=config.labels, full=False)
    return job_config.load_task(config)


def run(config: CompareConfig) -> dict:
    """Run what is missing in config.compare.out and write its report; the report.

    Raises ValueError for settings that cannot be used and a folder that another process writes to, CheckpointError for one of other
    settings;
    KeyboardInterrupt after the running cells were stopped: finished ones are kept, and the next call goes on.
    A cell that fails is in the report with its error and does not stop the others.
    """
    options = config.compare
    methods = chosen(config)
    demo.split_by_label(load_task(config.task))  # a wrong class name is told before anything is made
    with held(options.out):
        return _fill(Path(options.out), config, methods)


def _fill(folder: Path, config: CompareConfig, methods: dict[str, Any]) -> dict:
    """Of `run`, in a folder that is held; its cells are processes of their own and do not ask for it."""
    from . import compare_report

    options = config.compare
    storage.save_toml(folder / CONFIG, _settle(folder, config, methods))
    tasks = []
    for seed in range(options.seeds):
        tasks += [Task(TRAIN, seed), Task(RETRAIN, seed), Task(ORIGINAL, seed)]
        tasks += [Task(name, seed) for name in methods if name != RETRAIN]
    todo = [task for task in tasks if not task.done(folder)]
    for task in todo:
        task.made(folder).unlink(missing_ok=True)
    if todo:
        finished = f", {len(tasks) - len(todo)} finished before" if len(todo) < len(tasks) else ""
        say(options.progress, f"compare: {len(todo)} cells to run{finished} (methods: {len(methods)}, seeds: {options.seeds}), "
            f"{options.jobs} at a time; how long they take is told after the first that is measured")  # fmt: skip
    try:
        drive(folder, todo, options)
    except KeyboardInterrupt:
        if any((folder / CELLS).glob("*.json")):
            compare_report.write(folder)
        raise
    return compare_report.write(folder)


def _settle(folder: Path, config: CompareConfig, methods: dict[str, Any]) -> dict:
    """What config.toml shall say: these settings joined with those of the folder. Raises CheckpointError."""
    path = folder / CONFIG
    new = {
        "task": to_dict(config.task),
        "compare": {"methods": list(methods), "seeds": config.compare.seeds, **{key: getattr(config.compare, key) for key in SAME}},
        "method": {name: to_dict(method) for name, method in methods.items()},
    }
    if not path.exists():
        if folder.is_dir() and any(path.name != LOCK for path in folder.iterdir()):
            raise storage.CheckpointError(f"{folder}: holds files but no comparison; give another --out, or empty it")
        return new
    try:
        old = from_toml(path, CompareConfig)
        before = chosen(old)
    except ConfigError as error:
        raise storage.CheckpointError(f"{folder}: is no folder of a comparison ({error}); give another --out") from error
    pairs = [("task", to_dict(old.task), new["task"])]
    pairs += [(key, getattr(old.compare, key), getattr(config.compare, key)) for key in SAME]
    kept = {n for n in before if any(Task(n, seed).done(folder) for seed in range(old.compare.seeds))}
    pairs += [(f"method.{name}", to_dict(before[name]), new["method"][name]) for name in methods if name in kept]
    for key, theirs, ours in pairs:
        if theirs != ours:
            if isinstance(theirs, dict):
                key, theirs, ours = next((f"{key}.{k}", theirs.get(k), ours.get(k)) for k in ours if theirs.get(k) != ours[k])
            raise storage.CheckpointError(
                f"{folder}: holds a comparison with {key} {theirs!r}, this one has {ours!r}; give the same, or another --out"
            )
    new["compare"]["seeds"] = max(config.compare.seeds, old.compare.seeds)
    new["method"] = {n: to_dict(m) for n, m in before.items() if n in kept and n not in methods} | new["method"]
    new["compare"]["methods"] = list(new["method"])
    return new
