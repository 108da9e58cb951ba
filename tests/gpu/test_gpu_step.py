"""step on the GPU: the projection's solve, AdamW, and whole steps captured into a CUDA graph; each backend alone."""

import pytest
import torch

from entangle_fast import ops, reference
from entangle_fast.optim import ProjectedAdamW, ProjectedMomentum, decay_noise_step

pytest.importorskip("triton")

SHAPES = [(5, 7), (129,), (4099,), (1,), (0,), (512, 512)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def tensors(dtype=torch.float32):
    return [torch.randn(s, device="cuda").to(dtype) for s in SHAPES]


def cpu(xs):
    return [x.cpu() for x in xs]


@pytest.mark.parametrize("case, k", [*(("", k) for k in (1, 2, 3, 8, 16, 32)), ("singular", 6), ("short", 4), ("ridge", 5)])
@pytest.mark.parametrize("held", [True, False])
def test_project(backend, served, held, case, k):
    lists = [tensors() for _ in range(k + 1 + held)]
    if case == "singular":
        lists[1], lists[3], lists[5] = [x.clone() for x in lists[0]], [x * 0 for x in lists[3]], [-2 * x for x in lists[2]]
    if case == "short":
        lists[1] = [x * 1e-5 for x in lists[1]]
    args = lists[:k], lists[k] if held else None, lists[-1]
    options = {"beta": 0.9, "ridge": 2e4 if case == "ridge" else 0.0}
    gram, coef = ops.step_project(*args, **options)
    again = ops.step_project(*args, **options)
    assert torch.equal(gram, again[0]) and torch.equal(coef, again[1])
    flat = [x.cpu() for xs in lists for x in xs]
    p = len(SHAPES)
    wanted, solved = reference.step_project(flat[: k * p], flat[k * p : -p], flat[-p:], 0.9, options["ridge"], k * 2.3e-16)
    torch.testing.assert_close(gram.cpu(), wanted, rtol=1e-12, atol=1e-8)
    scale = wanted.diagonal()[:k].sqrt()
    torch.testing.assert_close(coef.cpu() * scale, solved * scale, rtol=1e-9, atol=1e-9)
    with served(backend) as remember:
        remember("step_project")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k, noise", [(0, 0.0), (2, 0.1), (5, 0.1)])
def test_adamw(backend, served, k, noise, dtype):
    wide = torch.promote_types(dtype, torch.float32)
    params, grads, m, u = tensors(dtype), tensors(dtype), tensors(wide), [0.1 + x.square() for x in tensors(wide)]
    directions, coef, count = [tensors(dtype) for _ in range(k)], torch.randn(k, device="cuda"), torch.tensor(3, device="cuda")
    mine = [cpu(xs) for xs in (params, m, u)]
    options = {"lr": 0.1, "weight_decay": 0.01, "noise": noise, "seed": 7, "offset": 3}
    ops.step_adamw(params, m, u, grads, directions, coef, count, counter=count, **options)
    flat = [x.cpu() for d in directions for x in d]
    reference.step_adamw(*mine, cpu(grads), flat, coef.cpu(), count.cpu(), counter=count.cpu(), **options)
    for x, y in zip(params + m + u, sum(mine, [])):
        eps = max(torch.finfo(x.dtype).eps, 1.2e-7 if noise or x.dtype != torch.float64 else 0)
        torch.testing.assert_close(x.cpu(), y, rtol=8 * eps, atol=8 * eps)
    with served(backend) as remember:
        remember("step_adamw")


def momentum(params):
    sgd = ProjectedMomentum(params, lr=0.1)
    count = torch.zeros((), dtype=torch.int64, device="cuda")

    def step(g, directions):
        sgd.step(g, directions)
        count.add_(1)
        decay_noise_step(params, g, lr=0.01, noise=0.1, seed=3, counter=count)

    return step, [*sgd.buffers, count]


def adamw(params):
    adam = ProjectedAdamW(params, lr=0.1, noise=0.1)
    return adam.step, list(adam.state().values())


@pytest.mark.parametrize("k", [2, 5])
@pytest.mark.parametrize("method", [momentum, adamw])
def test_a_captured_step_goes_on_as_an_eager_one(backend, method, k):
    g, directions = tensors(), [tensors() for _ in range(k)]
    start, ends = tensors(), []
    for captured in (False, True):
        params = [p.clone() for p in start]
        step, held = method(params)
        step(g, directions)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step(g, directions)
        for _ in range(3):
            graph.replay() if captured else step(g, directions)
        ends.append([*params, *held])
    assert all(torch.equal(x, y) for x, y in zip(*ends))
    assert all(torch.isfinite(x).all() for x in ends[0])
