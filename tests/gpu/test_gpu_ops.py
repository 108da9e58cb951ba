"""Every operation on the GPU, through dispatch, against the reference in float64: at most twice plain PyTorch's error."""

import math

import pytest
import torch
from plain import plain_precision

import entangle_fast as ef
from entangle_fast import dispatch, reference

pytest.importorskip("triton")

FACTORS = [(1, 1, 1, 2), (5, 1, 33, 151), (129, 1, 64, 64), (7, 3, 40, 24), (2, 151, 20, 129), (33, 64, 128, 64),
           (0, 3, 5, 4), (3, 0, 5, 4)]  # fmt: skip
LOW = [torch.float32, torch.bfloat16, torch.float16]


def moved(x, device=None, dtype=None):
    if isinstance(x, (list, tuple)) and any(isinstance(y, torch.Tensor) for y in x):
        return [moved(y, device, dtype) for y in x]
    if not isinstance(x, torch.Tensor):
        return x
    return x.to(device, dtype if x.is_floating_point() else None, copy=True)


def compare(what, got, again, plain, want, floor):
    for x, y, p, z in zip(*(v if isinstance(v, (list, tuple)) else [v] for v in (got, again, plain, want))):
        assert torch.equal(x.nan_to_num(), y.nan_to_num()), f"{what}: two runs differ"
        eps = max(floor, torch.finfo(x.dtype).eps)  # as in tests/kernels/rule.py: plain PyTorch may be exact by luck
        x, p = x.double().cpu(), p.double().cpu()
        finite = torch.isfinite(z)
        assert torch.equal(torch.isfinite(x), finite), f"{what}: NaN or infinity where the exact result has none"
        if not z.numel() or not torch.equal(torch.isfinite(p), finite):
            continue  # plain PyTorch overflows in this dtype
        z, x, p = z[finite], x[finite], p[finite]
        allowed = 2 * (p - z).abs().max() + 4 * eps * z.abs().max() if len(z) else 0
        assert not len(z) or (x - z).abs().max() <= allowed, f"{what}: {(x - z).abs().max():.2e} > {allowed:.2e}"


@pytest.fixture
def check(served):
    """check(op, *args): torch.ops.entangle_fast.<op> on every GPU backend that takes the call, Triton among them.

    eps: rounding of a coarser dtype that limits the result.
    """

    def run(op, *args, eps=0.0):
        gpu = moved(args, "cuda")
        with plain_precision():
            plain = getattr(reference, op)(*gpu)
        want = getattr(reference, op)(*moved(args, "cpu", torch.float64))
        floor = max([eps, *(torch.finfo(x.dtype).eps / 16 for x in args if isinstance(x, torch.Tensor) and x.is_floating_point())])
        for backend in ("triton", "cuda"):
            with served(backend) as remember:
                if (found := dispatch._choose(op, gpu)).backend is None:
                    assert backend == "cuda", str(found)
                    continue
                got, again = (getattr(torch.ops.entangle_fast, op)(*gpu) for _ in range(2))
                remember(op)
            compare(f"{op} on {backend}", got, again, plain, want, floor)

    return run


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", FACTORS)
def test_linear(check, shape, dtype):
    n, t, d_in, d_out = shape
    a, b = torch.randn(n, t, d_in).to(dtype), torch.randn(n, t, d_out).to(dtype)
    a2, b2 = torch.randn(3, t, d_in).to(dtype), torch.randn(3, t, d_out).to(dtype)
    for route in ("pairs", "tiles", *(["rows"] if t == 1 else [])):
        check("gram", a, b, None, None, route)
        check("gram", a, b, a2, b2, route)
    check("sqnorm", a, b)
    check("combine", a, b, torch.randn(2, n))
    for k in (1, 3):
        check("project", a, b, torch.randn(k, d_out, d_in).to(dtype))
    for kind, k in (("sign", 3), ("sign", 300), ("gaussian", 3)):
        check("project_random", a, b, k, -5, 2**40 + 3, kind, eps=1e-6)


