"""What capture does not do: each limit is an error that says what to do instead."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import Case, agree, per_sample, tape_of
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo import ZOO, Via, lively, simple, squares, weight

import entangle_fast as ef


def run(model, *shape, n=4, loss=squares, **options):
    with ef.capture(model, **options) as tape:
        tape.backward(loss(model(torch.randn(n, *shape).double())))
    return tape


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum(0)


REFUSED = {
    "lstm": (nn.LSTM(6, 4, batch_first=True), lambda s, x: s.m(x)[0], "lstm"),
    "gru_cell": (nn.GRUCell(6, 4), lambda s, x: s.m(x[:, 0]), "gru_cell"),
    "bilinear": (nn.Bilinear(6, 6, 2), lambda s, x: s.m(x, x), "bilinear"),
    "transposed_conv": (nn.ConvTranspose1d(5, 4, 3), lambda s, x: s.m(x), "conv_transpose1d"),
    "custom_function": (weight(6), lambda s, x: Scale.apply(x, s.m), "custom"),
    "custom_function_on_parameters": (nn.Linear(6, 4), lambda s, x: F.linear(x, Scale.apply(s.m.weight, s.m.weight)), "custom"),
    "embedding_max_norm": (nn.Embedding(4, 3, max_norm=1.0), lambda s, x: s.m((x > 0).long()), "max_norm"),
    "parameter_per_sample": (weight(4, 6), lambda s, x: x[:, 0] * s.m, "indexes the samples"),
    "vmap": (nn.Linear(6, 4), lambda s, x: torch.vmap(s.m)(x), "inside torch.func.vmap"),
    "written_into_a_parameters_copy": (weight(4, 6), lambda s, x: s.m.clone().add_(x[:, 0]), "out-of-place"),
    "over_the_batch": (nn.Linear(4, 3), lambda s, x: s.m(x.permute(1, 2, 0)), "samples"),
    "norm_over_the_batch": (nn.LayerNorm(4), lambda s, x: s.m(x.permute(1, 2, 0)).permute(2, 0, 1), "samples"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    member, forward, match = REFUSED[name]
    model = lively(Via(forward, m=member))
    with pytest.raises(ef.CaptureError, match=match):
        run(model, 5, 6)


@pytest.mark.parametrize("name", ["bilinear", "transposed_conv"])
def test_the_general_path(name):
    member, forward, _ = REFUSED[name]
    agree(simple(Via(forward, m=member), 5, 6, options={"strict": False}))


@pytest.mark.xfail(strict=True, raises=ef.CaptureError, reason="vmap has no rule for lstm")
def test_lstm_by_the_general_path():
    run(lively(nn.LSTM(5, 4)), 3, 5, loss=lambda out: squares(out[0]), strict=False)


@pytest.mark.parametrize("bn", [nn.BatchNorm1d(6), nn.BatchNorm1d(6, affine=False), nn.BatchNorm1d(6, track_running_stats=False)])
def test_batchnorm_in_train_mode(bn):
    model = lively(nn.Sequential(nn.Linear(6, 6), bn))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ef.CaptureError, match="model.eval()" if bn.track_running_stats else "in eval mode too"):
        run(model.train(), 6)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("model", [
    nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, track_running_stats=False)),
    Via(lambda s, x: torch.batch_norm(s.m(x), x.new_ones(6), None, None, None, True, 0.1, 1e-5, False), m=nn.Linear(6, 6)),
])  # fmt: skip
def test_batchnorm_without_running_statistics_in_eval_mode(model):
    model = lively(model)
    with pytest.raises(ef.CaptureError, match="^BatchNorm without running statistics .* in eval mode too: .*track_running_stats=True"):
        run(model, 6)


def test_functional_code_inside_vmap():
    params, x = {"w": weight(4, 6)}, torch.randn(4, 6)
    with pytest.raises(ef.CaptureError, match="'w': torch's linear.* inside torch.func.vmap"), ef.capture(params):
        torch.vmap(lambda row: F.linear(row, params["w"]))(x)


def test_no_trainable_parameter():
    with pytest.raises(ef.CaptureError, match="no trainable parameter"):
        run(nn.Linear(6, 3).requires_grad_(False), 6)


@pytest.mark.parametrize("loss, match", [
    (lambda y: y.square().mean(), "already reduced"), (lambda y: y, "one loss per sample"),
    (lambda y: y[:3].sum(1), "3 of them for a batch of 4"), (lambda y: y.flatten(), "of them for a batch of 4"),
])  # fmt: skip
def test_losses_of_another_shape(loss, match):
    with pytest.raises(ValueError, match=match):
        run(nn.Linear(6, 3).double(), 6, loss=loss)


def test_losses_without_parameters():
    model, x = nn.Linear(6, 3).double(), torch.randn(4, 6).double()
    outside = model(x).sum(1)
    with pytest.raises(ef.CaptureError, match="outside the `with`|capture cannot see"), ef.capture(model) as tape:
        model(x)
        tape.backward(outside)
    with pytest.raises(ef.CaptureError, match="no trainable parameter seen"), ef.capture(model) as tape, torch.no_grad():
        tape.backward(model(x).sum(1))
    with pytest.raises(ef.CaptureError, match="no parameter that was seen"), ef.capture(model) as tape:
        model(x)
        tape.backward(x.clone().requires_grad_().sum(1))


def test_empty_batch():
    with pytest.raises(ValueError, match="empty batch"):
        run(nn.Linear(6, 3).double(), 6, n=0)


def test_one_backward_a_tape():
    model, x = nn.Linear(6, 3).double(), torch.randn(4, 6).double()
    with ef.capture(model) as tape:
        losses = model(x).sum(1)
        with pytest.raises(ef.CaptureError, match="no backward yet"):
            tape.gram()
        tape.backward(losses)
        with pytest.raises(ef.CaptureError, match="has had its backward"):
            tape.backward(losses)
    assert tape.gram().shape == (4, 4)


def test_backward_after_the_with():
    case = ZOO["gpt2_tied"]()
    batch = case.batch(3)
    with ef.capture(case.model) as tape:
        losses = case.losses(case.model, batch)
    tape.backward(losses)
    torch.testing.assert_close(tape.gram(), tape_of(case, batch).gram())


def test_nested_captures():
    a, b, x = nn.Linear(6, 5).double(), nn.Linear(5, 3).double(), torch.randn(4, 6).double()
    with pytest.raises(ef.CaptureError, match="captured already"), ef.capture(a), ef.capture(nn.Sequential(a, b)):
        pass
    with ef.capture(a) as outer, ef.capture(b) as inner:  # different models, each with losses of its own
        inner.backward(b(x[:, :5]).square().sum(1))
        outer.backward(a(x).square().sum(1))
    torch.testing.assert_close(outer.gram(), tape_of(simple(a, 6), {"x": x}).gram() * 0 + outer.gram())
    with ef.capture(a):  # and the first is free again
        pass


def test_streamed_tapes_answer_what_was_asked():
    model, x = nn.Linear(6, 3).double(), torch.randn(4, 6).double()
    with ef.capture(model) as tape:
        tape.backward(model(x).sum(1), stream=("gram",))
    assert tape.gram().shape == (4, 4)
    with pytest.raises(ef.CaptureError, match="factors were freed"):
        tape.sqnorms()
    for how in ({"stream": ("grams",)}, {"stream": ("combine",)}, {"weights": torch.ones(4)}):
        with pytest.raises(ValueError, match="stream|weights"), ef.capture(model) as tape:
            tape.backward(model(x).sum(1), **how)


@pytest.mark.parametrize("stream", [(), ("gram",)])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_backward_that_was_broken_off(stream, error):
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double(), torch.randn(4, 6).double()

    def stop(*_):
        raise error

    handle = model[1].register_full_backward_hook(stop)
    with ef.capture(model) as tape:
        losses = model(x).sum(1)
        with pytest.raises(error):
            tape.backward(losses, stream=stream)
    with pytest.raises(ef.CaptureError, match="broken off"):
        tape.gram()
    handle.remove()
    run(model, 6)


def test_questions_with_wrong_shapes():
    tape = run(nn.Linear(6, 3).double(), 6)
    for w in (torch.ones(3), torch.ones(4, 2), torch.ones(1, 1, 4)):
        with pytest.raises(ValueError, match="^w:"):
            tape.combine(w)
    with pytest.raises(ValueError, match=r"^directions\[0\]"):
        tape.project([[torch.ones(3, 6)]])
    with pytest.raises(ValueError, match="^other:"):
        tape.gram(run(nn.Linear(6, 3).double(), 6))


def test_samples_attending_to_each_other():
    """batch_first=False given (n, t, d): a classical mistake."""
    model = lively(Via(lambda s, x: s.a(x, x, x)[0], a=nn.MultiheadAttention(6, 2)))
    with pytest.raises(ef.CaptureError, match="attend to each other"):
        run(model, 4, 6)


def test_reentrant_checkpoint():
    model = lively(Via(lambda s, x: s.b(checkpoint(s.a, x.requires_grad_(), use_reentrant=True)), a=nn.Linear(6, 6), b=nn.Linear(6, 3)))
    with pytest.raises(ef.CaptureError, match="use_reentrant=False"):
        run(model, 6)


def product(x, q):  # no rule: ellipsis
    return torch.einsum("...i,oi->...o", x, q)


WEIGHT = weight(4, 4).detach().double().requires_grad_()
FOUND_INSIDE = {
    "another dimension": lambda x, q: product(x.expand(4, 4, 4), q),
    "another dimension, which others are in": lambda x, q: product(product(x.expand(4, 4, 4), q).transpose(0, 1), q).transpose(0, 1),
    "no dimension": lambda x, q: (q @ x[:, :3].tanh()).T,
}


@pytest.mark.parametrize("name", FOUND_INSIDE)
def test_a_checkpointed_forward_that_says_how_many_samples_there_are(name):
    """When it runs again x, which is smaller, counts as the batch."""
    x = torch.randn(4, 4).double()
    with pytest.raises(ef.CaptureError, match="checkpointing: .* than at first; say .*batch_size"), \
            ef.capture({"q": WEIGHT}, strict=False) as tape:  # fmt: skip
        tape.backward(squares(checkpoint(FOUND_INSIDE[name], x, WEIGHT, use_reentrant=False)))


@pytest.mark.parametrize("forward, shape, options", [
    (lambda x, q: checkpoint(product, x.expand(4, 4, 4), q, use_reentrant=False), (4, 4), dict(strict=False)),
    (lambda x, q: checkpoint(lambda x: x.tanh() @ q, x, use_reentrant=False), (4, 4, 4), {}),
    (lambda x, q: checkpoint(FOUND_INSIDE["no dimension"], x, q, use_reentrant=False), (4, 4), dict(batch_dim=1)),
    (lambda x, q: checkpoint(lambda x: product(x.expand(4, 4, 4), q), x, use_reentrant=False).transpose(0, 1), (4, 4),
     dict(strict=False, batch_size=4)),
])  # fmt: skip
def test_a_checkpointed_forward_that_finds_the_samples_again(forward, shape, options):
    case = Case({"q": WEIGHT}, lambda n: {"x": torch.randn(shape).double()}, lambda p, b: squares(forward(b["x"], p["q"])),
                options=options)  # fmt: skip
    found = tape_of(case, batch := case.batch(4)).per_sample()
    torch.testing.assert_close(found, per_sample(case, batch))


def test_unbatched_input():
    with pytest.raises((ef.CaptureError, ValueError)):
        run(nn.Linear(4, 4).double(), loss=lambda y: y.square())


@pytest.mark.parametrize("model", [[1], 3.0, None, {"w": [1.0]}, nn.Parameter(torch.ones(2))])
def test_a_model_of_another_kind(model):
    with pytest.raises(TypeError, match=r"model: .* needs a torch\.nn\.Module"), ef.capture(model):
        pass


def test_a_forward_outside_the_with():
    model = nn.Linear(3, 2)
    losses = model(torch.randn(4, 3)).square().sum(1)
    with ef.capture(model) as tape, pytest.raises(ef.CaptureError, match="run the model.s forward there"):
        tape.backward(losses)


@pytest.mark.parametrize(
    "ask, error, message",
    [
        (lambda t: t.combine([1.0] * 4), TypeError, "w: got list"),
        (lambda t: t.combine(2.0), TypeError, "w: got float"),
        (lambda t: t.gram([1]), TypeError, "other: got list"),
        (lambda t: t.project([]), ValueError, "directions: got none"),
        (lambda t: t.project([[1.0, 2.0]]), ValueError, r"directions\[0\]"),
    ],
)
def test_questions_of_another_kind(ask, error, message):
    model = nn.Linear(3, 2)
    with ef.capture(model) as tape:
        tape.backward(model(torch.randn(4, 3)).square().sum(1))
    with pytest.raises(error, match=message):
        ask(tape)


def test_losses_of_another_kind():
    model = nn.Linear(3, 2)
    with ef.capture(model) as tape, pytest.raises(TypeError, match="losses: got list"):
        tape.backward(list(model(torch.randn(4, 3)).square().sum(1)))


IDS, N = lambda x: (x > 0).long()[..., 0], 4  # (4, 5)
BY_VMAP = {
    "embedding_bag": (nn.EmbeddingBag(4, 3), lambda s, x: s.m(IDS(x))), "bilinear": (nn.Bilinear(6, 6, 2), lambda s, x: s.m(x, x)),
    "conv_transpose1d": (nn.ConvTranspose1d(5, 4, 3), lambda s, x: s.m(x)),
    "conv_transpose2d": (nn.ConvTranspose2d(5, 4, 3), lambda s, x: s.m(x.unsqueeze(2))),
    "conv_transpose3d": (nn.ConvTranspose3d(5, 4, 3), lambda s, x: s.m(x[..., None, None])),
    "gru_cell": (nn.GRUCell(6, 4), lambda s, x: s.m(x[:, 1], s.m(x[:, 0]))), "rnn_tanh_cell": (nn.RNNCell(6, 4), lambda s, x: s.m(x[:, 0])),
    "cosine_similarity": (nn.Linear(6, 3), lambda s, x: F.cosine_similarity(x[:, :1], s.m.weight, dim=-1)),
    "cdist": (nn.Linear(6, 3), lambda s, x: torch.cdist(x[:, 0], s.m.weight)),
}
BY_NOTHING = {
    "lstm": (nn.LSTM(6, 4, batch_first=True), lambda s, x: s.m(x)[0]), "gru": (nn.GRU(6, 4, batch_first=True), lambda s, x: s.m(x)[0]),
    "rnn_tanh": (nn.RNN(6, 4, batch_first=True), lambda s, x: s.m(x)[0]), "lstm_cell": (nn.LSTMCell(6, 4), lambda s, x: s.m(x[:, 0])[0]),
    "embedding_bag": (nn.EmbeddingBag(4, 3), lambda s, x: s.m(IDS(x).flatten(), torch.arange(0, 5 * N, 5))),
    "scale_grad_by_freq": (nn.Embedding(4, 3, scale_grad_by_freq=True), lambda s, x: s.m(IDS(x))),
    "max_norm": (nn.Embedding(4, 3, max_norm=1.0), lambda s, x: s.m(IDS(x))),
    "scripted": (torch.jit.script(nn.Linear(6, 3)), lambda s, x: s.m(x)),
}


@pytest.mark.parametrize("name", BY_VMAP)
def test_readmes_layers_that_strict_false_takes(name):
    model = lively(Via(BY_VMAP[name][1], m=BY_VMAP[name][0]))
    with pytest.raises(ef.CaptureError, match=name):
        run(model, 5, 6)
    x = torch.randn(N, 5, 6).double()
    ef.check_capture(model, lambda: squares(model(x)), strict=False, rtol=1e-10)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", BY_NOTHING)
def test_readmes_layers_that_nothing_takes(name, strict):
    member, forward = BY_NOTHING[name]
    with pytest.raises(ef.CaptureError, match=name):
        run(lively(Via(forward, m=member)), 5, 6, strict=strict)


@pytest.mark.parametrize("name", [n for n in {**BY_VMAP, **BY_NOTHING} if n not in ("embedding_bag", "scale_grad_by_freq", "max_norm")])
def test_readmes_layers_may_stand_there_frozen(name):
    member, forward = {**BY_VMAP, **BY_NOTHING}[name]
    model = lively(Via(lambda s, x: forward(s, s.before(x)), m=member, before=nn.Linear(6, 6)))
    frozen, x = [p for p in model.m.parameters() if p.requires_grad], torch.randn(N, 5, 6).double()
    for p in frozen:
        p.requires_grad_(False)
    try:
        ef.check_capture(model, lambda: squares(model(x)), rtol=1e-10)
    finally:  # for the tests that share it
        for p in frozen:
            p.requires_grad_(True)


@pytest.mark.parametrize("name", ["batch_size", "batch_dim"])
def test_numbers_of_the_batch_are_whole(name):
    model, x = lively(nn.Linear(6, 4)), torch.randn(4, 6).double()
    for wrong, kind in (("4", "str"), (4.0, "float"), ([4], "list")):
        with pytest.raises(TypeError, match=f"^{name}: got {kind}; needs a whole number"), ef.capture(model, **{name: wrong}):
            pass
    with pytest.raises(ValueError, match=f"^{name}: got -1; needs a whole number >= 0"), ef.capture(model, **{name: -1}):
        pass
    given = {"batch_size": 4, "batch_dim": 0}[name]
    for good in (given, np.int64(given), torch.tensor(given)):
        with ef.capture(model, **{name: good}) as tape:
            tape.backward(squares(model(x)))
        assert "4 samples" in repr(tape)
