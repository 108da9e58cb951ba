"""Calls that launch every kernel in the shapes that choose its main specialisation: they are compiled, and what is compiled is run."""

import torch
from entangle_fast.kernels import (
    combine,
    gram,
    project,
    project_random,
    sample_loss,
    sqnorm,
    step,
    step_adamw,
    step_lookahead,
    step_project,
    w2,
)  # fmt: skip

from entangle_fast import reference

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
SHAPE = ([3, 3], [1, 1], [1, 1], [1, 1], 1)
SEED = 2**40


def _factors(n, t, d_in, d_out, dtype):
    return torch.randn(n, t, d_in).to(dtype), torch.randn(n, t, d_out).to(dtype)


def matrices(dtype):
    rows, few, many = _factors(128, 1, 64, 64, dtype), _factors(32, 16, 64, 64, dtype), _factors(16, 64, 64, 64, dtype)
    odd, other, wide = _factors(37, 16, 51, 43, dtype), _factors(29, 5, 51, 43, dtype), _factors(96, 64, 64, 64, dtype)
    x, g = torch.randn(16, 64, 8, 8).to(dtype), torch.randn(16, 64, 8, 8).to(dtype)
    w, layers, odd_layers = torch.randn(2, 16), [[f[:, 0]] * 2 for f in few], [[f[:, 0]] * 2 for f in odd]
    for args in (rows, (*rows, *rows)):
        yield gram, "gram", *args, *[None] * (4 - len(args)), "rows"
    for args in ((*layers, [], []), (*layers, *layers), (*odd_layers, [], [])):
        yield gram, "gram_layers", *args
    for args in (few, (*odd, *other), odd):
        yield gram, "gram", *args, *[None] * (4 - len(args)), "pairs"
    for args in (odd, wide, many, (*many, *many)):
        yield gram, "gram", *args, *[None] * (4 - len(args)), "tiles"
    for route in ("tiles", "pairs"):
        yield gram, "gram_conv", x, g, *SHAPE, None, None, route
    for args in (few, many, rows):
        yield sqnorm, "sqnorm", *args
    yield sqnorm, "sqnorm_conv", x, g, *SHAPE
    yield combine, "combine", *many, w
    yield combine, "combine_conv", x, g, w, *SHAPE
    yield project, "project", *many, torch.randn(1, 64, 64).to(dtype)
    yield project, "project", *many, torch.randn(16, 64, 64)
    for kind, k in (("sign", 16), ("sign", 64), ("sign", 200), ("gaussian", 16)):
        yield project_random, "project_random", *many, k, SEED, 0, kind
        yield project_random, "project_random_conv", x, g, min(k, 72), *SHAPE, SEED, 0, kind  # the reference is slow
        yield project_random, "project_random", *wide, k, SEED, 0, kind


def lookups(dtype):
    ids, b = torch.randint(0, 128, (16, 64)), torch.randn(16, 64, 64).to(dtype)
    yield gram, "gram_embedding", ids, b, None, None, -1
    yield sqnorm, "sqnorm_embedding", ids, b
    yield combine, "combine_embedding", ids, b, torch.randn(2, 16), 128
    yield project, "project_embedding", ids, b, torch.randn(2, 128, 64).to(dtype)
    for kind, k in (("sign", 16), ("sign", 200), ("gaussian", 16)):
        yield project_random, "project_random_embedding", ids, b, k, 128, SEED, 0, kind


def losses(dtype):
    logits, target = torch.randn(4, 32, 4096).to(dtype), torch.randint(0, 4096, (4, 32))
    yield sample_loss, "sample_loss", logits, target, 1.0
    loss, ce, lse = reference.sample_loss(logits, target, 1.0)
    yield sample_loss, "sample_loss_backward", torch.randn(4, dtype=loss.dtype), logits, target, ce, lse, 1.0


def distances(dtype):
    x, y = torch.randn(4096).to(dtype), torch.randn(4096).to(dtype)
    yield w2, "w2_sorted", x, y
    yield w2, "w2_moments", x, y


def steps(dtype):
    """Every call has tensors of its own: most are written to."""

    def some(of=dtype):
        return [torch.randn(4096).to(of), torch.randn(64, 64).to(of)]

    def many(k):
        return [x for _ in range(k) for x in some()]

    wide, count = torch.promote_types(dtype, torch.float32), torch.ones((), dtype=torch.int64)
    for k in (2, 4):
        yield step, "step_gram", many(k), k
    for k, ridge in ((2, 0.0), (8, 1e-8), (32, 0.0)):
        yield step_project, "step_project", many(k), some(), some(), 0.9, ridge, 1e-15
    for noise, counter in ((0.0, None), (0.1, None), (0.1, count)):
        yield step, "step_update", some(), some(wide), some(), many(2), torch.randn(2), 0.1, 0.9, 0.01, noise, 0, 0, counter
        held = some(wide), [x.abs() for x in some(wide)]
        options = (0.1, 0.9, 0.999, 1e-8, 0.01, noise, 0, 0, counter)
        yield step_adamw, "step_adamw", some(), *held, some(), many(2), torch.randn(2), torch.tensor(3), *options
    for capacity in (None, 4096):
        ahead = some(), some(), 0.1
        yield step_lookahead, "step_lookahead", *ahead, capacity
        params = [x.clone() for x in ahead[0]]
        left = reference.step_lookahead(params, ahead[1], 0.1, capacity)
        yield step_lookahead, "step_lookahead_undo", params, ahead[1], *left, 0.1
    ulps = [torch.zeros_like(x, dtype=torch.int8) for x in ahead[0]]
    kept = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    yield step_lookahead, "step_lookahead_undo", some(), some(), ulps, *kept, 0.1


KINDS = {f.__name__: f for f in (matrices, lookups, losses, distances, steps)}
NAMES = [
    f"{kind}-{dtype}" for kind in KINDS for dtype in DTYPES
    if dtype != "fp64" or kind not in ("matrices", "lookups")  # refused: no tensor-core path
]  # fmt: skip


def calls(name: str):
    """(module, operation, *arguments) of each call of a workload in NAMES."""
    kind, dtype = name.split("-")
    torch.manual_seed(0)
    return KINDS[kind](DTYPES[dtype])


def run(calls) -> None:
    for module, op, *args in calls:
        getattr(module, op)(*args)
