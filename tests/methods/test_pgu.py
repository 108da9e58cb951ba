"""PGU's bases against SVDs of the collected inputs, and its step against projectors written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from small import trained
from stepping import F64, begin, follow, forget_batch, resumes_to_the_bit
from torch import nn

from entangle_fast.methods import Pgu, pgu
from entangle_fast.methods.data import Data
from entangle_fast.methods.process import NonFinite

SIZES = dict(batch=8, lr=0.5)


def ascent(model, d, k, offset):
    """The authors' first term, from the probabilities."""
    x, y = forget_batch(d, k, 8)
    right = torch.softmax(model(x), 1).gather(1, y[:, None])[:, 0]
    params = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(-torch.log(1 - (right - offset)).mean(), params)


def projector(a, share):
    """a: (vectors, d)."""
    _, s, vh = torch.linalg.svd(a, full_matrices=False)
    rank = int((s.cumsum(0) / s.sum() <= share).sum()) + 1
    return vh[:rank].T @ vh[:rank]


@pytest.mark.parametrize("options", [{}, {"share": 0.5}, {"offset": 0.5}, {"momentum": 0.5}, {"max_norm": 0.01}], ids=str)
def test_linear_layers(options):
    c = Pgu(**{**SIZES, "max_norm": 0.0, **options})
    bases = {}

    def direction(model, d, k):
        if k == 0:  # parameters: 0.weight, 0.bias, 1.weight, 1.bias, 3.bias, 5.weight, 5.bias
            x = torch.cat([s.tensors[0] for s in d.retain])
            bases.update({0: projector(x, c.share), 5: projector(model[:5](x).detach(), c.share)})
        found = ascent(model, d, k, c.offset)
        kept = [torch.zeros_like(g) for g in found]
        for i, p in bases.items():
            kept[i] = found[i] - found[i] @ p
        return torch.cat([g.flatten() for g in kept])

    process = follow(c, direction)
    frozen = [i for i in range(7) if i not in (0, 5)]
    assert all(torch.equal(process.params[i], [p for p in trained(F64).parameters() if p.requires_grad][i]) for i in frozen)
    assert process.facts()["protected"].keys() == {"0.weight", "5.weight"}


def test_protected_inputs_get_the_same_response():
    process = begin(Pgu(**SIZES, share=0.5))
    first = process.model[0].weight.clone()
    for _ in range(5):
        process.step()
    moved = process.model[0].weight - first
    assert moved.norm() > 1e-3 and (moved @ process.bases[0][0]).norm() < 1e-11 * moved.norm()


# ---- convolutions ----


def images(dtype=F64):
    g = torch.Generator().manual_seed(7)
    parts = [(torch.randn(n, 4, 9, 8, generator=g, dtype=F64).to(dtype), torch.randint(0, 4, (n,), generator=g)) for n in (16, 5, 9)]
    return Data.of(*parts, device="cpu", seed=0)


def conv_net(dtype=F64):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1, stride=2), nn.GroupNorm(2, 6), nn.Tanh(),
        nn.Conv2d(6, 4, (3, 2), padding="same", dilation=(1, 2), groups=2, padding_mode="reflect", bias=False), nn.Tanh(),
        nn.Flatten(), nn.Linear(4 * 5 * 4, 4),
    ).to(dtype).eval()  # fmt: skip


def patches(layer, x):
    """One patch at a time, read off as what each weight entry is multiplied with: (groups, vectors, d)."""
    weight = layer.weight.shape[1:]
    found = []
    for entry in range(weight.numel()):
        probe = torch.zeros(layer.groups, weight.numel(), dtype=x.dtype)
        probe[:, entry] = 1
        probe_layer = nn.Conv2d(x.shape[1], layer.groups, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
                                layer.groups, False, layer.padding_mode, dtype=x.dtype)  # fmt: skip
        probe_layer.weight.data = probe.view(layer.groups, *weight)
        found.append(probe_layer(x).detach().transpose(0, 1).flatten(1))
    return torch.stack(found, 2)


def test_unfolded_patches_are_what_the_weight_is_multiplied_with(monkeypatch):
    monkeypatch.setattr(pgu, "PATCHES", 500)  # several pieces
    model, x = conv_net(), images().remote.tensors[0]
    for i in (0, 3):
        x_i = model[:i](x).detach()
        pieces = list(pgu.inputs(model[i], x_i))
        assert len(pieces) > 1
        torch.testing.assert_close(torch.cat(pieces, 1), patches(model[i], x_i).unflatten(1, (len(x), -1)).flatten(1, 2))


def test_convolutions_with_groups():
    c = Pgu(**SIZES, max_norm=0.0, share=0.6)
    bases = {}

    def direction(model, d, k):
        if k == 0:
            x = torch.cat([s.tensors[0] for s in d.retain])
            for i, number in ((0, 0), (3, 4), (6, 5)):
                x_i = model[:i](x).detach()
                a = x_i[None] if i == 6 else patches(model[i], x_i)
                s = torch.linalg.svdvals(a)
                rank = max(int((one.cumsum(0) / one.sum() <= 0.6).sum()) + 1 for one in s)
                bases[number] = [vh[:rank].T @ vh[:rank] for vh in torch.linalg.svd(a, full_matrices=False).Vh]
        kept = []
        for i, g in enumerate(ascent(model, d, k, c.offset)):
            rows = [part.flatten(1) for part in g.chunk(len(bases[i]))] if i in bases else []
            kept += [r - r @ p for r, p in zip(rows, bases[i])] if rows else [torch.zeros_like(g)]
        return torch.cat([g.flatten() for g in kept])

    process = follow(c, direction, model=conv_net, sets=images())
    assert process.facts()["protected"]["3.weight"][1] == 18  # 3 channels a group, 3×2


def test_resume(tmp_path):
    resumes_to_the_bit(Pgu(**SIZES), tmp_path)
    whole, again = resumes_to_the_bit(Pgu(**SIZES, momentum=0.5), tmp_path, model=conv_net, sets=images(torch.float32))
    assert whole.facts() == again.facts()


# ---- refusals ----


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(4, 6), nn.Linear(6, 6), nn.Linear(6, 4, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(self.inner(x))


def test_a_weight_that_is_an_embedding_too_stays():
    assert pgu.projectable(model := Tied()) == [model.inner]


def test_a_model_without_layers_to_project():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4, 6))

        def forward(self, x):
            return F.linear(x, self.scale)

    with pytest.raises(ValueError, match="model: no Linear or Conv2d with a trainable weight of its own"):
        begin(Pgu(), model=Scale())


def test_retain_inputs_that_are_not_finite():
    process = begin(Pgu(**SIZES), torch.float32)
    process.data.remote.tensors[0][0] = math.inf
    with pytest.raises(NonFinite, match="input of a layer on the retain set"):
        process.step()
    assert not any(m._forward_pre_hooks for m in process.model.modules())


@pytest.mark.parametrize("change, message", [
    ({"share": 0.0}, "share: got 0.0"), ({"share": 1.0}, "share: got 1.0; needs a number in"), ({"offset": 0.0}, "offset: got 0.0"),
    ({"epochs": -1}, "epochs: got -1"),
])  # fmt: skip
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        Pgu(**change)
