"""Samples that meet, change places or leave capture's sight: refused by name, or exact; never silent."""

import pytest
import torch
import torch.nn.functional as F
from oracle import Case, agree, flat, per_sample, tape_of
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo import Via, lively, simple, squares, weight

import entangle_fast as ef


def centre(h):
    return h - h.mean(0)


class Centre(torch.autograd.Function):
    """Its samples meet where nothing requires a gradient."""

    @staticmethod
    def forward(ctx, x):
        return centre(x * 1)

    @staticmethod
    def backward(ctx, g):
        return centre(g)


class Negative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -g


def written(write):
    def forward(h):
        z = torch.zeros_like(h)
        write(z, h)
        return z

    return forward


def swap_halves(z, h):
    z[:2].copy_(h[2:])
    z[2:].copy_(h[:2])


def on_itself(write):
    def forward(h):
        write(h)
        return h

    return forward


MIXED = {
    "cat": lambda h: torch.cat([h[2:], h[:2]]),
    "split": lambda h: torch.cat(h.split([1, 3])[::-1]),
    "pairs": lambda h: torch.cat([h[:2] * h[2:], h[:2] - h[2:]]),
    "mask": lambda h: torch.cat([h[h[:, 0] > 0], h[h[:, 0] <= 0]]),
    "take": lambda h: torch.take(h, torch.arange(20).flip(0).view(4, 5)),
    "vstack": lambda h: torch.vstack([h[1:], h[:1]]),
    "vsplit": lambda h: torch.cat(torch.vsplit(h, 2)[::-1]),
    "cdist": lambda h: torch.cdist(h, h),
    "cov": torch.cov,
    "flipud": torch.flipud,
    "rot90": lambda h: torch.rot90(h, 2, (0, 1)),
    "msort": torch.msort,
    "fft": lambda h: torch.fft.fft(h, dim=0).abs(),
    "fft2": lambda h: torch.fft.fft2(h).abs(),
    "renorm": lambda h: torch.renorm(h, 1, 1, 0.5),
    "as_strided": lambda h: h.as_strided((4, 5), (1, 4)),
    "qr": lambda h: torch.linalg.qr(h)[0],
    "vector_norm": lambda h: torch.linalg.vector_norm(h[:, :4], dim=0)[:, None],
    "quantile": lambda h: torch.quantile(h[:, :4], 0.5, dim=0)[:, None],
    "tensordot": lambda h: torch.tensordot(h, h, dims=([1], [1])),
    "attention": lambda h: F.scaled_dot_product_attention(h, h, h),
    "pooling": lambda h: F.max_pool2d(h[None], 3, 1, 1)[0],
    "circular": lambda h: F.pad(h[None, None], (0, 0, 1, 1), mode="circular")[0, 0, :4],
    "frozen_convolution": lambda h: F.conv1d(h, torch.ones(4, 4, 3, dtype=h.dtype), padding=1),
    "inner": lambda h: torch.inner(torch.ones(4, 5, dtype=h.dtype), h)[:, :4].T @ h,
    "addbmm": lambda h: torch.addbmm(torch.zeros(5, 4, dtype=h.dtype), h[:, :, None], h[:, None, :4]).T,
    "function": Centre.apply,
    "index_put": lambda h: torch.zeros_like(h).index_put((torch.arange(4).flip(0),), h),
    "part_by_part": written(swap_halves),
    "transposed": written(lambda z, h: z[:, :4].T.copy_(h[:, :4])),
    "neighbour": on_itself(lambda h: h[1:].add_(h[:-1].clone())),
    "flat_view": on_itself(lambda h: h.view(-1).add_(h.clone().mean())),
    "one_row": on_itself(lambda h: h[0].mul_(h[1].clone())),
}


@pytest.mark.parametrize("then", ["loss", "layer"])
@pytest.mark.parametrize("name", MIXED)
def test_refused(name, then):
    model = lively(Via(lambda s, x: MIXED[name](s.a(x)), a=nn.Linear(6, 5), gain=weight(1)))
    with pytest.raises(ef.CaptureError, match="sample"), ef.capture(model) as tape:
        y = model(torch.randn(4, 6).double())
        tape.backward(squares(y * model.gain if then == "layer" else y))


def test_strides_of_ones_own_are_not_taken_to_keep_samples_apart():
    model = lively(Via(lambda s, x: s.a(x).as_strided((4, 4), (1, 5)), a=nn.Linear(6, 5)))
    with pytest.raises(ef.CaptureError, match="as_strided"), ef.capture(model, strict=False) as tape:
        tape.backward(squares(model(torch.randn(4, 6).double())))


