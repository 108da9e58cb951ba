import math

import pytest
import torch
from plain import far_logits, infinite_loss, loss_gradients
from shapes import assert_as_good

from entangle_fast import reference

SHAPES = [(1, 1), (2, 2), (129, 10), (5, 151), (3, 372), (3, 1537), (2, 3, 129), (3, 40, 7), (0, 5), (2, 0, 5)]


def problem(shape, dtype):
    logits, target = (4 * torch.randn(*shape)).to(dtype), torch.randint(0, shape[-1], shape[:-1])
    target.view(-1)[::3] = -100
    return logits, target


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", [(math.inf, 0.0, -100, 0.0, "mean"), (2.0, 0.1, -100, 0.1, "sum")], ids=str)
def test_against_the_reference(cuda, dtype, shape, options):
    logits, target = problem(shape, dtype)
    ours, plain = cuda.sample_loss(logits, target, *options), reference.sample_loss(logits, target, *options)
    exact = reference.sample_loss(logits.double(), target, *options)
    assert [x.dtype for x in ours] == [x.dtype for x in plain]
    for x, y, truth in zip(ours[1:], plain[1:], exact[1:]):
        assert_as_good(x, y, truth)
    clip, penalty = options[:2]
    torch.testing.assert_close(ours[0], ours[1] - penalty / (ours[1] + 1e-3))  # steep where ce is 0: of the ce that was found
    weights = torch.randn(shape[0]).to(ours[0].dtype)
    mine = cuda.sample_loss_backward(weights, logits, target, plain[1], plain[2], *options)
    theirs = reference.sample_loss_backward(weights, logits, target, plain[1], plain[2], *options)
    truth = reference.sample_loss_backward(weights.double(), logits.double(), target, plain[1].double(), plain[2].double(), *options)
    assert mine.dtype == dtype
    assert_as_good(mine, theirs, truth)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("level", [-1000.0, 1000.0])
@pytest.mark.parametrize("classes", [10, 1537])
def test_logits_far_from_zero_lose_no_digits(cuda, dtype, classes, level, smoothing):
    logits, target, plain, truth = far_logits((5, classes), dtype, level, smoothing)
    assert_as_good(cuda.sample_loss(logits, target, math.inf, 0.0, -100, smoothing, "mean")[0], plain, truth)
    w, rest = torch.randn(5, dtype=plain.dtype), (math.inf, 0.0, -100, smoothing, "mean")
    _, ce, lse = cuda.sample_loss(logits, target, *rest)
    assert_as_good(cuda.sample_loss_backward(w, logits, target, ce, lse, *rest), *loss_gradients(logits, target, w, smoothing))


def test_no_clip_is_no_clip(cuda):
    logits, target, want = infinite_loss()
    rest = (math.inf, 0.0, -100, 0.0, "mean")
    _, ce, lse = cuda.sample_loss(logits, target, *rest)
    torch.testing.assert_close(cuda.sample_loss_backward(torch.ones(2), logits, target, ce, lse, *rest), want)


@pytest.mark.parametrize("classes", [37, 40, 1544])
def test_rows_of_a_wider_matrix(cuda, classes):
    wide = torch.randn(6, classes + 3).bfloat16()
    logits, target = wide[:, 1 : classes + 1], torch.randint(0, classes, (6,))
    rest = (math.inf, 0.0, -100, 0.0, "mean")
    loss, ce, lse = cuda.sample_loss(logits, target, *rest)
    torch.testing.assert_close(loss, reference.sample_loss(logits, target, *rest)[0], rtol=1e-5, atol=1e-5)
    d = cuda.sample_loss_backward(torch.ones(6), logits, target, ce, lse, *rest)
    torch.testing.assert_close(d, reference.sample_loss_backward(torch.ones(6), logits, target, ce, lse, *rest), rtol=1e-2, atol=1e-4)


def test_extreme_logits_and_labels(cuda):
    logits = torch.tensor([[-math.inf, 1.0, 2.0], [1e30, -1e30, 0.0], [5.0, 5.0, 5.0], [0.0, 1.0, 2.0]])
    loss = cuda.sample_loss(logits, torch.tensor([1, 0, 2, 3]), math.inf, 0.0, -100, 0.0, "mean")[0]
    expected = torch.nn.functional.cross_entropy(logits[:3], torch.tensor([1, 0, 2]), reduction="none")
    torch.testing.assert_close(loss[:3], expected)
    assert loss[3].isnan()  # a label out of range


@pytest.mark.parametrize("clip", [math.inf, 1.0])
def test_nan_is_never_lost(cuda, clip):
    logits, target, rest = torch.randn(3, 2, 5), torch.tensor([[0, 1], [2, 3], [-100, 4]]), (clip, 0.0, -100, 0.0, "mean")
    logits[0, 1, 2], logits[2, 0, 0] = math.nan, math.nan  # the second where it is ignored
    _, ce, lse = cuda.sample_loss(logits, target, *rest)
    grad = cuda.sample_loss_backward(torch.ones(3), logits, target, ce, lse, *rest)
    assert ce.isnan().tolist() == [True, False, False]
    assert grad[0, 1].isnan().all() and grad[1:].isfinite().all() and (grad[2, 0] == 0).all()


def test_bad_arguments_are_refused(cuda):
    rest = (math.inf, 0.0, -100, 0.0, "mean")
    with pytest.raises(RuntimeError, match="no classes"):
        cuda.sample_loss(torch.randn(3, 0), torch.zeros(3, dtype=torch.long), *rest)
    with pytest.raises(RuntimeError, match="int64"):
        cuda.sample_loss(torch.randn(3, 2), torch.zeros(3, dtype=torch.int32), *rest)
