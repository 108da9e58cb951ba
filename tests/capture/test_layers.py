"""Linear layers of one position share one call of gram_layers; what else a model has goes its own way, and the sum stays right."""

import pytest
import torch
from oracle import Case, close, flat, tape_of
from torch import nn
from zoo import Via, lively, simple, squares

import entangle_fast as ef


@pytest.fixture
def calls(monkeypatch):
    """The names of the operations that capture calls, with the number of layers."""
    found = []

    def counted(name, op):
        def run(*args, **options):
            found.append(f"gram_layers of {len(args[0])}" if name == "gram_layers" else name)
            return op(*args, **options)

        return run

    for name in ("gram", "gram_layers", "gram_conv", "gram_embedding"):
        monkeypatch.setattr(ef.ops, name, counted(name, getattr(ef.ops, name)))
    return found


def mlp():
    return simple(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)), 6)


def convolution():
    return simple(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(36, 4), nn.Tanh(), nn.Linear(4, 3)), 2, 5, 5)


def shared():
    return simple(Via(lambda s, x: s.out(s.twice(s.twice(x).tanh())), twice=nn.Linear(6, 6), out=nn.Linear(6, 3)), 6)


def tied():  # one weight as a layer and as its transpose: no factored form
    return simple(Via(lambda s, x: s.out(s.into(x).tanh() @ s.into.weight), into=nn.Linear(6, 4), out=nn.Linear(6, 3)), 6)


def positions():
    return simple(Via(lambda s, x: s.out(s.into(x).tanh().mean(1)), into=nn.Linear(6, 4), out=nn.Linear(4, 3)), 5, 6)


def two_dtypes():
    net = Via(lambda s, x: s.out(s.b(s.a(x).float().tanh())), a=nn.Linear(6, 5), b=nn.Linear(5, 4), out=nn.Linear(4, 3))
    case = simple(net, 6)
    net.float().a.bfloat16()
    return Case(net, lambda n: {"x": case.batch(n)["x"].bfloat16()}, case.losses)


def partly_autocast():
    def forward(s, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = s.b(s.a(x).tanh())
        return s.out(y.float())

    case = simple(Via(forward, a=nn.Linear(6, 5), b=nn.Linear(5, 4), out=nn.Linear(4, 3)), 6)
    case.model.float()
    return Case(case.model, lambda n: {"x": case.batch(n)["x"].float()}, case.losses)


MODELS = {
    mlp: ["gram_layers of 3"],
    convolution: ["gram_conv", "gram_layers of 2"],
    shared: ["gram", "gram_layers of 1"],
    tied: ["gram_layers of 1"],
    positions: ["gram", "gram_layers of 1"],
    two_dtypes: ["gram_layers of 1", "gram_layers of 2"],
    partly_autocast: ["gram_layers of 1", "gram_layers of 2"],
}


@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_one_call_for_each_dtype_and_the_same_sum(make, calls):
    case = make()
    one, two = case.batch(4), case.batch(3)
    tape, other = tape_of(case, one), tape_of(case, two)
    found = tape.gram()
    assert sorted(calls) == MODELS[make]
    calls.clear()
    cross = tape.gram(other)
    assert sorted(calls) == MODELS[make]
    calls.clear()
    torch.testing.assert_close(found, tape_of(case, one, stream=("gram",)).gram())
    assert not any(c.startswith("gram_layers") for c in calls)  # a stream frees layer by layer
    g, h = flat(tape.per_sample()), flat(other.per_sample())
    for got, want in ((found, g @ g.T), (cross, g @ h.T)):
        exact = got.dtype == torch.float64
        close(got, want, 1e-12 if exact else 1e-2, make.__name__)


def test_one_position_against_many(calls):
    model = lively(nn.Linear(6, 3))
    tapes = []
    for shape in ((4, 6), (3, 5, 6)):
        with ef.capture(model) as tape:
            tape.backward(squares(model(torch.randn(shape, dtype=torch.float64))))
        tapes.append(tape)
    g, h = (flat(t.per_sample()) for t in tapes)
    torch.testing.assert_close(tapes[0].gram(tapes[1]), g @ h.T)
    torch.testing.assert_close(tapes[1].gram(tapes[0]), h @ g.T)
    assert calls == ["gram", "gram"]