@pytest.mark.parametrize("forward", [
    lambda s, x: F.linear(x, s.w.expand(4, 6)), lambda s, x: F.linear(x, s.w.repeat(4, 1)),
])  # fmt: skip
def test_a_weight_of_as_many_equal_rows_as_samples(forward):
    model = lively(Via(forward, w=weight(1, 6)))
    with pytest.raises(ef.CaptureError, match="weight"), ef.capture(model) as tape:
        tape.backward(squares(model(torch.randn(4, 6).double())))


def test_recurrence_over_the_samples():
    model = lively(Via(lambda s, x: s.r(s.a(x))[0], a=nn.Linear(6, 6), r=nn.LSTM(6, 4).requires_grad_(False)))
    with pytest.raises(ef.CaptureError, match="positions"), ef.capture(model) as tape:
        tape.backward(squares(model(torch.randn(4, 4, 6).double())))


def column_by_column(h):
    z = torch.zeros(len(h), 2, 5, dtype=h.dtype)
    z[:, 0].copy_(h)
    z[:, 1].copy_(h.sin())
    return z


def row_by_row(h):
    z = torch.zeros(2, len(h), 5, dtype=h.dtype)
    z[0].copy_(h)
    z[1].copy_(h.sin())
    return z.transpose(0, 1)


KEPT = {
    "columns": column_by_column,
    "rows": row_by_row,
    "part_scaled": on_itself(lambda h: h[:, 1:].mul_(2)),
    "row_scaled": on_itself(lambda h: h[0].mul_(2)),
    "part_rectified": on_itself(lambda h: h[:, 1:].relu_()),
    "fft": lambda h: torch.fft.rfft(h).abs(),
    "norm": lambda h: torch.linalg.vector_norm(h.view(-1, 5, 1) + h[:, None], dim=1),
    "inverse": lambda h: torch.linalg.inv(h[:, :, None] * h[:, None] + 9 * torch.eye(5, dtype=h.dtype)),
    "stacks": lambda h: torch.hstack([torch.dstack([h, h.sin()])[:, :, 1], torch.column_stack([h, h])]),
    "distances": lambda h: torch.cdist(h, torch.ones(3, 5, dtype=h.dtype)),
    "renorm": lambda h: torch.renorm(h, 2, 0, 0.5),
    "inner": lambda h: torch.inner(torch.ones(4, 5, dtype=h.dtype), h[:, None])[:, :, 0].T,
    "negative": Negative.apply,
}


@pytest.mark.parametrize("name", KEPT)
def test_exact(name):
    agree(simple(Via(lambda s, x: KEPT[name](s.a(x)), a=nn.Linear(6, 5)), 6))


def test_the_general_path_is_checked_against_the_batch():
    def case(forward):
        return simple(Via(forward, w=weight(5, 6)), 6, options={"strict": False})

    agree(case(lambda s, x: torch.tensordot(x, s.w, dims=([1], [1])).sin()))
    with pytest.raises(ef.CaptureError, match="other values"):
        agree(case(lambda s, x: torch.addbmm(s.w, x[:, :5, None], x[:, None])[:4]))


