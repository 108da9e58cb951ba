"""What W2 holds: the entangled method's second stage with the paper's span of two means, W2 on (α 0.5) and off (α 0).

    python bench/w2_off.py [--seeds 3] [--models runs/compare-sneaker/models] [--out bench/results/<machine>/w2_off.json]

models: a comparison's folder of trained models, original-SEED.safetensors; without it they are trained here.
"""

import argparse
import copy
import statistics
from dataclasses import asdict
from pathlib import Path

from originals import original

import entangle_fast as ef
from entangle_fast import demo
from entangle_fast.machine import machine_info
from entangle_fast.storage import save_json

SETS = ("forget", "adjacent", "remote")
BOUNDED = dict(lr1=1e-4, clip=5.0, epochs2=4.5, lr2=4e-3, max_norm2=3.0)
FREE = {**BOUNDED, "lr2": 1e-3, "max_norm2": float("inf")}
RUNS = {
    "bounded, W2 on": ef.Entangled(**BOUNDED, alpha=0.5), "bounded, W2 off": ef.Entangled(**BOUNDED, alpha=0.0),
    "unbounded, W2 on": ef.Entangled(**FREE, alpha=0.5), "unbounded, W2 off": ef.Entangled(**FREE, alpha=0.0),
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    task = ef.tasks.fashion_mnist(forget="Sneaker", full=False)
    sets = task.split()
    rows = {name: [] for name in RUNS}
    for seed in range(options.seeds):
        start = original(task, sets, seed, options.models)
        for name, method in RUNS.items():
            result = ef.unlearn(copy.deepcopy(start), **sets.train._asdict(), test=sets, method=method, seed=seed,
                                augment=demo.AUGMENT, progress=False)  # fmt: skip
            rows[name].append({key: result.row()[key] for key in (*SETS, "seconds")})
            print(f"seed {seed}, {name}: " + " / ".join(f"{rows[name][-1][key]:.1f}" for key in SETS), flush=True)
    for name, found in rows.items():
        print(f"{name:18}" + " / ".join(f"{statistics.fmean(r[k] for r in found):.1f} ± {statistics.stdev(r[k] for r in found):.1f}"
                                        if len(found) > 1 else f"{found[0][k]:.1f}" for k in SETS))  # fmt: skip
    if options.out:
        save_json(options.out, {"runs": rows, "methods": {n: asdict(m) for n, m in RUNS.items()}, **machine_info()})


if __name__ == "__main__":
    main()
