"""Compile ahead of the first step: every kernel once for each dtype, on shapes that choose the usual specialisations.

Triton compiles at a kernel's first launch and keeps the result on disk; this pays that second early, and outside of a
CUDA graph capture, where neither a compilation nor a first pointer table belongs.
"""

import torch

from . import combine, gram, project, project_random, sample_loss, sqnorm, step, step_adamw, step_lookahead, step_project, tiles, tune, w2
from .launch import precision


def _factors(n: int, t: int, d: int, dtype: torch.dtype, device) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(n, t, d, dtype=dtype, device=device), torch.zeros(n, t, d, dtype=dtype, device=device)


def _contractions(dtype: torch.dtype, device) -> None:
    rows, few, many = (_factors(n, t, 64, dtype, device) for n, t in ((128, 1), (32, 16), (32, 64)))
    x, g = (torch.zeros(16, 32, 16, 16, dtype=dtype, device=device) for _ in range(2))
    w = torch.zeros(2, 32, device=device)
    shape = ([3, 3], [1, 1], [1, 1], [1, 1], 1)
    for route, factors in (("rows", rows), ("pairs", few), ("tiles", many)):
        gram.gram(*factors, route=route)
        gram.gram(*factors, *factors, route=route)
        sqnorm.sqnorm(*factors)
    gram.gram(*_factors(96, 64, 64, dtype, device), route="tiles")
    gram.gram_layers(*([f[:, 0]] * 2 for f in few), [], [])  # a split of the layers
    for route in ("pairs", "tiles"):
        gram.gram_conv(x, g, *shape, route=route)
    sqnorm.sqnorm_conv(x, g, *shape)
    combine.combine(*many, w)
    combine.combine_conv(x, g, w[:, :16], *shape)
    for k in (1, 16):
        project.project(*many, torch.zeros(k, 64, 64, dtype=dtype, device=device))
    for kind, k in (("sign", 16), ("sign", 64), ("sign", 128), ("gaussian", 16)):
        project_random.project_random(*many, k, seed=0, kind=kind)
        project_random.project_random_conv(x, g, k, *shape, seed=0, kind=kind)
    ids = torch.zeros(32, 64, dtype=torch.int64, device=device)
    gram.gram_embedding(ids, many[1])
    sqnorm.sqnorm_embedding(ids, many[1])
    combine.combine_embedding(ids, many[1], w, 128)
    project.project_embedding(ids, many[1], torch.zeros(2, 128, 64, dtype=dtype, device=device))
    project_random.project_random_embedding(ids, many[1], 2, 128, seed=0)


def _losses(dtype: torch.dtype, device) -> None:
    for shape in ((32, 1024), (16, 32, 4096)):
        logits = torch.zeros(shape, dtype=dtype, device=device)
        target = torch.zeros(shape[:-1], dtype=torch.int64, device=device)
        loss, ce, lse = sample_loss.sample_loss(logits, target, 1.0)
        sample_loss.sample_loss_backward(loss, logits, target, ce, lse, 1.0)
    w2.w2_sorted(loss, loss)
    w2.w2_moments(loss, loss)


def _steps(dtype: torch.dtype, device) -> None:
    params = [torch.zeros(4096, dtype=dtype, device=device)]
    momentum = [torch.zeros(4096, dtype=torch.promote_types(dtype, torch.float32), device=device)]
    count = torch.ones((), dtype=torch.int64, device=device)
    for k in (1, 2):
        step.step_gram(params * k, k)
        for held in ([], params):
            _, coef = step_project.step_project(params * k, held, params, 0.9, 0.0, 1e-15)
        for noise in (0.0, 0.1):
            step.step_update(params, momentum, params, params * k, coef, 0.1, 0.9, 0.0, noise)
            step_adamw.step_adamw(params, momentum, momentum, params, params * k, coef, count, 0.1, noise=noise, counter=count)
    for capacity in (None, 16):
        ahead = step_lookahead.step_lookahead(params, params, 0.1, capacity)
        step_lookahead.step_lookahead_undo(params, params, *ahead, 0.1)


def warmup(device: str | torch.device = "cuda", dtypes=(torch.bfloat16, torch.float32), sweep: bool = False) -> None:
    """Launch every kernel once on ``device`` for each of ``dtypes``.

    sweep: also time the few configurations of the matrix kernels there and keep the fastest in a file
    (kernels/tune.py); from then on results are those of that configuration, in this process and in later ones.
    """
    device = torch.device(device)
    for dtype in dtypes:
        _contractions(dtype, device)
        _losses(dtype, device)
        _steps(dtype, device)
        if sweep:
            _sweep(dtype, device)


def _sweep(dtype: torch.dtype, device) -> None:
    size, key = dtype.itemsize, str(dtype)
    rows, few, many = (_factors(n, t, 768, dtype, device) for n, t in ((1024, 1), (256, 16), (128, 196)))
    w = torch.zeros(2, 128, device=device)
    tune.sweep("rows", gram.ROWS[size], key, lambda: gram.gram(*rows, route="rows"))
    tune.sweep("pairs", gram.PAIRS[size], key, lambda: gram.gram(*few, route="pairs"))
    tune.sweep("form", tiles.FORM[size], key, lambda: gram.gram(*many, route="tiles"))
    scratch = tiles.scratch_dtype(dtype)
    x, partial = torch.zeros(128, 65536, dtype=scratch, device=device), torch.zeros(8, 128, 128, device=device)
    tune.sweep(
        "accumulate", tiles.ACCUMULATE[scratch.itemsize], str(scratch),
        lambda: tiles.accumulate(x, x, partial, 65536, True, True, precision(dtype)),
    )  # fmt: skip
    tune.sweep("combine", combine.COMBINE[size], key, lambda: combine.combine(*many, w))
    basis = torch.zeros(1, 768, 768, dtype=dtype, device=device)
    tune.sweep("project_rows", project.ROWS[size], key, lambda: project.project(*many, basis))
