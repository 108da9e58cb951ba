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
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from . import demo, job_config, storage
from .config import TaskConfig
from .config_reading import ConfigError, from_dict, from_toml, to_dict
from .methods import METHODS
from .progress import say, shown

CONFIG, CELLS, MODELS = "config.toml", "cells", "models"
ORIGINAL, RETRAIN, TRAIN = "original", "retrain", "train"  # TRAIN makes the original model; ORIGINAL measures it
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
    """A comparison. method: for each name, options other than the demo's (or, without those, the defaults)."""

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


@dataclass(kw_only=True)
class _Chosen:
    method: Any = field(metadata={"table": lambda: METHODS})


def chosen(config: CompareConfig) -> dict[str, Any]:
    """{name: method} in the order of METHODS, retrain last: the demo's settings, else defaults, then config.method's.

    Raises ConfigError for a name that is no method, or an option that the method lacks.
    """
    quick = config.compare.quick
    tuned = {type(m).name: m for m in demo.methods(quick)}
    names = list(dict.fromkeys([*(config.compare.methods or METHODS), *config.method]))
    order = list(METHODS)
    names = sorted({*names, RETRAIN}, key=lambda n: (n == RETRAIN, order.index(n) if n in order else -1))
    methods = {}
    for name in names:
        base = {}
        if name in METHODS:
            base = to_dict(tuned[name] if name in tuned else METHODS[name]())
            if quick and name not in tuned:
                base |= {k: _fifth(v) for k, v in base.items() if "epochs" in k and isinstance(v, (int, float))}
        options = {"name": name, **base, **config.method.get(name, {})}
        methods[name] = from_dict(_Chosen, {"method": options}, where=name).method
    return methods


def _fifth(epochs: int | float) -> int | float:
    return max(1, round(epochs / 5)) if isinstance(epochs, int) else epochs / 5


def load_task(config: TaskConfig):
    """The data: without a path the package's slice of Fashion-MNIST, as in the demo, so that machines compare."""
    if config.dataset == "fashion_mnist" and config.path is None:
        return demo.fashion_mnist(forget=config.forget, labels=config.labels, full=False)
    return job_config.load_task(config)


class Task(NamedTuple):
    """One piece of work: TRAIN, or the name of a method (or ORIGINAL) to measure, for one seed."""

    what: str
    seed: int

    def made(self, folder: Path) -> Path:
        if self.what == TRAIN:
            return folder / MODELS / f"{ORIGINAL}-{self.seed}.safetensors"
        return folder / CELLS / f"{self.what}-{self.seed}.json"

    def done(self, folder: Path) -> bool:
        path = self.made(folder)
        if not path.is_file():
            return False
        return self.what == TRAIN or storage.load_json(path).get("state") == "done"


def run(config: CompareConfig) -> dict:
    """Run what is missing in config.compare.out and write its report; the report.

    Raises ValueError for settings that cannot be used, CheckpointError for a folder of other settings;
    KeyboardInterrupt after the running cells were stopped: finished ones are kept, and the next call goes on.
    A cell that fails is in the report with its error and does not stop the others.
    """
    from . import compare_report

    options = config.compare
    methods = chosen(config)
    load_task(config.task).split()  # a wrong class name is told before anything is made
    folder = Path(options.out)
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
        _drive(folder, todo, options)
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
        if folder.is_dir() and any(folder.iterdir()):
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


# ---- scheduling ----


class _Crew:
    """Child processes: each one piece of work, out of the reach of the terminal's ctrl-C, ended by `stop`."""

    def __init__(self, folder: Path, threads: int, jobs: int):
        self.folder, self.threads, self.jobs = folder, threads, jobs
        self.live: set[subprocess.Popen] = set()
        self.lock, self.stopping = threading.Lock(), False

    def work(self, task: Task) -> str | None:
        """Do `task` in a process of its own and wait for it; what went wrong, where the process could not say it itself."""
        command = [sys.executable, "-m", "entangle_fast.compare_cell", str(self.folder), task.what, str(task.seed)]
        with self.lock:
            if self.stopping:
                return None
            child = subprocess.Popen(
                [*command, str(self.threads), str(self.jobs)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True,
            )  # fmt: skip
            self.live.add(child)
        with child:  # its stdin stays open as long as this process lives
            said = child.stderr.read().strip().splitlines()
        with self.lock:
            self.live.discard(child)
            if self.stopping or not child.returncode:
                return None
        if child.returncode < 0:
            name = signal.Signals(-child.returncode).name
            return f"killed by {name}" + ("; maybe memory ran out: try fewer jobs" if name == "SIGKILL" else "")
        return said[-1] if said else f"the process ended with {child.returncode}"

    def stop(self) -> None:
        with self.lock:
            self.stopping = True
            for child in self.live:
                child.terminate()


def _drive(folder: Path, todo: list[Task], options: CompareOptions) -> None:
    """Do all of `todo`, options.jobs at a time: a seed's original first, then its retrained model, then the others."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    crew = _Crew(folder, max(1, cores // options.jobs), options.jobs)
    pending, running, failed = list(todo), {}, set()
    began, took = {}, []  # when a cell began; seconds of those that were measured

    def blocked(task: Task) -> bool:
        before = {TRAIN: (), RETRAIN: (TRAIN,)}.get(task.what, (TRAIN, RETRAIN))
        return any(Task(what, task.seed) in (*pending, *running.values()) for what in before)

    with ThreadPoolExecutor(options.jobs) as pool, shown(options.progress, "compare", len(todo), unit="cells") as advance:
        try:
            while pending or running:
                for task in [t for t in pending if Task(TRAIN, t.seed) in failed]:
                    pending.remove(task)
                    if task.what != ORIGINAL:  # whose cell says why
                        _note_failure(folder, task, "the original model could not be trained")
                while len(running) < options.jobs and (ready := [t for t in pending if not blocked(t)]):
                    pending.remove(ready[0])
                    running[pool.submit(crew.work, ready[0])] = ready[0]
                    began[ready[0]] = time.monotonic()
                left = len(pending) + len(running)
                text = ", ".join(f"{t.what.replace('_', ' ')} {t.seed}" for t in running.values())
                advance(len(todo) - left, f"{text}; {_rest(took, left, options.jobs)}" if took else text)
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    task: Task = running.pop(future)
                    error = future.result()
                    if task.what != TRAIN and task.done(folder):
                        took.append(time.monotonic() - began[task])
                    if not task.made(folder).is_file():
                        failed.add(task)
                        _note_failure(folder, task, error or "nothing was written")
            advance(len(todo), "")
        except BaseException:
            crew.stop()
            raise


def _rest(took: list[float], left: int, jobs: int) -> str:
    """How long ``left`` cells take if they take as long as those before them."""
    minutes = sum(took) / len(took) * left / min(jobs, left) / 60
    if minutes < 1:
        return "less than a minute left"
    return f"about {minutes:.0f} min left" if minutes < 90 else f"about {minutes / 60:.1f} h left"


def _note_failure(folder: Path, task: Task, error: str) -> None:
    task = Task(ORIGINAL, task.seed) if task.what == TRAIN else task
    storage.save_json(task.made(folder), {"method": task.what, "seed": task.seed, "state": "failed", "error": error})
