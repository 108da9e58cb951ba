"""Seconds of one step of each method that has a fast path: its own, and the same step in plain autograd (plain_methods.py).

    python bench/method_steps.py [--rounds 9] [--model small_cnn|mlp] [--out bench/results/<machine>/method_steps.json]

Both start from the same trained model and take the same batches, in turns, in float32. No ratio is printed where in float64
what the two change differs by more than TOLERANCE of its length. Entangled's second stage is timed after WARM steps of the first.
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import authors
import plain_methods as plain
import torch
from torch import nn

import entangle_fast as ef
from entangle_fast import demo
from entangle_fast.machine import machine_info
from entangle_fast.methods.data import Data
from entangle_fast.methods.process import sample_cross_entropy
from entangle_fast.storage import save_json

TOLERANCE = 1e-5
WARM = 40
PGU = 1000  # samples of each set whose inputs it takes apart: the plain form holds every unfolded patch


def step(stage=None):
    """One step by the process itself, whatever its stage is called."""
    return lambda process: process.take_step(stage or process.stages[-1][0], 0)


def authors_step(process):
    c, d = process.config, process.data
    many = lambda samples, size: [samples.batch(j, size)[1:] for j in range(c.batch_limit)]  # noqa: E731
    authors.stage2_step(process.model, process.frozen, process.sgd.buffers, d.adjacent.batch(0, c.adjacent_batch2)[1:],
                        many(d.forget, c.forget_batch2), many(d.remote, c.remote_batch2), alpha=c.alpha, lr=c.lr2,
                        momentum=c.momentum, ridge=0.0)  # fmt: skip


def second_stage(process):
    process.enter("stage1")
    for k in range(WARM):
        process.take_step("stage1", k)
    process.frozen = copy.deepcopy(process.model)
    process.enter("stage2")


def nothing(process):
    pass


def bases(process):
    process.enter("pgu")
    return {id(process.params[i]): m[0] for i, m in process.bases.items()}


# name → configuration, what a process needs before its first step, ours, the plain form, the form whose results are compared
CASES = {
    "entangled, stage 2": (ef.Entangled(max_norm2=1e9), second_stage, step("stage2"), authors_step, None),
    "entangled, stage 2, forget_samples": (
        ef.Entangled(**demo.ENTANGLED), second_stage, step("stage2"), lambda p: plain.entangled_samples(p, 0), None),
    "lookahead, order 1": (ef.Lookahead(angle_every=0), nothing, step(), lambda p: plain.lookahead(p, 0), None),
    "lookahead, order 2": (ef.Lookahead(order=2, angle_every=0), nothing, step(), lambda p: plain.lookahead(p, 0), None),
    "influence": (ef.Influence(), nothing, step(), lambda p: plain.influence(p, 0), ef.Influence(sigma=0.0)),
    "orthograd, k = 64": (ef.OrthoGrad(), nothing, step(), lambda p: plain.orthograd(p, 0), None),
    "orthograd, k = 256": (ef.OrthoGrad(retain_batch=256), nothing, step(), lambda p: plain.orthograd(p, 0), None),
    "woodbury": (ef.Woodbury(), nothing, step(), lambda p: plain.woodbury(p, 0), None),
    "geometric": (ef.Geometric(), nothing, step(), lambda p: plain.geometric(p, 0), None),
    "rosu": (ef.Rosu(), nothing, step(), lambda p: plain.rosu(p, 0), None),
    "pgu, bases": (ef.Pgu(), nothing, bases, plain.pgu_bases, None),
    "ssd, importance": (ef.Ssd(), nothing, step("importance"), lambda p: plain.ssd(p, 0), None),
}  # fmt: skip


def moved(process, before, found):
    """What a call changed, as one vector: spans, sums of squares or parameters."""
    if hasattr(process, "bases"):
        return torch.cat([(m @ m.mT).flatten() for m in found.values()])
    if hasattr(process, "squares"):
        return torch.cat([z.flatten() for z in process.squares["forget"]])
    return torch.cat([(p.detach() - b).flatten() for p, b in zip(process.params, before)])


def begin(config, prepare, trained, sets):
    process = config.start(copy.deepcopy(trained), Data.of(*sets, device="cpu", seed=0), sample_cross_entropy, 0)
    prepare(process)
    return process


def measure(name, trained, sets, rounds):
    config, prepare, ours, theirs, exact = CASES[name]
    ends = []
    double = [(x.double(), y) for x, y in sets]
    for call in (ours, theirs):
        process = begin(exact or config, prepare, copy.deepcopy(trained).double(), double)
        before = [p.detach().clone() for p in process.params]
        ends.append(moved(process, before, call(process)))
    error = ((ends[0] - ends[1]).norm() / ends[1].norm()).item()
    took = {"ours": [], "plain": []}
    for _ in range(rounds):
        for who, call in (("ours", ours), ("plain", theirs)):
            process = begin(config, prepare, trained, sets)
            start = time.perf_counter()
            call(process)
            took[who].append(time.perf_counter() - start)
    return {"error": error, **{who: statistics.median(t) for who, t in took.items()}}


def mlp(classes):
    wide = [layer for _ in range(2) for layer in (nn.Linear(1024, 1024), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 1024), nn.ReLU(), *wide, nn.Linear(1024, classes))


def trained_mlp(task):
    torch.manual_seed(0)
    model = mlp(task.num_classes)
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    x, y = task.train_set()
    for rows in torch.randperm(len(y))[: 128 * 60].split(128):
        adam.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        adam.step()
    return model.eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--model", choices=("small_cnn", "mlp"), default="small_cnn")
    parser.add_argument("--only", help="cases whose name holds this")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    task = ef.tasks.fashion_mnist(forget="Sneaker", full=False)
    sets = task.split()
    trained = trained_mlp(task) if options.model == "mlp" else demo.train_original(task, sets, quick=True)[0].eval()
    rows = {}
    print(f"{'one step, ' + options.model:36} {'ours ms':>9} {'plain ms':>9} {'times':>7} {'apart':>8}")
    for name in CASES:
        if options.only and options.only not in name:
            continue
        rows[name] = row = measure(
            name, trained, [(x[:PGU], y[:PGU]) for x, y in sets.train] if name.startswith("pgu") else sets.train, options.rounds
        )
        agree = row["error"] <= TOLERANCE
        row["ratio"] = row["plain"] / row["ours"] if agree else None
        print(f"{name:36} {row['ours'] * 1e3:9.1f} {row['plain'] * 1e3:9.1f} "
              f"{format(row['ratio'], '.2f') if agree else 'differs':>7} {row['error']:8.1e}", flush=True)  # fmt: skip
        if options.out:  # row by row: the whole takes long
            save_json(options.out, {"model": options.model, "rounds": options.rounds, "steps": rows, **machine_info()})
    return 0 if all(r["ratio"] for r in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
