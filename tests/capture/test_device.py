"""Capture on a device that is not the CPU: no tensor of a step is made elsewhere, and the host waits for none."""

import copy

import torch
import torch.nn.functional as F
from pretend import DEVICE, moved, pretended
from torch import nn

import entangle_fast as ef
from entangle_fast.capture.squares import square_sums


class Mixed(nn.Module):
    """A layer of every kind of factor: convolution, norms, embedding (tied to the output), attention, raw parameters."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4)
        self.table, self.position = nn.Embedding(7, 4, padding_idx=0), nn.Parameter(torch.randn(5, 4))
        self.attention, self.gate = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0), nn.Parameter(torch.ones(()))
        self.frozen = nn.BatchNorm1d(4)

    def forward(self, x, ids):
        seen = F.gelu(self.norm(self.conv(x))).mean((2, 3))
        read = self.attention(self.table(ids) + self.position).mean(1)
        return F.linear(self.frozen(seen * self.gate + read), self.table.weight)


def asked(model, x, ids, y, w):
    with ef.capture(model) as tape:
        tape.backward(F.cross_entropy(model(x, ids), y, reduction="none"))
    single, both = tape.combine(w[0]), tape.combine(w)
    answers = [tape.gram(), tape.sqnorms(), tape.project(both), tape.project_random(3, seed=1), *single, *both[1], *square_sums(tape)]
    with ef.capture(model) as other:
        other.backward(F.cross_entropy(model(x[:3], ids[:3]), y[:3], reduction="none"))
    return [*answers, tape.gram(other)]


def test_a_capture_makes_no_host_wait_and_mixes_no_devices():
    model = Mixed().eval()
    batch = torch.randn(6, 2, 5, 5), torch.randint(0, 7, (6, 5)), torch.randint(0, 7, (6,)), torch.rand(2, 6)
    wanted = asked(copy.deepcopy(model), *batch)
    with pretended() as device:
        model, batch = moved(model), [t.to(DEVICE) for t in batch]
        device.waits.clear()
        found = asked(model, *batch)
        assert not device.waits
        assert all(x.device == DEVICE for x in found)
        torch.testing.assert_close([x.cpu() for x in found], wanted, rtol=1e-4, atol=1e-5)
