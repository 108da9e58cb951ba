import math

import pytest
import torch
from plain import far_logits, infinite_loss, loss_gradients

from entangle_fast import reference


@pytest.mark.parametrize("shape", [(1, 2), (7, 10), (129, 372), (3, 5, 151), (0, 10), (4, 0, 10)], ids=str)
@pytest.mark.parametrize("penalty,smoothing,reduction", [(0.0, 0.0, "mean"), (0.1, 0.1, "sum"), (0.1, 0.2, "mean")])
def test_forward_and_backward(cpp, assert_as_good, dtype, shape, penalty, smoothing, reduction):
    logits, target = (torch.randn(*shape) * 3).to(dtype), torch.randint(0, shape[-1], shape[:-1])
    if target.numel() > 3:
        target.view(-1)[1] = -100
    rest = (2.0, penalty, -100, smoothing, reduction)
    ours, plain = cpp.sample_loss(logits, target, *rest), reference.sample_loss(logits, target, *rest)
    truth = reference.sample_loss(logits.double(), target, *rest)
    for found in zip(ours, plain, truth):
        assert_as_good(*found)
    w = torch.randn(shape[0], dtype=ours[0].dtype)
    assert_as_good(
        cpp.sample_loss_backward(w, logits, target, *ours[1:], *rest),
        reference.sample_loss_backward(w, logits, target, *plain[1:], *rest),
        reference.sample_loss_backward(w.double(), logits.double(), target, *truth[1:], *rest),
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_sum_over_many_positions_does_not_drift(cpp, reduction):
    logits, target = torch.randn(2, 1 << 16, 3), torch.randint(0, 3, (2, 1 << 16))
    rest = (math.inf, 0.0, -100, 0.0, reduction)
    truth = reference.sample_loss(logits.double(), target, *rest)[0]
    torch.testing.assert_close(cpp.sample_loss(logits, target, *rest)[0].double(), truth, rtol=5e-7, atol=0)


def test_large_logits_stay_finite(cpp):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e30, 1e30, 0.0]])
    loss, ce, lse = cpp.sample_loss(logits, torch.tensor([0, 1]), 9.0)
    torch.testing.assert_close(loss, torch.zeros(2))
    grad = cpp.sample_loss_backward(torch.ones(2), logits, torch.tensor([0, 1]), ce, lse, 9.0)
    torch.testing.assert_close(grad, torch.zeros(2, 3))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("level", [-1000.0, 1000.0])
@pytest.mark.parametrize("classes", [10, 372])
def test_logits_far_from_zero_lose_no_digits(cpp, assert_as_good, dtype, classes, level, smoothing):
    logits, target, plain, truth = far_logits((64, classes), dtype, level, smoothing)
    assert_as_good(cpp.sample_loss(logits, target, math.inf, 0.0, -100, smoothing)[0], plain, truth)
    w, rest = torch.randn(64, dtype=plain.dtype), (math.inf, 0.0, -100, smoothing)
    _, ce, lse = cpp.sample_loss(logits, target, *rest)
    assert_as_good(cpp.sample_loss_backward(w, logits, target, ce, lse, *rest), *loss_gradients(logits, target, w, smoothing))


def test_no_clip_is_no_clip(cpp):
    logits, target, want = infinite_loss()
    for clip, there in ((math.inf, True), (1e30, False)):
        loss, ce, lse = cpp.sample_loss(logits, target, clip)
        grad = cpp.sample_loss_backward(torch.ones(2), logits, target, ce, lse, clip)
        assert loss[0] == math.inf
        torch.testing.assert_close(grad, torch.stack([want[0] * there, want[1]]))


def test_labels_are_checked(cpp):
    with pytest.raises(RuntimeError, match=r"^sample_loss: target holds a label outside \[0, 3\) that is not ignore_index -100$"):
        cpp.sample_loss(torch.randn(2, 3), torch.tensor([0, 3]), 9.0)
    logits, target = torch.randn(2, 3), torch.tensor([0, 1])
    _, ce, lse = cpp.sample_loss(logits, target, 9.0)
    for bad in (-1, 3, 10**9):
        with pytest.raises(RuntimeError, match="label"):
            cpp.sample_loss_backward(torch.ones(2), logits, torch.tensor([0, bad]), ce, lse, 9.0)
    with pytest.raises(RuntimeError, match="does not go with target"):
        cpp.sample_loss_backward(torch.ones(1), logits, target, ce, lse, 9.0)


def test_nan_is_never_lost(cpp):
    logits, target = torch.randn(3, 2, 5), torch.tensor([[0, 1], [2, 3], [-100, 4]])
    logits[0, 1, 2], logits[2, 0, 0] = math.nan, math.nan
    _, ce, lse = cpp.sample_loss(logits, target, math.inf)
    grad = cpp.sample_loss_backward(torch.ones(3), logits, target, ce, lse, math.inf)
    assert ce.isnan().tolist() == [True, False, False]
    assert grad[0, 1].isnan().all() and grad[1].isfinite().all() and grad[2].isfinite().all() and (grad[2, 0] == 0).all()


def test_float16(cpp):
    logits, target, w = torch.randn(7, 31).half(), torch.randint(0, 31, (7,)), torch.randn(7)
    loss, ce, lse = cpp.sample_loss(logits, target, 9.0)
    torch.testing.assert_close((loss, ce, lse), reference.sample_loss(logits, target, 9.0))
    grad = cpp.sample_loss_backward(w, logits, target, ce, lse, 9.0)
    torch.testing.assert_close(grad, reference.sample_loss_backward(w, logits, target, ce, lse, 9.0))
