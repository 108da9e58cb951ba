"""Every operation once on small awkward shapes: what compute-sanitizer watches. python small_calls.py triton|cuda

A CUDA C++ kernel that does not exist, or refuses the call, is left out; a Triton one has to be there.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":  # before entangle_fast is imported
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import entangle_fast as ef
from entangle_fast import dispatch


def calls(device: str) -> dict:
    """Name → call."""

    def r(*shape, dtype=torch.float32):
        return torch.randn(shape, device=device).to(dtype)

    a, b = r(33, 5, 40), r(33, 5, 24)
    low, low_b = r(33, 70, 40, dtype=torch.bfloat16), r(33, 70, 24, dtype=torch.bfloat16)
    x, y = r(3, 4, 9, 9), r(3, 6, 5, 5)
    ids = torch.randint(0, 9, (33, 5), device=device)
    conv = dict(stride=2, padding=1)
    p = [r(129), r(64, 3)]
    target, long_target = (torch.zeros(5, dtype=torch.int64, device=device) for _ in range(2))
    logits, wide = r(5, 151).requires_grad_(), r(5, 2049).requires_grad_()

    def loss(z, t):
        return lambda: torch.autograd.grad(ef.ops.sample_loss(z, t).sum(), z)

    def undone(capacity=None):
        g = [q.clone() for q in p]
        ef.ops.step_lookahead_undo(p, g, ef.ops.step_lookahead(p, g, 0.1, capacity), 0.1)

    return {
        "rows": lambda: ef.ops.gram(a[:, 0], b[:, 0], route="rows"),
        "rows of five layers": lambda: ef.ops.gram_layers([(a[:, t], b[:, t]) for t in range(5)]),
        "pairs": lambda: ef.ops.gram(a, b, route="pairs"),
        "tiles": lambda: ef.ops.gram(a, b, route="tiles"),
        "tiles bf16": lambda: ef.ops.gram(low, low_b, route="tiles"),
        "cross": lambda: ef.ops.gram(low, low_b, low[:7], low_b[:7], route="tiles"),
        "conv pairs": lambda: ef.ops.gram_conv(x, y, 3, route="pairs", **conv),
        "conv tiles": lambda: ef.ops.gram_conv(x, y, 3, route="tiles", **conv),
        "embedding": lambda: ef.ops.gram_embedding(ids, b),
        "sqnorm": lambda: ef.ops.sqnorm(a, b),
        "combine": lambda: ef.ops.combine(a, b, r(2, 33)),
        "project": lambda: ef.ops.project(a, b, r(3, 24, 40)),
        "project_random": lambda: ef.ops.project_random(a, b, 3, seed=1),
        "project_random of many": lambda: ef.ops.project_random(low, low_b, 200, seed=1),
        "project_random bf16": lambda: ef.ops.project_random(low, low_b, 9, seed=1, kind="gaussian"),
        "project_random of a convolution": lambda: ef.ops.project_random_conv(x, y, 3, 3, seed=1, **conv),
        "project_random of a table": lambda: ef.ops.project_random_embedding(ids, b, 3, 9, seed=1),
        "step_gram": lambda: ef.ops.step_gram([p, p]),
        "step_update": lambda: ef.ops.step_update(p, None, p, [p], torch.zeros(1, device=device), lr=0.1, noise=0.1),
        "lookahead": undone,
        "lookahead with a capacity": lambda: undone(7),
        "sample_loss": loss(logits, target),
        "sample_loss of long rows": loss(wide, long_target),
        "linear_sample_loss": lambda: ef.ops.linear_sample_loss(r(5, 24), r(151, 24), target),
        "w2_sorted": lambda: ef.ops.w2_sorted(r(300), r(77)),
        "w2_moments": lambda: ef.ops.w2_moments(r(300), r(77)),
    }


def main(backend: str, device: str = "cuda") -> list[str]:
    """Names of the calls that ran."""
    os.environ[dispatch.ENV] = backend
    ran = []
    try:
        for name, call in calls(device).items():
            try:
                call()
            except ef.BackendError:
                if backend != "cuda":
                    raise
                continue
            if device == "cuda":
                torch.cuda.synchronize()  # so that what fails is named here
            ran.append(name)
            print("ran", name, flush=True)
    finally:
        del os.environ[dispatch.ENV]
    return ran


if __name__ == "__main__":
    sys.exit(0 if main(sys.argv[1]) else 1)
