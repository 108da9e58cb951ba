"""Sums of squared per-sample gradients against squares of explicit ones."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from entangle_fast import CaptureError, capture
from entangle_fast.capture import squares
from entangle_fast.capture.squares import square_sums

F64 = torch.float64


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)

    def forward(self, x):
        return self.mix(self.table(x)).tanh() @ self.table.weight.mT


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 3))
        self.unused = nn.Parameter(torch.randn(2))

    def forward(self, x):
        return x @ (0.5 * self.w)


def models():
    x = torch.randn(5, 6, dtype=F64)
    twice = nn.Linear(6, 6)
    return {
        "mlp": (nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), x),
        "positions": (nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3, bias=False)), torch.randn(5, 4, 6, dtype=F64)),
        "cnn": (nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, groups=2), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 3)),
                torch.randn(5, 2, 6, 6, dtype=F64)),
        "reused": (nn.Sequential(twice, nn.Tanh(), twice), x),
        "tied": (Tied(), torch.randint(7, (5, 3))),
        "transposed": (Transposed(), x),
    }  # fmt: skip


@pytest.mark.parametrize("name", models())
@pytest.mark.parametrize("small_chunks", [False, True])
def test_they_are_the_sums_of_squares(name, small_chunks, monkeypatch):
    torch.manual_seed(0)
    model, x = models()[name]
    model.to(F64)
    if small_chunks:  # two samples at most
        monkeypatch.setattr(squares, "chunks", lambda n, each: [(i, min(i + 2, n)) for i in range(0, n, 2)])

    def losses():
        return model(x).flatten(1).square().sum(1)

    with capture(model) as tape:
        tape.backward(losses())
    found = square_sums(tape)
    expected = [torch.zeros_like(p) for p in tape.params]
    for i in range(5):
        for total, g in zip(expected, torch.autograd.grad(losses()[i], tape.params, allow_unused=True)):
            if g is not None:
                total += g.detach() ** 2
    torch.testing.assert_close(found, [e.detach() for e in expected], rtol=1e-10, atol=1e-12)


def test_half_precision_is_summed_in_float32():
    model = nn.Linear(6, 3).bfloat16()
    with capture(model) as tape:
        tape.backward(F.cross_entropy(model(torch.randn(4, 6).bfloat16()).float(), torch.zeros(4).long(), reduction="none"))
    assert [s.dtype for s in square_sums(tape)] == [torch.float32] * 2


def test_before_the_backward():
    with capture(nn.Linear(6, 3)) as tape, pytest.raises(CaptureError, match="no backward yet"):
        square_sums(tape)
