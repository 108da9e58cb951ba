"""What is refused before the first step. Bad parameters and shapes: tests/job."""

import pytest
from small import net, sets
from torch import nn
from torch.utils.data import TensorDataset

from entangle_fast.methods.checks import check_samples
from entangle_fast.methods.data import SampleSet

X, Y = sets()["adjacent"]
HOT = nn.functional.one_hot(Y, 4)


def check(data, loss=None, classes=True, model=None):
    check_samples(net() if model is None else model, SampleSet("adjacent", data, "cpu", 0), loss, classes)


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
    with pytest.raises(ValueError, match="loss: gave shape .. for 2 samples"):
        check((X, HOT.float()), loss=lambda output, y: (output.softmax(1) - y).square().mean(), classes=False)


class Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.inner, self.wrap = net(), wrap

    def forward(self, x):
        return self.wrap(self.inner(x))


@pytest.mark.parametrize("wrap, got", [
    (lambda y: (y, None), "tuple"), (lambda y: {"logits": y}, "dict"),
    (lambda y: y[:, 0], r"shape \(2,\)"), (lambda y: y[:, None], "shape"),
])  # fmt: skip
def test_a_model_that_gives_no_logits(wrap, got):
    with pytest.raises(ValueError, match=f"model: gives {got}.* for 2 samples; needs logits .n, classes."):
        check((X, Y), model=Wrapped(wrap))