@pytest.mark.parametrize("n", [128, 200])
def test_gram_in_chunks(check, n):
    """More tiles than the scratch of the CUDA form for sm_90a holds."""
    a, b = (torch.randn(n, 40, 768).bfloat16() for _ in range(2))
    check("gram", a, b, None, None, "tiles")
    check("gram", a, b, a[:9], b[:9], "tiles")


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("case", [
    ((5, 16, 9, 9), (5, 32, 5, 5), [3, 3], [2, 2], [1, 1], [1, 1], 1),
    ((3, 4, 9), (3, 6, 5), [3], [1], [0], [2], 2),
    ((2, 2, 3, 5, 4), (2, 2, 3, 5, 4), [1, 3, 3], [1, 1, 1], [0, 1, 1], [1, 1, 1], 1),
])  # fmt: skip
def test_convolutions(check, case, dtype):
    x, g, shape = torch.randn(case[0]).to(dtype), torch.randn(case[1]).to(dtype), case[2:]
    for route in ("pairs", "tiles"):
        check("gram_conv", x, g, *shape, None, None, route)
        check("gram_conv", x, g, *shape, x[:1], g[:1], route)
    check("sqnorm_conv", x, g, *shape)
    check("combine_conv", x, g, torch.randn(2, len(x)), *shape)
    check("project_conv", x, g, torch.randn(3, g.shape[1], x.shape[1] // shape[-1], *shape[0]).to(dtype), *shape[1:])
    for kind in ("sign", "gaussian"):
        check("project_random_conv", x, g, 3, *shape, -5, 2**40 + 3, kind, eps=1e-6)


@pytest.mark.parametrize("dtype", LOW)
def test_lookups(check, dtype):
    ids, b = torch.randint(0, 9, (5, 151)), torch.randn(5, 151, 40).to(dtype)
    for padding_idx in (-1, 2):
        check("gram_embedding", ids, b, None, None, padding_idx)
        check("sqnorm_embedding", ids, b, padding_idx)
        check("combine_embedding", ids, b, torch.randn(2, 5), 9, padding_idx)
        check("project_embedding", ids, b, torch.randn(3, 9, 40).to(dtype), padding_idx)
        for kind in ("sign", "gaussian"):
            check("project_random_embedding", ids, b, 3, 9, -5, 2**40 + 3, kind, padding_idx, eps=1e-6)


@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
@pytest.mark.parametrize("options", [(math.inf, 0.0, -100, 0.0, "mean"), (3.5, 0.3, -100, 0.1, "sum")])
@pytest.mark.parametrize("shape", [(129, 10), (4, 7, 2049), (1, 1), (2, 3, 50257)])
def test_losses(check, shape, options, dtype):
    x, target = (torch.randn(shape) * 3).to(dtype), torch.randint(0, shape[-1], shape[:-1])
    if len(shape) == 3:
        target[0, 0], target[-1] = -100, -100
    check("sample_loss", x, target, *options)
    _, ce, lse = reference.sample_loss(x, target, *options)
    check("sample_loss_backward", torch.randn(shape[0]).to(ce.dtype), x, target, ce, lse, *options)
    h, weight = torch.randn(*shape[:-1], 24).to(dtype), torch.randn(shape[-1], 24).to(dtype)
    check("linear_sample_loss", h, weight, None, target, *options, eps=torch.finfo(dtype).eps / 4)


@pytest.mark.parametrize("n, m", [(1, 1), (129, 129), (2, 151), (100000, 70001)])
def test_distances(check, n, m):
    x, y = torch.randn(n), torch.randn(m) + 1
    check("w2_sorted", x, y)
    check("w2_moments", x, y)
    if n < 1000:
        check("w2_features", torch.randn(n, 20), torch.randn(m, 20), eps=1e-6)


@pytest.mark.parametrize("dtype", LOW)
def test_rows_of_all_layers(served, dtype):
    """One launch, split over layers or not; the same bits every time."""
    for n, m in ((1, 1), (129, 151), (700, 40)):
        widths = [(33, 5), (64, 64), (1, 151), (256, 128)] * 3
        left, right = ([(torch.randn(k, d).to(dtype).cuda(), torch.randn(k, e).to(dtype).cuda()) for d, e in widths] for k in (n, m))
        for others in (None, right):
            calls = [(*p, *q) for p, q in zip(left, others or left)]
            with served("triton") as remember:
                got, again = (ef.ops.gram_layers(left, others) for _ in range(2))
                remember("gram_layers")
            with plain_precision():
                plain = sum(reference.gram(*c, route="rows").float() for c in calls)
            want = sum(reference.gram(*moved(c, "cpu", torch.float64), route="rows") for c in calls)
            compare("gram_layers", got, again, plain, want, torch.finfo(torch.float32).eps)
            assert others is not None or torch.equal(got, got.T)


@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
def test_step(backend, served, dtype):
    shapes = [(5, 7), (129,), (4099,), (1,), (0,), (512, 512)]

    def tensors(kind=dtype):
        return [torch.randn(s, device="cuda").to(kind) for s in shapes]

    directions = [x for _ in range(3) for x in tensors()]
    got = torch.ops.entangle_fast.step_gram(directions, 3)
    want = reference.step_gram([d.cpu() for d in directions], 3)
    torch.testing.assert_close(got.cpu(), want, rtol=1e-12, atol=1e-8)
    assert torch.equal(got, torch.ops.entangle_fast.step_gram(directions, 3))

    params, momentum, grads, coef = tensors(), tensors(torch.float32), tensors(), torch.randn(3, device="cuda")
    mine = [x.cpu() for x in params], [x.cpu() for x in momentum]
    options = (0.1, 0.9, 0.01, 0.5, 7, 3)
    torch.ops.entangle_fast.step_update(params, momentum, grads, directions, coef, *options)
    reference.step_update(*mine, [g.cpu() for g in grads], [d.cpu() for d in directions], coef.cpu(), *options)
    for x, y in zip(params + momentum, mine[0] + mine[1]):
        eps = max(torch.finfo(x.dtype).eps, 1.2e-7)
        torch.testing.assert_close(x.cpu(), y, rtol=4 * eps, atol=8 * eps)

    before = [p.clone() for p in params]
    residue = ef.ops.step_lookahead(params, grads, 0.1)
    ef.ops.step_lookahead_undo(params, grads, residue, 0.1)
    for x, y in zip(params, before):
        assert torch.equal(x.reshape(-1, 1).view(torch.uint8), y.reshape(-1, 1).view(torch.uint8))
    with served(backend) as remember:
        remember("step_gram", "step_update", "step_lookahead", "step_lookahead_undo")
