"""What is refused before the first step. Bad parameters and shapes: tests/job."""

import contextlib
import random
import re

import numpy as np
import pytest
import torch
from small import net, sets
from torch import nn
from torch.utils.data import TensorDataset

from entangle_fast.methods.checks import check_samples
from entangle_fast.methods.data import SampleSet
from entangle_fast.metrics.outputs import check_logits

X, Y = sets()["adjacent"]
HOT = nn.functional.one_hot(Y, 4)


def check(data, loss=None, classes=True, model=None, trains=True):
    check_samples(net() if model is None else model, SampleSet("adjacent", data, "cpu", 0), loss, classes, trains)


@pytest.mark.parametrize("wrap", [lambda x, y: (x, y), TensorDataset])
@pytest.mark.parametrize("y, message", [
    (Y.int(), "adjacent: labels are torch.int32; needs int64 class indices: use .long()"),
    (Y.float(), "adjacent: labels are torch.float32; needs int64"),
    (HOT, r"adjacent: labels have shape \(\d+, 4\); needs class indices \(n,\): use .argmax\(1\), if they are one-hot"),
    (HOT.float(), "use .argmax"),
    (Y[:, None], r"labels have shape \(\d+, 1\); needs class indices \(n,\): use .squeeze\(1\)"),
    (Y + 3, r"adjacent: label 4 is outside \[0, 4\)"),
])  # fmt: skip
def test_labels(y, message, wrap):
    with pytest.raises(ValueError, match=message):
        check(wrap(X, y))
    check(wrap(X, Y))


def test_labels_are_free_where_the_loss_is_the_users_own():
    check((X, HOT.float()), loss=lambda output, y: (output.softmax(1) - y).square().sum(1), classes=False)
    with pytest.raises(ValueError, match="loss: gave shape .. for 16 samples"):
        check((X, HOT.float()), loss=lambda output, y: (output.softmax(1) - y).square().mean(), classes=False)


class Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.inner, self.wrap = net(), wrap

    def forward(self, x):
        return self.wrap(self.inner(x))


@pytest.mark.parametrize("wrap, got", [
    (lambda y: (y, None), "tuple"), (lambda y: {"logits": y}, "dict"),
    (lambda y: y[:, None], r"shape \(16, 1, 4\)"),
])  # fmt: skip
def test_a_model_that_gives_no_logits(wrap, got):
    with pytest.raises(ValueError, match=f"model: gives {got} for 16 samples; needs logits .n, C., C >= 2: .* returns them$"):
        check((X, Y), model=Wrapped(wrap))


@pytest.mark.parametrize("one, both", [(lambda y: y[:, 0], "stack"), (lambda y: y[:, :1], "cat")])
def test_a_model_of_one_logit(one, both):
    """What the error names: two logits of the same cross-entropy."""
    error = rf"; needs .*logits \(n, C\), C >= 2: .* returns torch.{both}\(\[torch.zeros_like\(z\), z\], 1\)"
    with pytest.raises(ValueError, match=r"model: gives shape \(16.*\) for 16 samples" + error):
        check((X, Y), model=Wrapped(one), loss=bce)
    z = one(net()(X)).detach()
    with pytest.raises(ValueError, match=r"model: gave \(\d+.*\) for \d+ samples" + error):
        check_logits(z, len(X))
    logits, y = getattr(torch, both)([torch.zeros_like(z), z], 1), (Y > 0).long()
    check_logits(logits, len(X))
    torch.testing.assert_close(ce(logits, y), bce(z.flatten(), y.float()))


def ce(output, y):
    return nn.functional.cross_entropy(output, y, reduction="none")


def bce(output, y):
    return nn.functional.binary_cross_entropy_with_logits(output, y, reduction="none")


def raising(output, y):
    raise KeyError("mine")


SWAP = "it is called as loss.output, y.: give lambda output, y: loss.y, output."


@pytest.mark.parametrize("loss, error, message", [
    (lambda output, y: ce(output, y).detach(), ValueError, "loss: gave losses without a gradient; .* no .detach.., .item.., numpy"),
    (lambda output, y: ce(output.detach(), y), ValueError, "loss: gave losses without a gradient"),
    (lambda output, y: ce(output, y).detach().numpy(), TypeError, "loss: gave a ndarray for 16 samples; .*: compute them with torch"),
    (lambda output, y: ce(output, y).mean().item(), TypeError, "loss: gave a float for 16 samples; .*: use reduction='none', and no .item"),
    (lambda output, y: ce(output, y).tolist(), TypeError, "loss: gave a list for 16 samples; needs a tensor .16,., one loss per sample"),
    (lambda output, y: None, TypeError, "loss: gave a NoneType for 16 samples; .*: return them"),
    (lambda output, y: ce(output, y).mean(), ValueError,
     r"loss: gave shape \(\) for 16 samples; needs one per sample, \(16,\), not reduced"),
    (nn.CrossEntropyLoss(), ValueError, r"loss: gave shape \(\) for 16 samples"),
    (lambda output, y: ce(output, y)[:, None], ValueError, r"loss: gave shape \(16, 1\) .* not reduced: .squeeze\(1\)"),
    (lambda output, y: (output.argmax(1) != y).long(), ValueError, "loss: gave torch.int64 losses; needs real floating-point ones: .float"),
    (lambda output, y: ce(output, y) * 1j, ValueError, "loss: gave torch.complex64 losses; needs real .*, or .real where they are complex"),
    (lambda output, y: output, ValueError, r"loss: gave shape \(16, 4\) for 16 samples"),
    (lambda a, b: ce(b, a), ValueError, f"loss: serves as loss.y, output. only, but {SWAP}"),
    (lambda labels, logits: (logits - labels[:, None]).square().sum(1), ValueError, f"loss: its arguments are .labels, logits., {SWAP}"),
    (raising, ValueError, r"loss: raised KeyError when called as .* with \(16, 4\) torch.float32 and \(16,\) torch.int64: 'mine'"),
    (lambda output: output.sum(1), ValueError, "loss: raised TypeError when called as loss.output, y."),
])  # fmt: skip
def test_a_loss_that_is_none(loss, error, message):
    with pytest.raises(error, match=message) as raised:
        check((X, Y), loss=loss)
    assert loss is not raising or isinstance(raised.value.__cause__, KeyError)