def saliency(s, x):
    x = x.detach().requires_grad_()
    y = s.b(s.a(x).tanh())
    (g,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
    return y * g.sum(1, keepdim=True)


def penalty(s, x):
    x = x.detach().requires_grad_()
    y = s.b(s.a(x).tanh())
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return y * g.square().sum(1, keepdim=True)


def own_backward(s, x):
    s.b(s.a(x)).sum().backward()
    return s.b(s.a(x))


def test_gradients_that_the_model_takes_itself():
    layers = dict(a=nn.Linear(6, 5), b=nn.Linear(5, 3))
    agree(simple(Via(saliency, **layers), 6))
    for forward, why in ((penalty, "gradient of a gradient"), (own_backward, "not the tape's")):
        with pytest.raises(ef.CaptureError, match=why):
            agree(simple(Via(forward, **layers), 6))


SEEDS = {"": {}, "seeds": dict(grad_outputs=torch.ones(4, 6).double().cumsum(1)), "materialized": dict(materialize_grads=True)}


@pytest.mark.parametrize("stream", [(), ("sqnorms",)])
@pytest.mark.parametrize("name", SEEDS)
def test_gradients_that_a_checkpointed_model_takes_itself(name, stream):
    """Torch compares shapes only, and its own linear layer keeps a square weight the other way round than capture's does."""
    def forward(s, x):
        x, aside = x.detach().requires_grad_(), torch.ones(6, dtype=x.dtype, requires_grad=True)
        y = checkpoint(lambda x: s.a(x).tanh(), x, use_reentrant=False)
        (g, none) = torch.autograd.grad(y if name == "seeds" else y.square().sum(), (x, aside), retain_graph=True, allow_unused=True,
                                        **SEEDS[name])  # fmt: skip
        assert torch.equal(none, torch.zeros(6)) if name == "materialized" else none is None
        return y * g.sum(1, keepdim=True)

    case = simple(Via(forward, a=nn.Linear(6, 6)), 6)
    batch = case.batch(4)
    want = flat(per_sample(case, batch)).square().sum(1)
    torch.testing.assert_close(tape_of(case, batch, stream=stream).sqnorms(), want)


def test_gradients_of_a_checkpointed_model_by_batches_of_seeds():
    def forward(s, x):
        y = checkpoint(s.a, x.requires_grad_(), use_reentrant=False)
        return y + torch.autograd.grad(y, x, torch.ones(2, *y.shape).double(), retain_graph=True, is_grads_batched=True)[0][0]

    with pytest.raises(ef.CaptureError, match="is_grads_batched=True.: capture has no rule for it under activation checkpointing; ask"):
        agree(simple(Via(forward, a=nn.Linear(6, 6)), 6))


@pytest.mark.parametrize("t", [(), (4,)])
def test_the_library_s_own_losses(t):
    def losses(net, b):
        return ef.ops.sample_loss(net(b["x"]), torch.zeros(len(b["x"]), *t, dtype=torch.long))

    agree(Case(nn.Linear(6, 3).double(), lambda n: {"x": torch.randn(n, *t, 6).double()}, losses))


def test_hooks_on_weight_gradients_are_refused():
    model = nn.Linear(6, 5).double()
    handle = model.weight.register_hook(lambda g: g.clamp(-1, 1))
    with pytest.raises(ef.CaptureError, match="'weight'.*hook"), ef.capture(model):
        pass
    handle.remove()


def test_hooks_on_what_is_made_of_weights_may_only_look():
    def forward(s, x):
        w = s.w.t().t()
        w.register_hook(s.hook)
        return F.linear(x, w)

    case = simple(Via(forward, w=weight(5, 6)), 6)
    case.model.hook = lambda g: None
    agree(case)
    case.model.hook = lambda g: g.clamp(-1, 1)
    for question in (lambda t: t.gram(), lambda t: t.sqnorms(), lambda t: t.combine(torch.ones(4).double())):
        with pytest.raises(ef.CaptureError, match="'w'.*hook"), ef.capture(case.model) as tape:
            tape.backward(squares(case.model(torch.randn(4, 6).double())))
            question(tape)


def test_complex_parameters_are_refused():
    p = {"w": torch.randn(3, 6, dtype=torch.complex128, requires_grad=True)}
    with pytest.raises(ef.CaptureError, match="'w': complex"):
        agree(Case(p, lambda n: {"x": torch.randn(n, 6).double()}, lambda p, b: F.linear(b["x"].cdouble(), p["w"]).abs().sum(1)))


def test_indices_that_count_from_the_end_and_a_weight_of_one_row():
    agree(simple(Via(lambda s, x: s.w[(x > 0).long() - 2], w=weight(4, 3)), 6))
    agree(simple(Via(lambda s, x: F.linear(x, s.w)[:, None], w=weight(6)), 6))


@torch.library.custom_op("entangle_fast_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    """Another library's operation: elementwise, but who knows."""
    return 2 * x


twice.register_autograd(lambda ctx, g: 2 * g)


def test_another_librarys_operation_needs_a_word_from_the_user():
    model, x = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh()).double(), torch.randn(5, 3).double()
    with ef.capture(model) as tape, pytest.raises(ef.CaptureError, match="twice.*not known to keep the samples apart.*strict=False"):
        tape.backward(twice(model(x)).square().sum(1))
    with ef.capture(model, strict=False) as tape:
        tape.backward(twice(model(x)).square().sum(1))
    with ef.capture(model) as plain:
        plain.backward((2 * model(x)).square().sum(1))
    torch.testing.assert_close(tape.gram(), plain.gram(), rtol=1e-12, atol=1e-12)
