"""A 0-d parameter used through a function: CLIP's logit scale."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import entangle_fast as ef


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(5, 3), nn.Parameter(torch.tensor(1.3))

    def forward(self, x):
        return F.normalize(self.linear(x), dim=-1) * self.scale.exp()


def test_logit_scale():
    model, x = Scaled().double(), torch.randn(4, 5, dtype=torch.float64)

    def losses():
        return model(x).square().sum(1) + model(x)[:, 0]

    with ef.capture(model) as tape:
        tape.backward(losses())
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(l, tape.params, retain_graph=True)]) for l in losses()]
    grads = torch.stack(rows)
    torch.testing.assert_close(tape.gram(), grads @ grads.T)
    torch.testing.assert_close(tape.sqnorms(), grads.square().sum(1))
    assert ef.check_capture(model, losses) < 1e-10


def test_check_capture_wants_a_function():
    model = Scaled()
    with pytest.raises(TypeError, match="needs a function"):
        ef.check_capture(model, model(torch.randn(2, 5)).sum(1))
