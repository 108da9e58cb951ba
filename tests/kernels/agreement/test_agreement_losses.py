"""sample_loss, linear_sample_loss, w2."""

import math

import pytest
import torch
from entangle_fast.kernels import sample_loss, w2
from plain import far_logits, infinite_loss, loss_gradients
from rule import agree, check

from entangle_fast import reference

OPTIONS = [
    (math.inf, 0.0, -100, 0.0, "mean"),
    (3.5, 0.25, -100, 0.125, "mean"),
    (100.0, 0.0, 3, 0.0, "sum"),
]


def problem(shape, dtype, ignore_index):
    x, target = (torch.randn(shape) * 3).to(dtype), torch.randint(0, shape[-1], shape[:-1])
    if len(shape) == 3 and shape[1]:
        target[0, : shape[1] // 2] = ignore_index
        target[-1] = ignore_index
    return x, target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [(5, 151), (4, 7, 2049), (1, 1), (0, 9), (2, 0, 9)])
def test_sample_loss(shape, options, dtype):
    x, target = problem(shape, dtype, options[2])
    check(sample_loss, "sample_loss", x, target, *options)
    _, ce, lse = reference.sample_loss(x, target, *options)
    check(sample_loss, "sample_loss_backward", torch.randn(shape[0]).to(ce.dtype), x, target, ce, lse, *options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("classes", [13, 129])  # fewer than rows: stretches of rows; more: of classes
def test_linear_sample_loss_in_chunks(classes, options, dtype, monkeypatch):
    monkeypatch.setattr(sample_loss, "LOGIT_BYTES", 10 * classes * dtype.itemsize)
    _, target = problem((3, 7, classes), dtype, options[2])
    h, weight = torch.randn(3, 7, 24).to(dtype), torch.randn(classes, 24).to(dtype)
    for bias in (None, torch.randn(classes).to(dtype)):
        check(sample_loss, "linear_sample_loss", h, weight, bias, target, *options)
        _, ce, lse = reference.linear_sample_loss(h, weight, bias, target, *options)
        args = (torch.randn(3), h, weight, bias, target, ce, lse, *options)
        got, plain = sample_loss.linear_sample_loss_backward(*args), reference.linear_sample_loss_backward(*args)
        wide = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]
        agree(got, plain, reference.linear_sample_loss_backward(*wide))


def test_extreme_logits():
    x = torch.tensor([[1e4, -1e4, 0.0], [-math.inf, 0.0, 1.0], [88.0, 89.0, 1e30]])
    target = torch.tensor([0, 1, 2])
    check(sample_loss, "sample_loss", x, target, math.inf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("smoothing", [0.0, 0.125, 1.0])  # the interpreter passes scalars as float32
@pytest.mark.parametrize("level", [-1000.0, 1000.0])
@pytest.mark.parametrize("classes", [10, 2049])
def test_logits_far_from_zero_lose_no_digits(dtype, classes, level, smoothing):
    logits, target, plain, truth = far_logits((5, classes), dtype, level, smoothing)
    agree(sample_loss.sample_loss(logits, target, math.inf, 0.0, -100, smoothing)[0], plain, truth)
    w, rest = torch.randn(5, dtype=plain.dtype), (math.inf, 0.0, -100, smoothing)
    _, ce, lse = sample_loss.sample_loss(logits, target, *rest)
    eps = 16 * torch.finfo(torch.float64).eps  # in float64 the truth is plain PyTorch itself: the same sums in another order
    agree(sample_loss.sample_loss_backward(w, logits, target, ce, lse, *rest), *loss_gradients(logits, target, w, smoothing), eps=eps)


def test_no_clip_is_no_clip():
    logits, target, want = infinite_loss()
    _, ce, lse = sample_loss.sample_loss(logits, target, math.inf)
    torch.testing.assert_close(sample_loss.sample_loss_backward(torch.ones(2), logits, target, ce, lse, math.inf), want)


def test_a_label_out_of_range_gives_nan_and_reads_nothing_beyond_the_row():
    loss, ce, _ = sample_loss.sample_loss(torch.randn(2, 5), torch.tensor([5, 1]), math.inf)
    assert math.isnan(loss[0]) and math.isfinite(loss[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n, m", [(1, 1), (129, 129), (2, 151), (151, 2), (2100, 1100)])
def test_w2_of_losses(n, m, dtype):
    x, y = torch.randn(n).to(dtype), (torch.randn(m) + 1).to(dtype)
    check(w2, "w2_sorted", x, y)
    check(w2, "w2_moments", x, y)


def test_w2_of_equal_losses_has_no_weights_of_nan():
    check(w2, "w2_moments", torch.ones(7), torch.randn(5))
    check(w2, "w2_sorted", torch.ones(7), torch.ones(7))


@pytest.mark.parametrize("n, m, d", [(20, 30, 7), (7, 9, 40), (12, 12, 12), (1, 5, 3), (40, 29, 51)])
def test_w2_of_features(n, m, d):
    x, y = torch.randn(n, d), torch.randn(m, d) + 0.3
    got, plain = w2.w2_features(x, y), reference.w2_features(x, y)
    agree(got, plain, reference.w2_features(x.double(), y.double()))


def test_w2_of_features_with_duplicates_and_small_directions():
    x, y = torch.randn(9, 20, dtype=torch.float64), torch.randn(11, 20, dtype=torch.float64)
    x[1], x[:, 0] = x[0], x[:, 0] * 1e-4
    value, weights = w2.w2_features(x, y)
    want = reference.w2_features(x, y)
    torch.testing.assert_close(value, want[0], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(weights, want[1], rtol=1e-6, atol=1e-8)
