"""No backend may err more than twice as much against float64 as plain PyTorch does in the same dtype; awkward shapes."""

import pytest
import torch
import torch.nn.functional as F

from entangle_fast import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def no_worse(got, plain, exact, floor=2e-6):
    """floor: the rounding of a float32 result, where plain PyTorch happens to be exact."""
    scale = exact.abs().max().item() if exact.numel() else 0.0
    assert got.shape == exact.shape and got.isfinite().all()
    error, theirs = ((x.double() - exact).abs().max().item() if exact.numel() else 0.0 for x in (got, plain))
    assert error <= 2 * theirs + floor * scale, f"error {error:.3g}, plain PyTorch {theirs:.3g}, scale {scale:.3g}"


def plain_gram(a, b, a2=None, b2=None):
    g = torch.einsum("nto,nti->noi", b, a).flatten(1)
    return g @ (g if a2 is None else torch.einsum("nto,nti->noi", b2, a2).flatten(1)).T


SHAPES = [(1, 1, 1, 1), (2, 1, 129, 3), (129, 1, 2, 151), (3, 5, 151, 2), (151, 2, 3, 5), (5, 129, 7, 2), (2, 372, 1, 3),
          (17, 9, 33, 31), (0, 3, 4, 5), (4, 0, 3, 5), (3, 2, 0, 4), (3, 2, 4, 0)]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gram_and_its_kin(shape, dtype, generator):
    n, t, d_in, d_out = shape
    a, b = (torch.randn(n, t, d, generator=generator).to(dtype) for d in (d_in, d_out))
    c, d = (torch.randn(3, t + 1, k, generator=generator).to(dtype) for k in (d_in, d_out))
    exact = plain_gram(a.double(), b.double())
    for route in ("auto", "pairs", "tiles", *(["rows"] if t == 1 else [])):
        no_worse(ops.gram(a, b, route=route), plain_gram(a, b), exact)
        no_worse(ops.gram(a, b, c, d, route="auto" if route == "rows" else route), plain_gram(a, b, c, d),
                 plain_gram(*(x.double() for x in (a, b, c, d))))  # fmt: skip
    grads = torch.einsum("nto,nti->noi", b, a)
    no_worse(ops.sqnorm(a, b), grads.square().sum((1, 2)), exact.diagonal())
    basis, w = torch.randn(2, d_out, d_in, generator=generator).to(dtype), torch.randn(3, n, generator=generator).to(dtype)
    wide = torch.einsum("nto,nti->noi", b.double(), a.double())
    no_worse(ops.project(a, b, basis), (grads[:, None] * basis).sum((2, 3)), torch.einsum("noi,koi->nk", wide, basis.double()))
    no_worse(ops.combine(a, b, w), torch.einsum("mn,noi->moi", w, grads), torch.einsum("mn,noi->moi", w.double(), wide))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, m", [(1, 3), (2, 1), (129, 5), (17, 151), (0, 3), (3, 0)])
def test_gram_of_layers(n, m, dtype, generator):
    widths = [(1, 3), (129, 2), (5, 151), (0, 4), (4, 0), (33, 31)]
    sides = [[tuple(torch.randn(k, d, generator=generator).to(dtype) for d in pair) for pair in widths] for k in (n, m)]

    def plain(layers, others, turn=lambda x: x):
        return sum((turn(a) @ turn(c).T) * (turn(b) @ turn(d).T) for (a, b), (c, d) in zip(layers, others))

    for others in (None, sides[1]):
        both = sides[0], others or sides[0]
        no_worse(ops.gram_layers(sides[0], others), plain(*both), plain(*both, torch.Tensor.double))
    strided = [(a.mT.contiguous().mT, b[:1].expand(n, b.shape[1])) for a, b in sides[0]]
    no_worse(ops.gram_layers(strided), plain(strided, strided), plain(strided, strided, torch.Tensor.double))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gram_of_views(dtype, generator):
    base_a, base_b = (torch.randn(12, 8, 20, generator=generator).to(dtype) for _ in range(2))
    views = {
        "strided": (base_a[::2, ::2, ::3], base_b[::2, ::2, 1::4]),
        "transposed": (base_a.transpose(0, 1), base_b.transpose(0, 1)),
        "expanded": (base_a[:, :1].expand(-1, 8, -1), base_b[:1].expand(12, -1, -1)),
        "one number": (base_a[:1, :1, :1].expand(12, 8, 5), base_b[..., :3]),
        "last first": (base_a.permute(2, 1, 0), base_b.permute(2, 1, 0)),
        "offset": (base_a.flatten()[1 : 1 + 11 * 8 * 20].view(11, 8, 20), base_b[1:]),
        "rows": (base_a[:, 0], base_b[:, :, 0]),
        "reversed memory": (base_a.mT[:, :8], base_b.mT[:, :8]),
    }
    for name, (a, b) in views.items():
        for route in ("auto", "tiles", "pairs"):
            got, want = ops.gram(a, b, route=route), ops.gram(a.contiguous().clone(), b.contiguous().clone(), route=route)
            assert torch.equal(got, want) or torch.allclose(got, want, rtol=1e-5, atol=1e-5 * want.abs().max()), name
            assert torch.allclose(ops.sqnorm(a, b), got.diagonal(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-4), name


def test_gram_is_symmetric_and_repeatable(generator):
    a, b = torch.randn(151, 9, 33, generator=generator), torch.randn(151, 9, 17, generator=generator)
    for route in ("pairs", "tiles"):
        k = ops.gram(a, b, route=route)
        assert torch.equal(k, k.T) or torch.allclose(k, k.T, rtol=1e-5)
        assert all(torch.equal(k, ops.gram(a, b, route=route)) for _ in range(3))


def test_nan_and_inf_are_not_hidden():
    a, b = torch.ones(3, 4), torch.ones(3, 2)
    a[1, 2] = torch.nan
    k = ops.gram(a, b)
    assert k[1].isnan().all() and k[:, 1].isnan().all() and k[0, 2] == 8


LOSSES = [(1, 2), (2, 129), (129, 3), (3, 151), (5, 372), (0, 4), (4, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LOSSES)
def test_sample_loss(shape, dtype, generator):
    n, classes = shape
    for t in (None, 1, 3):
        logits = 4 * torch.randn(n, *([t] if t else []), classes, generator=generator)
        logits, target = logits.to(dtype), torch.randint(0, classes, logits.shape[:-1], generator=generator)
        weights = torch.randn(n, generator=generator)

        def plain(x, target=target):
            each = F.cross_entropy(x.reshape(-1, x.shape[-1]), target.reshape(-1), reduction="none").view(target.shape)
            return each if each.dim() == 1 else each.mean(1)

        leaf, theirs, exact = (logits.to(d).detach().clone().requires_grad_() for d in (dtype, dtype, torch.float64))
        ours, their_loss, exact_loss = ops.sample_loss(leaf, target), plain(theirs), plain(exact)
        no_worse(ours, their_loss, exact_loss)
        found = [torch.autograd.grad((loss * weights.to(loss.dtype)).sum(), x)[0]
                 for loss, x in ((ours, leaf), (their_loss, theirs), (exact_loss, exact))]  # fmt: skip
        no_worse(*found)
        no_worse(ops.sample_loss(logits.mT.contiguous().mT, target), their_loss, exact_loss)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"clip": 2.0, "penalty": 0.1}, {"reduction": "sum", "ignore_index": 1}])
