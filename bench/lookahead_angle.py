"""LUR's angle: are the forget and the retain gradients wider apart with the look-ahead than without, at equal retain loss?

    python bench/lookahead_angle.py [--seeds 3] [--models FOLDER] [--out bench/results/<device>/lookahead_angle.json]

The angle is that between ∇CE_f and ∇CE_r, mean gradients over the whole forget and the whole retain (adjacent and remote)
training set, true labels, no augmentation, eval mode, all parameters at once (metrics.angle.gradient_angle). A run is
Lookahead with its defaults but for α and the order; α = 0 is the method switched off, plain joint descent.

Equal retain loss: retain loss falls as the angle changes, so that angles at equal steps do not compare. Of the run's
checkpoints at which the class is forgotten (test accuracy at most FORGOTTEN %) those whose retain loss the plain run of the
same seed passes through, too, are set against the plain run's angle there, linear in log retain loss between its checkpoints.
"""

import argparse
import math
import statistics
import sys
from pathlib import Path

import numpy as np
from originals import original

import entangle_fast as ef
from entangle_fast import demo
from entangle_fast.machine import machine_info
from entangle_fast.methods.data import Data
from entangle_fast.methods.process import sample_cross_entropy
from entangle_fast.metrics import accuracy, evaluate, sample_losses
from entangle_fast.metrics.angle import gradient_angle
from entangle_fast.storage import save_json

FORGOTTEN = 20.0
RUNS = ((0.0, 1), (0.01, 1), (0.01, 2), (0.1, 1))  # (α, order)


def follow(model, sets, config, seed, every):
    """One run: its checkpoints, its accuracies at the end, the mean angle of its batches in the second half."""
    data = Data.of(*sets.train, device="cpu", seed=seed, augment=demo.AUGMENT)
    process = config.start(model, data, sample_cross_entropy, seed)
    points, cosines = [], []
    while process.done < process.total:
        cosines.append(float(process.step()["cosine"]))
        if process.done % every and process.done < process.total:
            continue
        points.append({
            "step": process.done, "retain_loss": sample_losses(model, sets.retain).double().mean().item(),
            "forget_loss": sample_losses(model, sets.forget).double().mean().item(),
            "forget": accuracy(model, sets.test.forget), "angle": gradient_angle(model, sets.forget, sets.retain),
        })  # fmt: skip
    late = [math.degrees(math.acos(max(-1.0, min(1.0, c)))) for c in cosines[len(cosines) // 2 :]]
    after = {k: v for k, v in evaluate(model, sets).items() if k != "per_class"}
    return {"after": after, "batch_angle": statistics.fmean(late), "points": points}


def widening(run, plain):
    """Angles of a run minus the plain run's at the same retain loss, in degrees: one for each checkpoint that compares."""
    known = sorted((p["retain_loss"], p["angle"]) for p in plain["points"] if p["forget"] <= FORGOTTEN)
    if not known:
        return []
    x, y = np.log([k[0] for k in known]), [k[1] for k in known]
    kept = [p for p in run["points"] if p["forget"] <= FORGOTTEN and x[0] <= math.log(p["retain_loss"]) <= x[-1]]
    return [p["angle"] - float(np.interp(math.log(p["retain_loss"]), x, y)) for p in kept]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forget", default="Sneaker")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--every", type=int, default=30, help="steps between checkpoints")
    parser.add_argument("--models", type=Path, help="a comparison's folder of trained models")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    task = ef.tasks.fashion_mnist(forget=options.forget, full=False)
    sets = task.split()
    rows = []
    for seed in range(options.seeds):
        plain = None
        for alpha, order in RUNS:
            model = original(task, sets, seed, options.models)
            run = follow(model, sets, ef.Lookahead(alpha=alpha, order=order), seed, options.every)
            plain = run if alpha == 0 else plain
            rows.append({"seed": seed, "alpha": alpha, "order": order, **run, "widening": widening(run, plain) if alpha else []})
            print(f"seed {seed}, alpha {alpha}, order {order}: {run['after']}", file=sys.stderr, flush=True)
    print(" alpha order   forget adjacent remote   retain loss   angle at end   of batches   wider at equal retain loss")
    for alpha, order in RUNS:
        mine = [r for r in rows if (r["alpha"], r["order"]) == (alpha, order)]
        mean = {k: statistics.fmean(r["after"][k] for r in mine) for k in ("forget", "adjacent", "remote")}
        last = {k: statistics.fmean(r["points"][-1][k] for r in mine) for k in ("retain_loss", "angle")}
        gaps = [statistics.fmean(r["widening"]) for r in mine if r["widening"]]
        shown = ", ".join(f"{g:+.1f}°" for g in gaps) + f" by seed, {sum(len(r['widening']) for r in mine)} checkpoints"
        print(f"{alpha:6} {order:5} {mean['forget']:8.1f} {mean['adjacent']:8.1f} {mean['remote']:6.1f} {last['retain_loss']:13.4f} "
              f"{last['angle']:13.1f}° {statistics.fmean(r['batch_angle'] for r in mine):11.1f}°   {shown if alpha else ''}")  # fmt: skip
    if options.out:
        save_json(options.out, {"forget": options.forget, "every": options.every, "forgotten": FORGOTTEN,
                                "config": ef.Lookahead(), "runs": rows, **machine_info()})  # fmt: skip


if __name__ == "__main__":
    main()
