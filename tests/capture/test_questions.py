"""What a tape is asked wrongly: an error that names the argument and the mend."""

import re

import pytest
import torch
from torch import nn
from zoo import squares

import entangle_fast as ef


def tape_of(model, x):
    with ef.capture(model) as tape:
        tape.backward(squares(model(x)))
    return tape


def convolution():
    return nn.Sequential(nn.Conv1d(3, 4, 2), nn.Tanh())


@pytest.mark.parametrize("make, shape, name", [(lambda: nn.Linear(6, 3), (6,), "weight"), (lambda: nn.Linear(6, 3), (5, 6), "weight"),
                                               (convolution, (3, 6), "0.weight")])  # fmt: skip
def test_tapes_of_two_dtypes(make, shape, name):
    model, x = make(), torch.randn(4, *shape)
    one = tape_of(model, x)
    two = tape_of(model.double(), x.double())
    for left, right, there, here in ((one, two, "64", "32"), (two, one, "32", "64")):
        message = f"other: its gradients of parameter {name!r} are torch.float{there}, this tape's torch.float{here}; capture both"
        with pytest.raises(ValueError, match=re.escape(message)):
            left.gram(right)


def test_tapes_of_which_one_saw_autocast():
    model, x = nn.Linear(6, 3), torch.randn(4, 6)
    one = tape_of(model, x)
    with torch.autocast("cpu", torch.bfloat16), ef.capture(model) as two:
        two.backward(squares(model(x)).float())
    with pytest.raises(ValueError, match=r"^other: .*bfloat16.*float32; .* both with autocast or both without$"):
        one.gram(two)


def test_tapes_of_biases_alone_may_differ():
    model, x = nn.Linear(6, 3), torch.randn(4, 6)
    model.weight.requires_grad_(False)
    one = tape_of(model, x)
    assert one.gram(tape_of(model.double(), x.double())).shape == (4, 4)


def test_directions_by_iterators():
    tape = tape_of(nn.Linear(6, 3), torch.randn(4, 6))
    directions = [[torch.randn_like(p) for p in tape.params] for _ in range(2)]
    want = tape.project(directions)
    for given in ((d for d in directions), [iter(d) for d in directions], (iter(d) for d in directions)):
        assert torch.equal(tape.project(given), want)
    for given, message in ((1.5, r"directions: got float; needs a list of lists of tensors"), ([1.5], r"directions\[0\]: got float"),
                           (iter([]), "directions: got none"), ([iter([])], r"directions\[0\]: needs 2 tensors")):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            tape.project(given)
