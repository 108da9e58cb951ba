"""The hard case: forget Shirt among the tops. Adjacent against forget accuracy as α and the length of stage 2 vary, next
to the best that any classifier of this size could do: the ROC of one trained to tell Shirt from the other tops.

    python bench/frontier.py [--forget Shirt] [--out bench/results/frontier_shirt.json]
"""

import argparse
import copy
import json
import sys
from pathlib import Path

import torch

import entangle_fast as ef
from entangle_fast import demo
from entangle_fast.machine import machine_info
from entangle_fast.methods.training import fit
from entangle_fast.storage import save_json


def classifier_roc(sets, forget_levels):
    """Adjacent accuracy of a binary classifier (forget class or not) at thresholds of given forget accuracy, in %."""
    def pair(triple):
        x = torch.cat([triple.forget[0], triple.adjacent[0]])
        return x, torch.cat([torch.zeros(len(triple.forget[0])), torch.ones(len(triple.adjacent[0]))]).long()

    torch.manual_seed(0)
    model = ef.tasks.SmallCNN(2)
    fit(model, *pair(sets.train), epochs=demo.EPOCHS, lr=demo.PEAK_LR, batch_size=demo.BATCH, seed=0, augment=demo.AUGMENT)
    x, y = pair(sets.test)
    with torch.no_grad():
        score = model.eval()(x).diff(dim=1)[:, 0]
    return {level: 100 * (score[y == 1] > score[y == 0].quantile(1 - level / 100)).double().mean().item() for level in forget_levels}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--forget", default="Shirt")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    task = ef.tasks.fashion_mnist(forget=options.forget, full=False)
    sets = task.split()
    original, before = demo.train_original(task, sets)
    rows = []
    for away_from, alpha, epochs in (
        ("forget_samples", 0.5, 1.5), ("forget_samples", 0.5, 3.0), ("forget_samples", 0.5, 6.0),
        ("means", 0.0, 3.0), ("means", 0.5, 3.0), ("means", 0.9, 3.0),
    ):  # fmt: skip
        model = copy.deepcopy(original)
        chosen = {**demo.ENTANGLED, "away_from": away_from, "alpha": alpha, "epochs2": epochs}
        if away_from == "means":
            chosen["max_norm2"] = 3.0  # one mean direction stands less than many samples' do
        result = ef.unlearn(model, **sets.train._asdict(), test=sets, method=ef.Entangled(**chosen), augment=demo.AUGMENT,
                            progress=False)  # fmt: skip
        rows.append({"away_from": away_from, "alpha": alpha, "epochs2": epochs, "seconds": result.seconds,
                     **{k: result.after[k] for k in ("forget", "adjacent", "remote")}})  # fmt: skip
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    found = {"forget": options.forget, "original": {k: before[k] for k in ("forget", "adjacent", "remote")}, "runs": rows,
             "best_classifier": classifier_roc(sets, (5, 10, 20, 30, 40)), **machine_info()}  # fmt: skip
    print(json.dumps(found["best_classifier"]))
    if options.out:
        save_json(options.out, found)


if __name__ == "__main__":
    main()