@pytest.mark.parametrize("wrap, y, form", [
    (lambda z: z[:, :1], Y.float(), "loss(output.squeeze(1), y)"),
    (lambda z: z[:, :1], Y, "loss(output.squeeze(1), y.float())"),
    (lambda z: z[:, 0], Y, "loss(output, y.float())"),
    (lambda z: z[:, 0], Y[:, None].float(), "loss(output, y.squeeze(1))"),
    (lambda z: z[:, :1], Y[:, None], "loss(output.squeeze(1), y.squeeze(1).float())"),
])  # fmt: skip
@pytest.mark.parametrize("loss", [bce, nn.BCEWithLogitsLoss(reduction="none")])
def test_a_binary_loss_that_serves_in_another_form(loss, wrap, y, form):
    with pytest.raises(ValueError, match=re.escape(f"loss: serves as {form} only, but with (16") + f".*: give .*{re.escape(form)}$"):
        check((X, y), loss=loss, classes=False, model=Wrapped(wrap))
    check((X, y), loss=eval(f"lambda output, y: {form}", {"loss": loss}), classes=False, model=Wrapped(wrap))


@pytest.mark.parametrize("loss", [ce, nn.CrossEntropyLoss(reduction="none"), lambda y_hat, y: ce(y_hat, y), lambda *both: ce(*both)])
def test_a_loss_that_serves(loss):
    with torch.no_grad():
        check((X, Y), loss=loss)


class Dark(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = net()

    def forward(self, x):
        with torch.no_grad():
            return self.inner(x)


def test_a_model_that_lets_no_gradient_through():
    for loss in (None, ce):
        with pytest.raises(ValueError, match="model: its output depends on none of its trainable parameters, or runs under torch.no_grad"):
            check((X, Y), loss=loss, model=Dark())
    check((X, Y), model=Dark(), trains=False)  # to measure on


def needs_three(x, generator, strength):
    return x


@pytest.mark.parametrize("augment, error, message", [
    (lambda x: x, ValueError, r"augment: raised TypeError when called as augment.* with \(16, 6\) torch.float32: .*RandomShift"),
    (needs_three, ValueError, "augment: raised TypeError when called"), (lambda x, g: None, TypeError, "augment: gave a NoneType; needs"),
    (lambda x, g: (x, 1), TypeError, "augment: gave a tuple"), (lambda x, g: x.numpy(), TypeError, "augment: gave a ndarray"),
    (lambda x, g: x[:1], ValueError, r"augment: gave shape \(1, 6\) for \(16, 6\) torch.float32; needs as many samples"),
    (lambda x, g: x.sum(), ValueError, r"augment: gave shape \(\) for"),
    (lambda x, g: x[:, :3], ValueError, r"augment: the model cannot take \(16, 3\) torch.float32, made of \(16, 6\) .* of adjacent"),
    (lambda x, g: x.double(), ValueError, r"augment: the model cannot take \(16, 6\) torch.float64"),
])  # fmt: skip
def test_an_augmentation_that_is_none(augment, error, message):
    with pytest.raises(error, match=message):
        check_samples(net(), SampleSet("adjacent", (X, Y), "cpu", 0, augment), None, True)


GENERATORS = {  # how it is drawn from, and its state
    "torch": (lambda: torch.rand(()).item(), torch.get_rng_state),
    "numpy": (np.random.rand, lambda: torch.tensor([*np.random.get_state()[1].tolist(), np.random.get_state()[2]])),
    "Python": (random.random, lambda: torch.tensor(random.getstate()[1])),
}


@pytest.mark.parametrize("library", GENERATORS)
def test_an_augmentation_is_tried_without_a_trace(library):
    draw, state = GENERATORS[library]
    model, before, x = net(), state(), X.clone()
    check_samples(model, SampleSet("adjacent", (X, Y), "cpu", 0, lambda x, g: x.add_(draw())), None, True)
    assert torch.equal(state(), before) and torch.equal(X, x)


class Drawing(TensorDataset):
    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + self.draw(), y


@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("library", GENERATORS)
def test_what_draws_random_numbers_is_tried_without_a_trace(library, error):
    draw, state = GENERATORS[library]
    model, data, before = net(), Drawing(X, Y), state()
    data.draw = draw
    model.register_forward_hook(lambda module, args, output: output + draw())
    with pytest.raises(ValueError, match="loss: gave shape") if error else contextlib.nullcontext():
        check(data, loss=lambda output, y: (ce(output, y) + draw())[error:], model=model)
    assert torch.equal(state(), before)
    draw()
    assert not torch.equal(state(), before)
