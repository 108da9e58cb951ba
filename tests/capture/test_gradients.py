"""What hooks and custom autograd.Functions do to gradients in the backward: exact where the samples stay apart, refused where not."""

import pytest
import torch
from oracle import agree
from torch import nn
from zoo import Via, lively, simple, squares

import entangle_fast as ef

N = 4
MIX = {
    "centred": lambda g: g - g.mean(0),
    "reversed": lambda g: g.flip(0),
    "one norm": lambda g: g / g.norm(),
    "one for all": lambda g: g[:1].expand_as(g),
    "transposed": lambda g: g[:, :N].T.contiguous() @ torch.eye(N, 5, dtype=g.dtype),
    "in place": lambda g: g.clone().sub_(g.sum(0)),
    "added up": lambda g: torch.einsum("ij,kj->kj", g, torch.ones_like(g)),
}
KEEP = {
    "as it is": lambda g: g,
    "negative": lambda g: -g,
    "clamped": lambda g: g.clamp(-0.1, 0.1),
    "each norm": lambda g: g / (1 + g.norm(dim=1, keepdim=True)),
    "frozen product": lambda g: g @ torch.linspace(-1, 1, 25, dtype=g.dtype).view(5, 5),
    "folded": lambda g: (g.reshape(-1) * 2).view_as(g),
    "written": lambda g: torch.zeros_like(g).copy_(g),
    "looked at": lambda g: g if g.isfinite().all() and g.abs().max() >= 0 else g * 0,
}


WRITES = {
    "in place": lambda g: g.sub_(g.mean(0)),
    "one row": lambda g: g[0].copy_(g.sum(0)),
    "through a view": lambda g: (v := g.view(-1)).sub_(v.mean()),
    "through .data": lambda g: g.data.sub_(g.data.mean(0)),
}


def function(change, outside=None):
    class Custom(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y=None):
            ctx.other = y is not None
            return x.sin()

        @staticmethod
        def backward(ctx, g):
            return change(g), g.sum(0) if ctx.other else None

    return lambda h: Custom.apply(h, outside) if outside is not None else Custom.apply(h)


def hooked(change):
    def forward(h):
        h = h.sin()
        h.register_hook(change)
        return h

    return forward


class Module(nn.Module):
    """A tanh with a full backward hook, or a backward pre-hook."""

    def __init__(self, change, pre=False):
        super().__init__()
        if pre:
            self.register_full_backward_pre_hook(lambda m, out: (change(out[0]),))
        else:
            self.register_full_backward_hook(lambda m, into, out: (change(into[0]),))

    def forward(self, h):
        return h.tanh()


WHERE = {
    "Function": (function, "autograd.Function Custom"),
    "hook": (hooked, "register_hook"),
    "module": (Module, "module Module"),
    "module before": (lambda change: Module(change, pre=True), "module Module"),
}


def model(middle, *, d=5):
    return Via(lambda s, x: s.b(s.middle(s.a(x))), a=nn.Linear(6, d), b=nn.Linear(d, 3), middle=middle)


@pytest.mark.parametrize("how", MIX)
@pytest.mark.parametrize("where", WHERE)
def test_samples_that_meet_are_refused(where, how):
    make, match = WHERE[where]
    net, x = lively(model(make(MIX[how]))), torch.randn(N, 6).double()
    with pytest.raises(ef.CaptureError, match=f"{match}.*strict=False"), ef.capture(net) as tape:
        tape.backward(squares(net(x)))
    with ef.capture(net, strict=False) as tape:
        tape.backward(squares(net(x)))


@pytest.mark.parametrize("how", WRITES)
@pytest.mark.parametrize("where", ["hook", "module", "module before"])
def test_hooks_that_return_nothing_but_write_are_refused(where, how):
    def silent(module, *grads):
        WRITES[how](grads[0][0])

    if where == "hook":
        middle = hooked(lambda g: silent(None, (g,)))
    else:
        middle = nn.Tanh()
        (middle.register_full_backward_hook if where == "module" else middle.register_full_backward_pre_hook)(silent)
    net, x = lively(model(middle)), torch.randn(N, 6).double()
    with pytest.raises(ef.CaptureError, match=f"{WHERE[where][1].replace('Module', 'Tanh')}.*strict=False"), ef.capture(net) as tape:
        tape.backward(squares(net(x)))


def test_hooks_that_return_nothing_but_scale_in_place_are_exact():
    def halve(g):
        g.view(-1).mul_(0.5)

    agree(simple(model(hooked(halve)), 6))


@pytest.mark.parametrize("how", ["centred", "reversed", "one for all", "turned"])
def test_samples_that_meet_between_tensors_that_are_gone(how):
    """As many features as samples, and neither what went into the Function nor what came out is alive in the backward."""
    middle = function({**MIX, "turned": lambda g: g.T}[how])
    net, x = lively(model(lambda h: middle(h.tanh()).tanh() * 1.5, d=N)), torch.randn(N, 6).double()
    with pytest.raises(ef.CaptureError, match="autograd.Function Custom"), ef.capture(net) as tape:
        tape.backward(squares(net(x)))


@pytest.mark.parametrize("how", KEEP)
def test_samples_that_stay_apart_between_tensors_that_are_gone(how):
    change = KEEP[how] if how != "frozen product" else lambda g: g @ torch.linspace(-1, 1, N * N, dtype=g.dtype).view(N, N)
    middle = function(change)
    agree(simple(model(lambda h: middle(h.tanh()).tanh() * 1.5, d=N), 6))


@pytest.mark.parametrize("how", KEEP)
@pytest.mark.parametrize("where", WHERE)
def test_samples_that_stay_apart_are_exact(where, how):
    agree(simple(model(WHERE[where][0](KEEP[how])), 6))


@pytest.mark.parametrize("n", [1, N])
def test_hooks_that_only_look(n):
    seen = []
    net = model(nn.Tanh())
    net.middle.register_full_backward_hook(lambda m, into, out: seen.append(into[0].mean()))
    net.b.register_full_backward_pre_hook(lambda m, out: seen.append(out[0].norm()))

    def look(m, args, y):
        y.register_hook(lambda g: seen.append(g.sum(0)))

    net.register_forward_hook(look)
    agree(simple(net, 6, n=n))
    assert seen


def test_one_sample_meets_nobody():
    agree(simple(model(function(MIX["centred"])), 6, n=1, m=1))


def test_the_gradient_of_what_is_not_captured_may_add_up_samples():
    frozen = torch.ones(5, dtype=torch.float64, requires_grad=True) * 2
    agree(simple(model(function(KEEP["negative"], frozen)), 6))


def test_hooks_on_a_module_behind_as_many_positions_as_samples():
    """Its hook gives the module's input another name: where the samples are in it must not be guessed."""
    def forward(s, x):
        return s.b(s.a(x).transpose(0, 1)).transpose(0, 1)

    net = Via(forward, a=nn.Linear(6, 5), b=nn.Linear(5, 3))
    net.b.register_full_backward_hook(lambda m, into, out: None)
    agree(simple(net, N, 6, n=N))


def test_a_function_before_all_captured_parameters():
    x = torch.randn(N, 6, requires_grad=True)
    net = model(function(MIX["centred"])).requires_grad_(False)
    net.b.requires_grad_(True)
    with ef.capture(net) as tape:
        y = net(x)
        tape.backward(squares(y))
    assert tape.gram().isfinite().all()
