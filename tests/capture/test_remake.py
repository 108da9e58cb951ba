"""Inputs that are made again instead of kept: gone after the forward, the same bits in the factor, kept where they must be."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import entangle_fast as ef
from entangle_fast.capture import remake

N, D = 5, 8
NORM = torch.nn.LayerNorm(D, dtype=torch.float64)

PRODUCERS = {
    "gelu": F.gelu,
    "gelu, tanh": lambda u: F.gelu(u, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "gate": lambda u: F.silu(u) * u.sin(),
    "layer_norm": NORM,
}


def weights():
    torch.manual_seed(0)
    return {k: torch.randn(D, D, dtype=torch.float64, requires_grad=True) for k in ("first", "second", "third")}


def by_autograd(w, losses):
    grads = [torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(w.values()), retain_graph=True)]) for loss in losses]
    grads = torch.stack(grads)
    return grads @ grads.T


def run(w, produce, x, between=lambda h: h):
    """linear → produce → two linears; the losses, and a weak reference to what was produced."""
    h = produce(F.linear(x, w["first"]))
    ref = weakref.ref(h)
    h = between(h)
    out = (F.linear(h, w["second"]) + F.linear(h, w["third"]).tanh()).square().sum((1, 2))
    return out, ref


@pytest.mark.parametrize("name", PRODUCERS)
def test_not_kept_and_exact(name):
    w, x = weights(), torch.randn(N, 3, D, dtype=torch.float64)
    named = {**w, **(dict(NORM.named_parameters()) if name == "layer_norm" else {})}
    with ef.capture(named, batch_size=N) as tape:
        losses, ref = run(w, PRODUCERS[name], x)
        assert ref() is None
        tape.backward(losses)
    torch.testing.assert_close(tape.gram(), by_autograd(named, run(w, PRODUCERS[name], x)[0]), rtol=1e-11, atol=1e-11)


def test_it_is_kept_where_nothing_can_make_it_again(monkeypatch):
    monkeypatch.setattr(remake, "_MAKERS", {})
    w = weights()
    with ef.capture(w, batch_size=N):
        losses, ref = run(w, F.gelu, torch.randn(N, 3, D, dtype=torch.float64))
        assert ref() is not None


def test_a_small_one_is_kept(monkeypatch):
    x = torch.randn(N, 3, D, dtype=torch.float64)
    monkeypatch.setattr(remake, "_SMALL", x.nbytes)
    w = weights()
    with ef.capture(w, batch_size=N):
        losses, ref = run(w, F.gelu, x)
        assert ref() is not None


def test_layers_that_share_an_input_share_what_is_made_again():
    w = weights()
    with ef.capture(w, batch_size=N) as tape:
        losses, _ = run(w, F.gelu, torch.randn(N, 3, D, dtype=torch.float64))
        tape.backward(losses)
    second, third = ([f.a for s, f in tape._recorder.uses if list(w)[s.params[0]] == name][0] for name in ("second", "third"))
    assert second.data_ptr() == third.data_ptr()


def double(h):
    with torch.no_grad():
        return h.mul_(2)


def halve_negatives(h):
    h.data[h.data < 0] *= 0.5
    return h


def through_numpy(h):
    h.detach().numpy()[:] *= 3
    return h


def replace(h):
    h.data = h.data + 1
    return h


@pytest.mark.parametrize("between", [double, halve_negatives, through_numpy, replace, lambda h: h * 2, lambda h: 2 * h.view(N, 3, D)])
def test_changed_behind_autograd_or_by_a_constant(between):
    w, x = weights(), torch.randn(N, 3, D, dtype=torch.float64)
    with ef.capture(w, batch_size=N) as tape:
        losses, _ = run(w, F.gelu, x, between)
        tape.backward(losses)
    torch.testing.assert_close(tape.gram(), by_autograd(w, run(w, F.gelu, x, between)[0]), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("exposed", ["input", "output"])
@pytest.mark.parametrize("expose", [lambda h: h.data, lambda h: torch.from_numpy(h.detach().numpy())])
@pytest.mark.parametrize("name", PRODUCERS)
def test_changed_behind_autograd_after_the_layer(name, expose, exposed):
    w, x = weights(), torch.randn(N, 3, D, dtype=torch.float64)

    def losses():
        u = F.linear(x, w["first"])
        h = PRODUCERS[name](u)
        out = (F.linear(h, w["second"]) + F.linear(h, w["third"]).tanh()).square().sum((1, 2))
        expose(u if exposed == "input" else h).mul_(3)
        return out

    with ef.capture(w, batch_size=N) as tape:
        tape.backward(losses())
    torch.testing.assert_close(tape.gram(), by_autograd(w, losses()), rtol=1e-11, atol=1e-11)


class _LayerNorm(torch.autograd.Function):
    """A user's own, of the same name as the library's."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


def test_another_function_of_the_same_name():
    w, x = weights(), torch.randn(N, 3, D, dtype=torch.float64)
    with ef.capture(w, batch_size=N) as tape:
        losses, _ = run(w, _LayerNorm.apply, x)
        tape.backward(losses)
    torch.testing.assert_close(tape.gram(), by_autograd(w, run(w, _LayerNorm.apply, x)[0]), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("stream", [(), ("gram",)])
def test_under_checkpointing_nothing_is_asked_for_twice(stream):
    w, x = weights(), torch.randn(N, 3, D, dtype=torch.float64)
    produce = lambda u: checkpoint(F.gelu, u, use_reentrant=False)  # noqa: E731
    with ef.capture(w, batch_size=N) as tape:
        losses, _ = run(w, produce, x)
        tape.backward(losses, stream=stream)
    torch.testing.assert_close(tape.gram(), by_autograd(w, run(w, F.gelu, x)[0]), rtol=1e-11, atol=1e-11)