def test_sample_loss_is_its_reference(options, generator):
    x, target = torch.randn(9, 5, 12, generator=generator), torch.randint(0, 12, (9, 5), generator=generator)
    leaf = x.clone().requires_grad_()
    want, ce, lse = reference.sample_loss(x, target, **options)
    got = ops.sample_loss(leaf, target, **options)
    torch.testing.assert_close(got, want)
    w = torch.randn(9, generator=generator)
    torch.testing.assert_close(torch.autograd.grad(got, leaf, w)[0], reference.sample_loss_backward(w, x, target, ce, lse, **options))


@pytest.mark.parametrize("dtype", DTYPES)
def test_conv_and_embedding(dtype, generator):
    x, g = torch.randn(5, 4, 9, 7, generator=generator), torch.randn(5, 6, 4, 7, generator=generator)
    x, g = x.to(dtype), g.to(dtype)
    shape = dict(stride=(2, 1), padding=(0, 1), groups=2)
    exact = reference.per_sample.conv(x.double(), g.double(), [3, 3], [2, 1], [0, 1], [1, 1], 2).flatten(1)
    plain = reference.per_sample.conv(x, g, [3, 3], [2, 1], [0, 1], [1, 1], 2).flatten(1).to(dtype)
    for route in ("pairs", "tiles"):
        no_worse(ops.gram_conv(x, g, 3, route=route, **shape), plain @ plain.T, exact @ exact.T)
    no_worse(ops.sqnorm_conv(x, g, 3, **shape), plain.square().sum(1), exact.square().sum(1))
    ids, b = torch.randint(0, 7, (5, 6), generator=generator), torch.randn(5, 6, 3, generator=generator).to(dtype)
    exact = reference.per_sample.embedding(ids, b.double(), 7, 1).flatten(1)
    plain = reference.per_sample.embedding(ids, b, 7, 1).flatten(1).to(dtype)
    no_worse(ops.gram_embedding(ids, b, padding_idx=1), plain @ plain.T, exact @ exact.T)
    no_worse(ops.sqnorm_embedding(ids, b, padding_idx=1), plain.square().sum(1), exact.square().sum(1))


def test_nothing_in_nothing_out():
    e = torch.empty
    assert ops.gram_conv(e(0, 2, 5), e(0, 3, 3), 3).shape == (0, 0)
    assert ops.gram_embedding(e(0, 3).long(), e(0, 3, 2)).shape == (0, 0)
    assert ops.sqnorm_embedding(e(2, 0).long(), e(2, 0, 2)).tolist() == [0, 0]
    assert ops.combine(e(0, 3), e(0, 2), e(2, 0)).abs().sum() == 0
    assert ops.combine(torch.ones(2, 3), torch.ones(2, 2), e(0, 2)).shape == (0, 2, 3)
    assert ops.combine_conv(e(0, 2, 5), e(0, 3, 3), e(2, 0), 3).abs().sum() == 0
    assert ops.combine_embedding(e(0, 3).long(), e(0, 3, 2), e(2, 0), 4).abs().sum() == 0
    assert ops.project(torch.ones(2, 3), torch.ones(2, 2), e(0, 2, 3)).shape == (2, 0)
    h, weight = e(2, 0, requires_grad=True), e(4, 0, requires_grad=True)
    loss = ops.linear_sample_loss(h, weight, torch.zeros(2).long(), torch.zeros(4))
    torch.testing.assert_close(loss, torch.full((2,), 4.0).log())
    assert [x.shape for x in torch.autograd.grad(loss.sum(), (h, weight))] == [(2, 0), (4, 0)]
