"""IEU's relearning delay beside those of fine-tuning and of gradient ascent at equal remote accuracy (±1).

    python bench/relearning_delay.py [--labels fine] [--seeds 3] [--models FOLDER] [--out bench/results/<machine>/relearning_delay.json]

Influence and FineTune run with their defaults (FineTune for 2 epochs, as in the demo). Ascent is searched over ASCENTS; of
the runs whose remote test accuracy is within 1 of Influence's the two with the largest forget loss are attacked, and the one
that takes longer to relearn is the row: the best that ascent can do there. A seed without such a run says so.
The delay: steps of SGD, and of Adam, on the forget samples until the forget loss is the original's, within 0.05 nats, as a
median over attacks; attacks of one seed take the same batches on every model.

models: a comparison's folder of trained models, original-SEED.safetensors; without it they are trained here.
"""

import argparse
import copy
import itertools
import statistics
from pathlib import Path

from originals import original

import entangle_fast as ef
from entangle_fast import demo
from entangle_fast.machine import machine_info
from entangle_fast.metrics import relearn, sample_losses
from entangle_fast.storage import save_json

ASCENTS = list(itertools.product((1e-3, 2e-3, 5e-3), (0.06, 0.2, 0.4, 0.6, 0.8)))  # (lr, stop_at)
ATTACKERS = ("sgd", "adam")


def unlearned(start, sets, method, seed):
    model = copy.deepcopy(start)
    result = ef.unlearn(model, **sets.train._asdict(), test=sets, method=method, seed=seed, augment=demo.AUGMENT, progress=False)
    return model, {k: result.row()[k] for k in ("forget", "adjacent", "remote")}


def delays(model, start, sets, options):
    """{attacker: median delay}; inf: not within the steps."""
    return {a: relearn(model, start, sets.train.forget, attacker=a, steps=options.steps, seeds=options.attack_seeds,
                       progress=False).median for a in ATTACKERS}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forget", default="Sneaker")
    parser.add_argument("--labels", default="fine")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--attack-seeds", type=int, default=2)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    task = demo.fashion_mnist(forget=options.forget, labels=options.labels, full=False)
    sets = task.split()
    rows = []
    for seed in range(options.seeds):
        start = original(task, sets, seed, options.models)
        found = {}
        for name, method in (("influence", ef.Influence()), ("finetune", ef.FineTune(epochs=2))):
            model, row = unlearned(start, sets, method, seed)
            found[name] = row | delays(model, start, sets, options)
        near = []
        for lr, stop_at in ASCENTS:
            model, row = unlearned(start, sets, ef.GradientAscent(lr=lr, stop_at=stop_at), seed)
            if abs(row["remote"] - found["influence"]["remote"]) <= 1:
                near.append((sample_losses(model, sets.train.forget).mean().item(), model, row | {"lr": lr, "stop_at": stop_at}))
        near.sort(key=lambda n: -n[0])
        attacked = [row | delays(model, start, sets, options) for _, model, row in near[:2]]
        if attacked:
            found["gradient_ascent"] = max(attacked, key=lambda row: row["sgd"])
        for name, row in found.items():
            shown = " ".join(f"{k} {v:.6g}" for k, v in row.items())
            times = "" if name == "influence" else "".join(f"  {a} {found['influence'][a] / max(row[a], 1):.2f}x" for a in ATTACKERS)
            print(f"seed {seed} {name:16} {shown}{times}", flush=True)
        if not attacked:
            print(f"seed {seed} gradient_ascent: no run within 1 of remote {found['influence']['remote']:.1f}", flush=True)
        rows.append(found)
    for name in ("finetune", "gradient_ascent"):
        ratios = [r["influence"]["sgd"] / max(r[name]["sgd"], 1) for r in rows if name in r]
        if ratios:
            print(f"influence over {name}, SGD attacker: median {statistics.median(ratios):.2f} of {len(ratios)} seeds")
    if options.out:
        save_json(options.out, {"forget": options.forget, "labels": options.labels, "steps": options.steps,
                                "attack_seeds": options.attack_seeds, "seeds": rows, **machine_info()})  # fmt: skip


if __name__ == "__main__":
    main()
