"""Tensors that capture keeps or makes again, and somebody writes to: torch's own error, an exact answer, or one that names the mend."""

import pytest
import torch
import torch.nn.functional as F
from oracle import agree
from torch import nn
from zoo import lively, simple, squares

import entangle_fast as ef
from entangle_fast.capture import remake

N, T, D = 4, 3, 6
SIDES = {"kept": 1 << 18, "made again": 0}


@pytest.fixture(params=SIDES)
def side(request, monkeypatch):
    monkeypatch.setattr(remake, "_SMALL", SIDES[request.param])
    return request.param


@pytest.fixture
def net():
    torch.manual_seed(0)
    return lively(nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, D)))


def exact(net, losses):
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(l, list(net.parameters()), retain_graph=True)]) for l in losses]
    return torch.stack(rows) @ torch.stack(rows).T


WRITES = {
    "no_grad": lambda z: z.mul_(2),
    "detached": lambda z: z.detach().mul_(2),
    "copied into": lambda z: z.copy_(torch.ones_like(z)),
    "one entry": lambda z: z[0].zero_(),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("what", ["input", "activation", "made"])
def test_written_to_between_forward_and_backward(net, side, what, write):
    """Of what was kept torch says that it was written to; what is made again is as it was."""
    x = torch.randn(N, T, D).double()
    want = exact(net, squares(net(x)))
    with ef.capture(net) as tape:
        u = net[0](x)
        h = net[1](u)
        losses = squares(net[2](h))
        with torch.no_grad():
            WRITES[write]({"input": x, "activation": u, "made": h}[what])
        if what == "made" and side == "made again":
            tape.backward(losses)
            return torch.testing.assert_close(tape.gram(), want)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            tape.backward(losses)
        with pytest.raises(ef.CaptureError, match="broken off"):
            tape.gram()


@pytest.mark.parametrize("write", WRITES)
def test_written_to_between_two_layers_that_read_it(net, side, write):
    x = torch.randn(N, T, D).double()
    other = net[0]

    def losses(h, after):
        return squares(net[2](h) + F.linear(after(h), other.weight))

    def after(h):
        with torch.no_grad():
            WRITES[write](h)
        return h

    def copied(h):
        z = h.detach().clone()
        WRITES[write](z)
        return h + (z - h).detach()

    want = exact(net, losses(net[1](net[0](x)), copied))
    with ef.capture(net) as tape:
        found = losses(net[1](net[0](x)), after)
        if side == "kept":
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                tape.backward(found)
        else:
            tape.backward(found)
            torch.testing.assert_close(tape.gram(), want)


QUESTIONS = {
    "gram": lambda t: t.gram(),
    "cross-gram": lambda t: t.gram(t),
    "sqnorms": lambda t: t.sqnorms(),
    "combine": lambda t: t.combine(torch.ones(N).double()),
    "project": lambda t: t.project([t.params]),
    "per_sample": lambda t: t.per_sample(),
}


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("shape", [(D,), (T, D)])
def test_written_to_after_the_backward(net, side, shape, question):
    """The next batch in the memory of the last, as static buffers are used."""
    x = torch.randn(N, *shape).double()
    with ef.capture(net) as tape:
        tape.backward(squares(net(x)))
    QUESTIONS[question](tape)
    x.copy_(torch.randn_like(x))
    with pytest.raises(ef.CaptureError, match=r"parameter '0.weight'.*written to.*x\.clone\(\)"):
        QUESTIONS[question](tape)


def test_another_tape_that_was_written_to(net):
    x, z = torch.randn(2, N, D).double()
    tapes = []
    for batch in (x.clone(), z.clone()):
        with ef.capture(net) as tape:
            tape.backward(squares(net(batch)))
        tapes.append((tape, batch))
    (one, _), (two, batch) = tapes
    batch.zero_()
    with pytest.raises(ef.CaptureError, match="written to"):
        one.gram(two)


def test_ids_and_images_too():
    for model, x in ((nn.Embedding(7, 3), torch.randint(0, 7, (N, T))), (nn.Conv1d(T, 2, 3), torch.randn(N, T, D).double())):
        with ef.capture(lively(model)) as tape:
            tape.backward(squares(model(x)))
        x.zero_()
        with pytest.raises(ef.CaptureError, match="'weight'.*written to"):
            tape.sqnorms()


def test_a_stream_has_looked_already(net):
    x = torch.randn(N, D).double()
    with ef.capture(net) as tape:
        tape.backward(squares(net(x)), stream=("gram",))
    before = tape.gram().clone()
    x.zero_()
    assert torch.equal(tape.gram(), before)


def test_steps_on_the_parameters_are_no_writes(net):
    x = torch.randn(N, D).double()
    with ef.capture(net) as tape:
        tape.backward(squares(net(x)))
    before = tape.gram()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1)
    assert torch.equal(tape.gram(), before)


def test_inputs_of_inference_mode():
    with torch.inference_mode():
        x = torch.randn(N, D)
    model = nn.Linear(D, 2)
    with ef.capture(model) as tape:
        tape.backward(squares(model(x.clone())))
    assert tape.gram().isfinite().all()


LAYERS = {
    "linear": (lambda: nn.Linear(D, D), (T, D)),
    "linear, one position": (lambda: nn.Linear(D, D), (D,)),
    "conv": (lambda: nn.Conv1d(T, 4, 3), (T, D)),
    "layer_norm": (lambda: nn.LayerNorm(D), (T, D)),
    "group_norm": (lambda: nn.GroupNorm(T, T), (T, D)),
    "batch_norm": (lambda: nn.BatchNorm1d(T), (T, D)),
    "embedding": (lambda: nn.Sequential(Ids(), nn.Embedding(7, D)), (T,)),
}


class Ids(nn.Module):
    def forward(self, x):
        return x.abs().long()


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layers_output_may_be_written_to(layer):
    make, shape = LAYERS[layer]
    agree(simple(nn.Sequential(make(), nn.ReLU(inplace=True), nn.Tanh()), *shape))
