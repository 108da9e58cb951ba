"""The CUDA C++ kernels against the Triton ones, size by size, on the GPU at hand; bench/dispatch_table.py reads what it writes.

    python bench/gpu_backends.py --commit <hash>        → bench/results/<device>/backends-<hash>.json

Each case runs with ENTANGLE_FAST_BACKEND=cuda and =triton, a cold L2 cache, medians. A case is wrong where cuda's result is
farther from the reference's than 1e-6 and than twice Triton's distance.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from gpu_job import AGAIN, DEVICE, GPU, Timer, chosen
from gpu_matrix import ROOT, Report, versions

import entangle_fast as ef
from entangle_fast import dispatch

SIZES = (10**6, 10**8, 10**4)  # in this order, so that a run cut short has the sizes that matter
DTYPES = (torch.bfloat16, torch.float32)
GRAM, PROJECT = (256, 512), (64, 256, 64)  # positions, width, and directions


def lists(total: int, dtype: torch.dtype, count: int) -> list[list[torch.Tensor]]:
    each = min(total, 1 << 24)
    return [[torch.randn(each, device=DEVICE).to(dtype) for _ in range(max(1, total // each))] for _ in range(count)]


def step_gram(size, dtype):
    directions = lists(size, dtype, 2)
    return lambda: ef.ops.step_gram(directions)


def step_update(size, dtype):
    params, momentum, grads, direction = lists(size, dtype, 4)
    coef = torch.full((1,), 1e-3, device=DEVICE)

    def run():  # with beta 0 what the momentum holds does not depend on earlier runs
        ef.ops.step_update(params, momentum, grads, [direction], coef, lr=1e-6, beta=0.0)
        return momentum[0][: 1 << 16]

    return run


def w2_sorted(size, dtype):
    x, y = (torch.randn(size, device=DEVICE).to(dtype) for _ in range(2))
    return lambda: ef.ops.w2_sorted(x, y)[1]


def logits(size, dtype):
    classes = 50257 if size >= 10**6 else 1000
    x = torch.randn(max(1, size // classes), classes, device=DEVICE).to(dtype)
    return x, torch.randint(0, classes, x.shape[:1], device=DEVICE)


def sample_loss(size, dtype):
    x, target = logits(size, dtype)
    return lambda: ef.ops.sample_loss(x, target)


def sample_loss_backward(size, dtype):
    x, target = logits(size, dtype)
    rest = (math.inf, 0.0, -100, 0.0, "mean")
    _, ce, lse = ef.reference.sample_loss(x, target, *rest)
    weights = torch.randn_like(ce)
    return lambda: dispatch.call("sample_loss_backward", weights, x, target, ce, lse, *rest)


def gram(size, dtype):
    t, d = GRAM
    a, b = (torch.randn(max(1, size // (2 * t * d)), t, d, device=DEVICE).to(dtype) for _ in range(2))
    return lambda: ef.ops.gram(a, b, route="tiles")


def project_random(size, dtype):
    t, d, k = PROJECT
    a, b = (torch.randn(max(1, size // (2 * t * d)), t, d, device=DEVICE).to(dtype) for _ in range(2))
    return lambda: ef.ops.project_random(a, b, k, seed=1)


CASES = {f.__name__: f for f in (step_gram, step_update, w2_sorted, sample_loss, sample_loss_backward, gram, project_random)}


def measure(op: str, size: int, dtype: torch.dtype, timer: Timer) -> dict:
    run, elements, choose = CASES[op](size, dtype), [], dispatch._choose

    def counting(name, args):  # the size that dispatch.py itself will look up
        if name == op:
            elements.append(sum(x.numel() for x in dispatch.tensors_of(args)))
        return choose(name, args)

    found, ms = {}, {}
    for backend in ("reference", "triton", "cuda"):
        with chosen(backend):
            dispatch._choose = counting
            try:
                found[backend] = run().double()
            finally:
                dispatch._choose = choose
            if backend != "reference":
                ms[backend] = timer(run)["ms"]
    scale = found["reference"].norm().clamp(min=1e-300)
    apart = {b: ((found[b] - found["reference"]).norm() / scale).item() for b in ms}
    return {"op": op, "backend": "cuda", "dtype": str(dtype), "elements": elements[0], "ms": ms["cuda"], "triton_ms": ms["triton"],
            "error": apart["cuda"], "triton_error": apart["triton"],
            "correct": apart["cuda"] <= max(1e-6, 2 * apart["triton"])}  # fmt: skip


def run(report: Report, sizes, timer: Timer, seconds: float, each: float = 75.0) -> bool:
    """Every case that the report does not have, size by size; none is begun after ``seconds``. As gpu_matrix.run."""
    began = time.perf_counter()
    for key in ("begun", "backends", "failed", "skipped"):
        report.content.setdefault(key, [])
    for size, op, dtype in ((s, o, d) for s in sizes for o in CASES for d in DTYPES):
        name = f"{op} {dtype} {size}"
        if name in report.content["begun"]:
            continue
        if time.perf_counter() - began > seconds:
            report.content["skipped"].append(name)
            continue
        report.content["begun"].append(name)

        def case(op=op, size=size, dtype=dtype):
            report.content["backends"].append(measure(op, size, dtype, timer))
            print(json.dumps(report.content["backends"][-1]), flush=True)

        if not report.attempt(case, lambda why, name=name: report.content["failed"].append(f"{name}: {why}"), each):
            return False
    report.save()
    return True


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--budget", type=float, default=300, help="seconds after which no further case begins")
    parser.add_argument("--again", action="store_true", help="go on with the report that a process left that exited with 75")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    options = parser.parse_args(arguments)
    if not GPU:
        print("gpu_backends: no GPU that torch can use; nothing was measured", file=sys.stderr)
        return 3
    report = Report(f"backends-{options.commit}", options.results, options.again, commit=options.commit, **versions())
    if not run(report, SIZES, Timer(30, 1.0), options.budget):
        return AGAIN
    print("written:", *report.paths)
    return int(bool(report.content["failed"]) or not all(r["correct"] for r in report.content["backends"]))


if __name__ == "__main__":
    sys.exit(main())
