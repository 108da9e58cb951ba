"""The specification against autograd in float64, sample by sample."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from plain import far_logits, infinite_loss, loss_gradients

from entangle_fast import reference as ref
from entangle_fast.reference import philox


@pytest.fixture
def rand(generator):
    return lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)


def gradients(weight, outputs):
    """outputs: one scalar per sample → (n, P)."""
    return torch.stack([torch.autograd.grad(y, weight, retain_graph=True)[0].flatten() for y in outputs])


def linear(rand, n=4, t=3, d_in=5, d_out=2):
    a, b, w = rand(n, t, d_in), rand(n, t, d_out), rand(d_out, d_in).requires_grad_()
    return a, b, gradients(w, (F.linear(a, w) * b).sum((1, 2)))


CONVS = {
    "1d": ((4, 6, 9), (6, 3, 3), dict(stride=[2], padding=[1], dilation=[1], groups=2)),
    "2d": ((3, 4, 6, 7), (4, 4, 3, 2), dict(stride=[1, 2], padding=[1, 0], dilation=[2, 1], groups=1)),
    "depthwise": ((3, 4, 5, 5), (8, 1, 3, 3), dict(stride=[1, 1], padding=[1, 1], dilation=[1, 1], groups=4)),
    "3d": ((2, 2, 4, 5, 4), (4, 1, 2, 3, 2), dict(stride=[1, 2, 1], padding=[0, 1, 0], dilation=[1, 1, 2], groups=2)),
}


def conv(rand, kind):
    shape, w, options = CONVS[kind]
    x, w = rand(*shape), rand(*w).requires_grad_()
    y = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3](x, w, None, *options.values())
    g = rand(*y.shape)
    return x, g, list(w.shape[2:]), options, gradients(w, (y * g).flatten(1).sum(1)), w


def lookup(rand, generator, padding=2):
    ids, b = torch.randint(0, 5, (4, 6), generator=generator), rand(4, 6, 3)
    w = rand(5, 3).requires_grad_()
    return ids, b, gradients(w, (F.embedding(ids, w, padding) * b).sum((1, 2)))


@pytest.mark.parametrize("route", ["pairs", "tiles"])
def test_linear(rand, route):
    a, b, g = linear(rand)
    a2, b2, h = linear(rand, n=3, t=4)
    torch.testing.assert_close(ref.gram(a, b, route=route), g @ g.T)
    torch.testing.assert_close(ref.gram(a, b, a2, b2, route), g @ h.T)
    torch.testing.assert_close(ref.sqnorm(a, b), g.square().sum(1))
    basis, w = rand(3, 2, 5), rand(2, 4)
    torch.testing.assert_close(ref.project(a, b, basis), g @ basis.flatten(1).T)
    torch.testing.assert_close(ref.combine(a, b, w).flatten(1), w @ g)


def test_rows(rand):
    a, b, g = linear(rand, t=1)
    for x, y in ((a, b), (a[:, 0], b[:, 0])):
        torch.testing.assert_close(ref.gram(x, y, route="rows"), g @ g.T)
        torch.testing.assert_close(ref.sqnorm(x, y), g.square().sum(1))


def test_rows_of_layers(rand):
    (a, b, g), (c, d, h) = linear(rand, t=1), linear(rand, t=1, d_in=2, d_out=3)
    a, b, c, d = (x[:, 0] for x in (a, b, c, d))
    torch.testing.assert_close(ref.gram_layers([a, c], [b, d], [], []), g @ g.T + h @ h.T)
    torch.testing.assert_close(ref.gram_layers([a, c], [b, d], [a[:2], c[:2]], [b[:2], d[:2]]), g @ g[:2].T + h @ h[:2].T)
    low = ref.gram_layers([a.bfloat16()], [b.bfloat16()], [], [])
    assert low.dtype == torch.float32


@pytest.mark.parametrize("d", [1, 30])
def test_both_ways_to_sqnorm(rand, d):
    a, b, g = linear(rand, t=7, d_in=d, d_out=d)
    torch.testing.assert_close(ref.sqnorm(a, b), g.square().sum(1))


@pytest.mark.parametrize("kind", CONVS)
def test_conv(rand, kind):
    x, g, kernel, options, grads, weight = conv(rand, kind)
    shape = list(options.values())
    for route in ("pairs", "tiles"):
        torch.testing.assert_close(ref.gram_conv(x, g, kernel, *shape, route=route), grads @ grads.T)
        torch.testing.assert_close(ref.gram_conv(x[:2], g[:2], kernel, *shape, x[1:], g[1:], route), grads[:2] @ grads[1:].T)
    torch.testing.assert_close(ref.sqnorm_conv(x, g, kernel, *shape), grads.square().sum(1))
    basis, w = rand(3, *weight.shape), rand(2, len(x))
    torch.testing.assert_close(ref.project_conv(x, g, basis, *shape), grads @ basis.flatten(1).T)
    torch.testing.assert_close(ref.combine_conv(x, g, w, kernel, *shape).flatten(1), w @ grads)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_ids_of_any_integers(rand, generator, dtype):
    rows = torch.iinfo(dtype).max + 1 if dtype.itemsize == 1 else 300
    ids = torch.randint(0, rows, (4, 3), generator=generator)
    ids[0, 0] = rows - 1  # 255 is -1 to a uint8
    b, basis, w, small = rand(4, 3, 2), rand(3, rows, 2), rand(2, 4), ids.to(dtype)
    for op, args in (("gram_embedding", (b,)), ("gram_embedding", (b, small, b)), ("sqnorm_embedding", (b,)),
                     ("project_embedding", (b, basis)), ("combine_embedding", (b, w, rows)), ("project_random_embedding", (b, 2, rows, 0)),
                     ("per_sample.embedding", (b, rows))):  # fmt: skip
        run = ref.per_sample.embedding if op == "per_sample.embedding" else getattr(ref, op)
        torch.testing.assert_close(run(small, *args), run(ids, *args), rtol=0, atol=0)


def test_embedding(rand, generator):
    ids, b, grads = lookup(rand, generator)
    torch.testing.assert_close(ref.gram_embedding(ids, b, padding_idx=2), grads @ grads.T)
    cross = ref.gram_embedding(ids[:3], b[:3], ids[2:, :4], b[2:, :4], 2)
    part = ref.combine_embedding(ids[2:, :4], b[2:, :4], torch.eye(2).double(), 5, 2).flatten(1)
    torch.testing.assert_close(cross, grads[:3] @ part.T)
    torch.testing.assert_close(ref.sqnorm_embedding(ids, b, 2), grads.square().sum(1))
    basis, w = rand(3, 5, 3), rand(2, 4)
    torch.testing.assert_close(ref.project_embedding(ids, b, basis, 2), grads @ basis.flatten(1).T)
    torch.testing.assert_close(ref.combine_embedding(ids, b, w, 5, 2).flatten(1), w @ grads)


def test_small_chunks_change_nothing(rand, generator, monkeypatch):
    a, b, g = linear(rand)
    x, y, kernel, options, grads, _ = conv(rand, "2d")
    ids, c, rows = lookup(rand, generator)
    monkeypatch.setattr("entangle_fast.reference.per_sample.CHUNK_BYTES", 1)
    for route in ("pairs", "tiles"):
        torch.testing.assert_close(ref.gram(a, b, route=route), g @ g.T)
        torch.testing.assert_close(ref.gram_conv(x, y, kernel, *options.values(), route=route), grads @ grads.T)
    torch.testing.assert_close(ref.sqnorm_conv(x, y, kernel, *options.values()), grads.square().sum(1))
    torch.testing.assert_close(ref.gram_embedding(ids, c, padding_idx=2), rows @ rows.T)


@pytest.mark.parametrize("kind", ["sign", "gaussian"])
@pytest.mark.parametrize("chunk", [64 << 20, 1])
def test_random_projection_draws_as_philox_says(rand, generator, kind, chunk, monkeypatch):
    monkeypatch.setattr("entangle_fast.reference.per_sample.CHUNK_BYTES", chunk)
    monkeypatch.setattr(sys.modules["entangle_fast.reference.project"], "_STRETCH", min(chunk, 7))
    k, rest = {"sign": 130, "gaussian": 5}[kind], (7, 2, kind)

    def onto(g):
        return g @ philox.directions(k, g.shape[1], *rest).double().T

    a, b, g = linear(rand)
    torch.testing.assert_close(ref.project_random(a, b, k, *rest), onto(g))
    for shape in CONVS:
        x, y, kernel, options, grads, _ = conv(rand, shape)
        torch.testing.assert_close(ref.project_random_conv(x, y, k, kernel, *options.values(), *rest), onto(grads))
    ids, c, rows = lookup(rand, generator)
    torch.testing.assert_close(ref.project_random_embedding(ids, c, k, 5, *rest, 2), onto(rows))
    for empty in ((ids[:, :0], c[:, :0]), (ids[:0], c[:0]), (ids, c[..., :0])):
        assert not ref.project_random_embedding(*empty, k, 5, *rest).any()


def test_gradcheck(rand, generator):
    from entangle_fast import ops

    a, b = rand(3, 2, 4).requires_grad_(), rand(3, 2, 2).requires_grad_()
    x, g = rand(2, 2, 5).requires_grad_(), rand(2, 4, 3).requires_grad_()
    ids, w = torch.randint(0, 3, (3, 2), generator=generator), rand(2, 3).requires_grad_()
    for f, inputs in (
        (lambda a, b: ops.gram(a, b), (a, b)),
        (lambda a, b: ops.gram(a[:2], b[:2], a[1:], b[1:]), (a, b)),
        (lambda a, b: ops.gram_layers([(a[:, 0], b[:, 0]), (a[:, 1], b[:, 0])]), (a, b)),
        (lambda a, b: ops.gram_layers([(a[:2, 0], b[:2, 0]), (w, b[:2, 1])], [(a[1:, 1], b[1:, 1]), (w, b[1:, 0])]), (a, b)),
        (ops.sqnorm, (a, b)),
        (ops.project, (a, b, rand(2, 2, 4).requires_grad_())),
        (ops.combine, (a, b, w)),
        (lambda x, g: ops.gram_conv(x, g, 3), (x, g)),
        (lambda x, g: ops.sqnorm_conv(x, g, 3), (x, g)),
        (ops.project_conv, (x, g, rand(2, 4, 2, 3).requires_grad_())),
        (lambda x, g, w: ops.combine_conv(x, g, w, 3), (x, g, rand(2, 2).requires_grad_())),
        (lambda b: ops.gram_embedding(ids, b, padding_idx=1), (b,)),
        (lambda b: ops.sqnorm_embedding(ids, b), (b,)),
        (lambda b, basis: ops.project_embedding(ids, b, basis), (b, rand(2, 3, 2).requires_grad_())),
        (lambda b, w: ops.combine_embedding(ids, b, w, 3), (b, w)),
        (lambda x: ops.w2_sorted(x, torch.tensor([0.3, 2.0, -1.0]).double())[0], (rand(5).requires_grad_(),)),
        (lambda x: ops.w2_moments(x, torch.tensor([0.3, 2.0, -1.0]).double())[0], (rand(5).requires_grad_(),)),
        (lambda x: ops.w2_features(x, torch.eye(4, 3).double())[0], (rand(6, 3).requires_grad_(),)),
    ):  # fmt: skip
        assert torch.autograd.gradcheck(f, inputs)


TARGETS = torch.tensor([[1, 0, -100, 2], [-100, -100, -100, -100], [3, 3, 1, 0]])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sample_loss_is_cross_entropy(rand, smoothing, reduction):
    logits = rand(3, 4, 5)
    each = F.cross_entropy(logits.mT, TARGETS, reduction="none", label_smoothing=smoothing)
    want = each.sum(1) / ((TARGETS != -100).sum(1).clamp(min=1) if reduction == "mean" else 1)
    loss, ce, lse = ref.sample_loss(logits, TARGETS, label_smoothing=smoothing, reduction=reduction)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(ce, want)
    torch.testing.assert_close(lse, torch.stack([logits.amax(-1), logits.logsumexp(-1) - logits.amax(-1)]))


@pytest.mark.parametrize("smoothing", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_far_from_zero_lose_no_digits(dtype, smoothing):
    logits, target, plain, truth = far_logits((64, 372), dtype, 1000.0, smoothing)
    allowed = 2 * (plain - truth).norm()
    assert (ref.sample_loss(logits, target, label_smoothing=smoothing)[0] - truth).norm() <= allowed
    eye = torch.eye(372, dtype=dtype)  # a layer that makes the same logits, of two chunks
    assert (ref.linear_sample_loss(logits, eye, None, target, label_smoothing=smoothing)[0] - truth).norm() <= allowed


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_far_from_zero_lose_no_digits(dtype, smoothing):
    logits, target, *_ = far_logits((64, 372), dtype, 1000.0, smoothing)
    w = torch.randn(64)
    plain, truth = loss_gradients(logits, target, w, smoothing)
    allowed = 2 * (plain - truth).norm()
    _, ce, lse = ref.sample_loss(logits, target, label_smoothing=smoothing)
    assert (ref.sample_loss_backward(w, logits, target, ce, lse, label_smoothing=smoothing) - truth).norm() <= allowed
    eye = torch.eye(372, dtype=dtype)
    _, ce, lse = ref.linear_sample_loss(logits, eye, None, target, label_smoothing=smoothing)
    dh = ref.linear_sample_loss_backward(w, logits, eye, None, target, ce, lse, label_smoothing=smoothing)[0]
    assert (dh - truth).norm() <= allowed


def test_no_clip_is_no_clip():
    logits, target, want = infinite_loss()
    _, ce, lse = ref.sample_loss(logits, target)
    torch.testing.assert_close(ref.sample_loss_backward(torch.ones(2), logits, target, ce, lse), want)


def test_a_chunk_of_classes_that_are_all_masked(monkeypatch):
    monkeypatch.setattr(sys.modules[ref.sample_loss.__module__], "LEAST_CLASSES", 2)
    monkeypatch.setattr(sys.modules[ref.sample_loss.__module__], "LOGIT_BYTES", 0)
    bias = torch.tensor([-math.inf, -math.inf, -2000.0, -2001.0, -math.inf, -math.inf])
    h, weight, target = torch.ones(1, 1), torch.zeros(6, 1), torch.tensor([3])
    found = ref.linear_sample_loss(h, weight, bias, target)
    torch.testing.assert_close(found, ref.sample_loss(bias[None], target))


@pytest.mark.parametrize("options", [
    {}, {"clip": 50.0}, {"penalty": 0.2}, {"label_smoothing": 0.1}, {"penalty": 0.1, "reduction": "sum"},
])  # fmt: skip
def test_sample_loss_gradients(rand, options):
    from entangle_fast import ops

    for logits, target in ((rand(3, 5), TARGETS[:, 0].clamp(min=0)), (rand(3, 4, 5), TARGETS)):
        assert torch.autograd.gradcheck(lambda x, t=target: ops.sample_loss(x, t, **options), logits.requires_grad_())
        h, w, b = rand(*target.shape, 4).requires_grad_(), rand(5, 4).requires_grad_(), rand(5).requires_grad_()
        assert torch.autograd.gradcheck(lambda h, w, b, t=target: ops.linear_sample_loss(h, w, t, b, **options), (h, w, b))
        fused = ops.linear_sample_loss(h, w, target, b, **options)
        torch.testing.assert_close(fused, ops.sample_loss(F.linear(h, w, b), target, **options))


@pytest.mark.parametrize("clip", [1.2, 1.8])
def test_fused_and_plain_loss_clip_alike(rand, clip):
    from entangle_fast import ops

    target = TARGETS
    h, w, b = rand(3, 4, 4).requires_grad_(), rand(5, 4).requires_grad_(), rand(5).requires_grad_()
    seeds = rand(3)
    plain = torch.autograd.grad(ops.sample_loss(F.linear(h, w, b), target, clip=clip, penalty=0.1), (h, w, b), seeds)
    fused = torch.autograd.grad(ops.linear_sample_loss(h, w, target, b, clip=clip, penalty=0.1), (h, w, b), seeds)
    for p, q in zip(plain, fused):
        torch.testing.assert_close(p, q)


def test_clip_keeps_the_value_and_stops_the_gradient():
    from entangle_fast import ops

    logits = torch.tensor([[4.0, 0.0], [0.0, 4.0]], dtype=torch.float64, requires_grad=True)
    target = torch.zeros(2, dtype=torch.int64)
    loss = ops.sample_loss(logits, target, clip=1.0)
    torch.testing.assert_close(loss, F.cross_entropy(logits, target, reduction="none"))
    loss.sum().backward()
    assert logits.grad[0].abs().sum() > 0 and logits.grad[1].abs().sum() == 0


def test_penalty_by_hand():
    logits, target = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([0])
    ce = math.log(1 + math.exp(-1))
    assert ref.sample_loss(logits, target, penalty=0.5)[0].item() == pytest.approx(ce - 0.5 / (ce + 1e-3))


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e30, 0.0, 1e30]])
    loss, ce, lse = ref.sample_loss(logits, torch.tensor([0, 1]))
    d = ref.sample_loss_backward(torch.ones(2), logits, torch.tensor([0, 1]), ce, lse)
    assert loss.isfinite().all() and d.isfinite().all()
