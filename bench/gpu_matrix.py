"""The benchmark matrix of bench/gpu.sh: the machine's ceilings, then every job with a cold L2 cache, medians.

    python bench/gpu_matrix.py --commit <hash> [--tests tests.xml] [--budget seconds] [--long] [--only text] [--again]

Writes bench/results/<device>/<commit>.json (and $OUT/results/<device>/<commit>.json) after every job, so that a run cut short
leaves what it measured. Exits with 75 where a kernel hung or broke the device for this process: with --again the jobs that were
not begun follow, into the same file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import traceback
import xml.etree.ElementTree as xml
from collections.abc import Callable
from pathlib import Path

import gpu_jobs
import gpu_models
import torch
from gpu_job import AGAIN, GPU, Timer, ceilings, failed, limited, measure, release, table

import entangle_fast as ef

ROOT = Path(__file__).resolve().parent


def device_name() -> str:
    return torch.cuda.get_device_name() if GPU else "cpu"


def tests_of(path: str) -> dict:
    """Counts and failures of a JUnit file, and which operation ran correctly on which backend (tests/gpu/conftest.py)."""
    try:
        cases = list(xml.parse(path).getroot().iter("testcase"))
    except (OSError, xml.ParseError) as error:
        return {"missing": f"the tests left no report: {error}"}
    wrong = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    ran: dict[str, bool] = {}
    for case in cases:
        for found in case.iter("property"):
            if found.get("name") == "ran":
                ran[found.get("value")] = ran.get(found.get("value"), True) and case not in wrong
    return {
        "tests": len(cases), "failures": len(wrong), "skipped": sum(c.find("skipped") is not None for c in cases),
        "failed": [f"{c.get('classname')}::{c.get('name')}" for c in wrong],
        "ran": [{"op": k.split("/")[0], "backend": k.split("/")[1], "correct": right} for k, right in sorted(ran.items())],
    }  # fmt: skip


def plain(x):
    """JSON knows no infinity and no NaN."""
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(v) for v in x]
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x


class Report:
    """A JSON file that is written anew after every addition; again: that of an earlier process is gone on with."""

    def __init__(self, name: str, results: Path, again: bool = False, **head):
        folder = device_name().replace(" ", "_")
        roots = [results, *([Path(os.environ["OUT"]) / "results"] if os.environ.get("OUT") else [])]
        self.paths = [root / folder / f"{name}.json" for root in roots]
        self.content = {"device": device_name(), **head}
        if again and self.paths[0].exists():
            self.content = json.loads(self.paths[0].read_text())

    def save(self) -> None:
        for path in self.paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            part.write_text(json.dumps(plain(self.content), indent=1) + "\n")
            part.replace(path)

    def attempt(self, run: Callable[[], None], failed: Callable[[str], None], each: float) -> bool:
        """run(), at most ``each`` seconds, and what came of it saved. False: the rest needs a new process."""

        def give_up():
            failed(f"no answer within {each:.0f} s")
            self.save()

        with limited(each, give_up):
            try:
                run()
            except Exception as error:  # one job must not cost the others their numbers
                traceback.print_exc()
                failed(f"{type(error).__name__}: {str(error)[:400]}")
        self.save()
        return release()


def versions() -> dict:
    try:
        import triton

        triton_version = triton.__version__
    except ModuleNotFoundError:
        triton_version = None
    return {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "python": sys.version.split()[0], "torch": torch.__version__,
            "triton": triton_version, "cuda": torch.version.cuda or torch.version.hip}  # fmt: skip


def run(report: Report, jobs: dict, timer: Timer, seconds: float, each: float = 75.0) -> bool:
    """Every job that the report does not have into it; none is begun after ``seconds``. False: the rest needs a new process."""
    began, done = time.perf_counter(), report.content.setdefault("jobs", {})
    for title, make in jobs.items():
        if title in done:
            continue
        if time.perf_counter() - began > seconds:
            done[title] = {"skipped": "no time left"}
            continue
        record = done[title] = {}
        alive = report.attempt(
            lambda make=make, record=record: measure(make(), timer, report.content["ceilings"], record),
            lambda why, record=record: record.update(failed=why), each,
        )  # fmt: skip
        print(table({title: record}).partition("\n")[2], flush=True)
        if not alive:
            return False
    report.save()
    return True


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--tests", default="", help="JUnit file of tests/gpu")
    parser.add_argument("--budget", type=float, default=150, help="seconds after which no further job begins")
    parser.add_argument("--long", action="store_true", help="more sizes, more repetitions, a sweep over kernel configurations")
    parser.add_argument("--only", default="", help="jobs whose title holds this")
    parser.add_argument("--again", action="store_true", help="go on with the report that a process left that exited with 75")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    options = parser.parse_args(arguments)
    if not GPU:
        print("gpu_matrix: no GPU that torch can use; nothing was measured", file=sys.stderr)
        return 3
    began = time.perf_counter()
    report = Report(options.commit, options.results, options.again, commit=options.commit, long=options.long, **versions())
    if options.tests:
        report.content["tests"] = tests_of(options.tests)
    if options.long and not options.again:
        ef.warmup(dtypes=(torch.bfloat16, torch.float32), sweep=True)
    timer = Timer(200, 8.0) if options.long else Timer(30, 1.5)
    if "ceilings" not in report.content:
        report.content["ceilings"] = ceilings(timer)
        report.save()
    print(json.dumps(report.content["ceilings"]), flush=True)
    jobs = {k: v for k, v in {**gpu_models.jobs(options.long), **gpu_jobs.jobs(options.long)}.items() if options.only in k}
    if not run(report, jobs, timer, options.budget - (time.perf_counter() - began), 300.0 if options.long else 75.0):
        return AGAIN
    print("written:", *report.paths)
    return int(any(failed(j) for j in report.content["jobs"].values()))


if __name__ == "__main__":
    sys.exit(main())
