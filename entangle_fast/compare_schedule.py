"""The work of a comparison: its pieces, each in a process of its own, and their order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from . import storage
from .progress import shown

if TYPE_CHECKING:
    from .compare import CompareOptions

CELLS, MODELS = "cells", "models"
ORIGINAL, RETRAIN, TRAIN = "original", "retrain", "train"  # TRAIN makes the original model; ORIGINAL measures it


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


class Crew:
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


def drive(folder: Path, todo: list[Task], options: CompareOptions) -> None:
    """Do all of `todo`, options.jobs at a time: a seed's original first, then its retrained model, then the others."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    crew = Crew(folder, max(1, cores // options.jobs), options.jobs)
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
