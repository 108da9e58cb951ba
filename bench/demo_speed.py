"""Entangled unlearning end to end against the same algorithm in plain autograd (authors.py): the same model, samples,
batch sizes and numbers of steps, in turns. The authors' form measures nothing on the way: its like is our steps alone; the whole
call adds accuracies, losses and the two propositions.

    python bench/demo_speed.py [--rounds 3] [--batch-limit 2] [--out bench/results/<machine>/demo_speed.json]
"""

import argparse
import copy
import statistics
import time
from pathlib import Path

import authors
import torch

import entangle_fast as ef
from entangle_fast import demo
from entangle_fast.machine import machine_info
from entangle_fast.storage import save_json


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-limit", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    task = ef.tasks.fashion_mnist(forget="Sneaker", full=False)
    sets = task.split()
    trained, _ = demo.train_original(task, sets, quick=True)
    as_made = copy.deepcopy(trained).to(memory_format=torch.contiguous_format)  # as the model's own code makes it
    config = ef.Entangled(epochs2=1.0, batch_limit=options.batch_limit, max_norm2=3.0)

    def ours():
        result = ef.unlearn(copy.deepcopy(trained), **sets.train._asdict(), test=sets, method=config, progress=False)
        took["ours, steps alone"].append(result.seconds)

    runs = {
        "ours": ours,
        "authors": lambda: authors.unlearn(copy.deepcopy(as_made), sets.train, config),
        "authors, channels_last": lambda: authors.unlearn(copy.deepcopy(trained), sets.train, config),
    }
    took = {name: [] for name in ("ours, steps alone", *runs)}
    for _ in range(options.rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            took[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(t) for name, t in took.items()}
    for name, t in medians.items():
        print(f"{name:24} {t:7.2f} s  {t / medians['ours, steps alone']:.2f} x our steps")
    if options.out:
        save_json(options.out, {"seconds": took, "batch_limit": options.batch_limit, "epochs2": 1.0, **machine_info()})


if __name__ == "__main__":
    main()
