"""LUR's step against its objective written out with plain autograd in float64 (methods.md §2)."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from small import data, flat, trained
from stepping import (
    F64,
    begin,
    clipped_gradient,
    follow,
    forget_batch,
    gradient,
    put,
    resumes_to_the_bit,
    retain_batch,
)  # fmt: skip
from torch import nn
from torch.func import functional_call, grad, jvp

from entangle_fast.methods import Lookahead
from entangle_fast.methods.process import NonFinite, sample_cross_entropy

SIZES = dict(batch=8, retain_batch=16, max_norm=0.0, lr=0.05)


def named(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def retain_loss(model, params, d, k):
    x, y = retain_batch(d, k, 16)
    return F.cross_entropy(functional_call(model, params, (x,)), y)


def forget_loss(model, params, d, k, clip=1.0, labels=None):
    rows, x, y = d.forget.batch(k, 8)
    losses = F.cross_entropy(functional_call(model, params, (x,)), y if labels is None else labels[rows], reduction="none")
    return -torch.where(losses < clip, losses, losses.detach()).mean() if labels is None else losses.mean()


def composed(model, d, k, *, alpha, lam, order, swap, clip=1.0, labels=None):
    """L_r(θ) + λ 𝓛_f(θ − α∇L_r(θ)), or the swapped one; without create_graph the inner gradient is a constant: order 1."""
    losses = [lambda p: retain_loss(model, p, d, k), lambda p: lam * forget_loss(model, p, d, k, clip, labels)]
    inner, outer = reversed(losses) if swap else losses
    params = named(model)
    share = lam if swap else 1.0
    steps = torch.autograd.grad(inner(params) / share, params.values(), create_graph=order == 2)
    ahead = {n: p - alpha * g for (n, p), g in zip(params.items(), steps)}
    return inner(params) + outer(ahead)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("order", [1, 2])
def test_the_step_is_the_gradient_of_the_composed_objective(order, swap):
    how = dict(alpha=0.7, lam=0.4, order=order, swap=swap)
    process = follow(Lookahead(**SIZES, clip=0.1, **how), lambda m, d, k: gradient(composed(m, d, k, clip=0.1, **how), m))
    assert process.exact
    forget = process.losses(*process.data.forget.tensors, "forget")
    assert forget.min() < 0.1 < forget.max()  # some samples are clipped and some are not


def test_orders_differ_and_agree_without_a_lookahead():
    def first(**options):
        process = begin(Lookahead(**SIZES, **options))
        process.step()
        return flat(process.model)

    assert not torch.allclose(first(alpha=0.7, order=1), first(alpha=0.7, order=2), rtol=1e-6)
    torch.testing.assert_close(first(alpha=0.0, order=1), first(alpha=0.0, order=2), rtol=1e-12, atol=1e-12)


def test_without_a_lookahead_it_is_joint_descent():
    def joint(m, d, k):
        retain = gradient(F.cross_entropy(m(retain_batch(d, k, 16)[0]), retain_batch(d, k, 16)[1]), m)
        return retain - 0.4 * clipped_gradient(m, *forget_batch(d, k, 8), 2.0)

    follow(Lookahead(**{**SIZES, "max_norm": 0.1}, alpha=0.0, lam=0.4, clip=2.0), joint)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("options", [{"forget_loss": "random_label"}, {"forget_loss": "target"},
                                     {"forget_loss": "target", "target": 2}], ids=str)  # fmt: skip
def test_substitute_labels(options, swap):
    how = dict(alpha=0.7, lam=0.4, order=2, swap=swap)
    x, y = data(dtype=F64).forget.tensors
    labels = torch.full_like(y, 2)
    if options == {"forget_loss": "random_label"}:
        labels = (y + torch.randint(1, 4, (20,), generator=torch.Generator().manual_seed(0))) % 4
    elif "target" not in options:
        labels = trained(F64)(x).topk(2).indices
        labels = torch.where(labels[:, 0] == y, labels[:, 1], labels[:, 0])
    assert (labels != y).all()
    process = follow(Lookahead(**SIZES, **options, **how),
                     lambda m, d, k: gradient(composed(m, d, k, labels=labels, **how), m))  # fmt: skip
    assert torch.equal(process.labels, labels)


def test_taylor():
    """𝓛_f(θ′) = 𝓛_f(θ) − α <∇𝓛_f, ∇L_r> + O(α²), with the inner product that the run reports (𝓛_f = −CE)."""
    process = begin(Lookahead(**SIZES, clip=100.0))
    model, d = process.model, process.data
    row = {}
    g = process.gradient(process._retain(0, {}))
    process._measure(0, row, g)
    start, theta, gaps = process._forget(0, {}).item(), flat(model), []
    for alpha in (1e-3, 5e-4):
        put(model, theta - alpha * torch.cat([x.flatten() for x in g]))
        gaps.append(process._forget(0, {}).item() - (start + alpha * row["inner"].item()))
        assert abs(gaps[-1]) < 0.1 * abs(alpha * row["inner"].item())
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.02)
    assert d.forget.tensors[1].unique().tolist() == [0]


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("forget_loss", ["clipped", "random_label"])
def test_inner_product_and_cosine_are_those_of_the_cross_entropies_at_theta(swap, forget_loss):
    process = begin(Lookahead(**SIZES, alpha=0.7, clip=0.01, swap=swap, forget_loss=forget_loss, angle_every=2))
    for k in range(3):
        other = trained(F64)
        put(other, flat(process.model))
        row = process.step()
        assert ("cosine" in row) == ("inner" in row) == ("loss_forget" in row) == (k != 1)
        if k == 1:
            continue
        x, y = forget_batch(process.data, k, 8)
        loss = F.cross_entropy(other(x), y)
        xr, yr = retain_batch(process.data, k, 16)
        f, r = gradient(loss, other), gradient(F.cross_entropy(other(xr), yr), other)
        assert row["inner"].item() == pytest.approx((f @ r).item(), rel=1e-9)
        assert row["cosine"].item() == pytest.approx(F.cosine_similarity(f, r, dim=0).item(), rel=1e-9)
        assert row["loss_forget"].item() == pytest.approx(loss.item(), rel=1e-9)
        assert row["loss_adjacent"] > 0 and row["loss_remote"] > 0


def test_without_angles_the_steps_are_the_same():
    runs = [begin(Lookahead(**SIZES, angle_every=n), torch.float32) for n in (0, 1)]
    rows = [[p.step() for _ in range(4)][-1] for p in runs]
    assert torch.equal(flat(runs[0].model), flat(runs[1].model))
    assert "cosine" in rows[1] and "cosine" not in rows[0] and "loss_forget" not in rows[0]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("fails", [False, True])
def test_the_lookahead_leaves_the_very_bits(order, fails):
    """Also where the loss at θ′ is not finite."""
    process = begin(Lookahead(**SIZES, alpha=1e30 if fails else 3.0, order=order), torch.float32)
    process.model[0].weight.data[0, :3] = torch.tensor([0.0, -0.0, 1e-38])
    bits = [p.detach().clone().view(torch.int32) for p in process.params]
    if fails:
        process.loss = lambda output, y, plain=process.loss: plain(output * torch.where(output.abs().max() < 1e6, 1, torch.nan), y)
        with pytest.raises(NonFinite, match="forget set"):
            process.step()
        assert process.done == 0
    else:
        with torch.enable_grad():
            process.direction(0, {})
    assert all(torch.equal(a, p.detach().view(torch.int32)) for a, p in zip(bits, process.params))
    assert all(p.grad is None for p in process.params)


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x / 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g / 2


class Once(nn.Module):
    def forward(self, x):
        return Halved.apply(x)


def once(dtype=F64):
    model = trained(dtype)
    return nn.Sequential(model, Once())


@pytest.mark.parametrize("swap", [False, True])
def test_a_model_without_a_second_derivative_gets_differences_and_a_warning(swap):
    exact, close = (begin(Lookahead(**SIZES, alpha=0.7, order=2, swap=swap), model=m) for m in (trained(F64), once()))
    exact.model = nn.Sequential(exact.model, nn.Identity())
    exact.loss = lambda output, y: sample_cross_entropy(output / 2, y)
    for k in range(3):
        exact.step()
        if k == 0:
            with pytest.warns(UserWarning, match="order=2: .* cannot be differentiated twice .* take order=1"):
                close.step()
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                close.step()
    assert not close.exact
    torch.testing.assert_close(flat(close.model), flat(exact.model), rtol=1e-7, atol=1e-7)
    again = begin(Lookahead(**SIZES, alpha=0.7, order=2, swap=swap), model=once())
    again.done = close.done
    again.load(close.state())
    assert not again.exact  # known from the first step on: attention goes to another backend where it is tried


class Fused(torch.autograd.Function):
    """Cross-entropy whose backward is an operation that knows no derivative."""

    @staticmethod
    def forward(ctx, output, y):
        ctx.save_for_backward(output, y)
        return F.cross_entropy(output, y, reduction="none")

    @staticmethod
    def backward(ctx, g):
        output, y = ctx.saved_tensors
        losses, ce, lse = torch.ops.entangle_fast.sample_loss(output.detach(), y, math.inf)
        return torch.ops.entangle_fast.sample_loss_backward(g, output, y, ce, lse, math.inf), None


def test_a_loss_whose_second_derivative_is_silently_missing_is_noticed():
    """Torch alone would only warn, and leave the Hessian out."""
    config = Lookahead(**SIZES, alpha=0.7, order=2)
    process, exact = config.start(trained(F64), data(dtype=F64), Fused.apply, 0), begin(config)
    with pytest.warns(UserWarning, match="order=2: .*NotImplemented"):
        process.step()
    exact.step()
    torch.testing.assert_close(flat(process.model), flat(exact.model), rtol=1e-7, atol=1e-7)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(3, 12), nn.Linear(8, 4)

    def forward(self, x):
        q, k, v = self.qkv(x.view(len(x), 1, 2, 3)).split(4, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v).flatten(1))


def test_fused_attention_is_differentiated_twice_through_its_math_form():
    """On the CPU the fused kernel has no second derivative."""
    torch.manual_seed(0)
    model = Attention()
    process = begin(Lookahead(**SIZES, alpha=0.7, order=2), torch.float32, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        process.step()
    assert process.exact


def test_hessian_vector_products_are_those_of_forward_over_reverse():
    process = begin(Lookahead(**SIZES, order=2))
    params = {n: p.detach() for n, p in named(process.model).items()}
    v = {n: torch.randn(p.shape, dtype=F64, generator=torch.Generator().manual_seed(1)) for n, p in params.items()}
    _, expected = jvp(grad(lambda p: retain_loss(process.model, p, process.data, 0)), (params,), (v,))
    graph = process._graph_of(process._retain(0, {}))
    found = process._double_backward(graph, list(v.values()))
    torch.testing.assert_close(found, list(expected.values()), rtol=1e-10, atol=1e-12)
    near = process._difference(process._retain, 0, list(v.values()))
    torch.testing.assert_close(near, list(expected.values()), rtol=1e-6, atol=1e-8)


def test_trim():
    config = Lookahead(**SIZES, trim=0.1)
    process, start, d = begin(config), trained(F64), data(dtype=F64)
    row = process.step()
    assert row["stage"] == "trim" and process.stages[0] == ("trim", 1) and process.stages[1][0] == "lookahead"
    total, params = 0.0, named(start)
    for _, x, y in d.forget.chunks(8):
        total = total + gradient(F.cross_entropy(start(x), y), start).abs()
    free = torch.cat([torch.full((p.numel(),), not n.startswith("1.")) for n, p in params.items()])
    saliency = torch.where(free, (flat(start) * total).abs(), -1)
    count = round(0.1 * int(free.sum()))
    chosen = torch.zeros_like(free)
    chosen[saliency.argsort(descending=True)[:count]] = True
    assert row["trimmed"] == count == int((flat(process.model) != flat(start)).sum())
    assert torch.equal(flat(process.model) != flat(start), chosen) and chosen.sum() > 5
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(process.model[1], name), getattr(start[1], name))
    again = begin(config)
    again.step()
    assert torch.equal(flat(again.model), flat(process.model))
    process.step()
    assert process.where() == ("lookahead", 1)


def test_a_trim_that_cannot_reset_leaves_the_model():
    model = Attention()
    model.scale = nn.Parameter(torch.ones(1))
    process = begin(Lookahead(**SIZES, trim=0.5), torch.float32, model)
    before = flat(model)
    with pytest.raises(ValueError, match="has parameters .'scale'. but no reset_parameters"):
        process.step()
    assert torch.equal(flat(model), before)


def test_substitutes_are_those_of_the_model_before_the_trim():
    process = begin(Lookahead(**SIZES, trim=0.9, forget_loss="target"))
    x, y = process.data.forget.tensors
    expected = trained(F64)(x).scatter(1, y[:, None], -torch.inf).argmax(1)
    process.step()
    assert torch.equal(process.labels, expected)


@pytest.mark.parametrize("options", [
    {}, {"order": 2}, {"swap": True, "forget_loss": "random_label"}, {"forget_loss": "target", "trim": 0.1, "order": 2},
])  # fmt: skip
def test_a_resumed_run_gives_the_same_bits(options, tmp_path):
    resumes_to_the_bit(Lookahead(**SIZES, alpha=0.5, **options), tmp_path)


def test_it_forgets_and_keeps():
    process = begin(Lookahead(batch=10, retain_batch=32, lr=0.1, lam=0.5, epochs=60, stop_at=0.0), torch.float32)
    while process.done < process.total and not process.stopped:
        process.step()
    right = [(process.model(s.tensors[0]).argmax(1) == s.tensors[1]).float().mean() for s in (process.data.forget, *process.data.retain)]
    assert process.stopped and right[0] <= 0.2 and right[1] > 0.8 and right[2] > 0.8


@pytest.mark.parametrize("options, message", [
    ({"alpha": -0.1}, "alpha: got -0.1; needs a finite number >= 0"), ({"lam": float("inf")}, "lam: got inf"),
    ({"order": 3}, "order: got 3; needs one of 1, 2"), ({"forget_loss": "ascent"}, "forget_loss: got 'ascent'; needs one of"),
    ({"clip": 0.0}, "clip: got 0.0"), ({"trim": 1.0}, "trim: got 1.0"), ({"angle_every": -1}, "angle_every: got -1"),
    ({"target": 1}, "target: got 1 with forget_loss='clipped'"), ({"target": -1, "forget_loss": "target"}, "target: got -1"),
    ({"momentum": 1.0}, "momentum: got 1.0"), ({"max_norm": float("nan")}, "max_norm: got nan"), ({"lr": 0.0}, "lr: got 0.0"),
    ({"retain_batch": 0}, "retain_batch: got 0"),
])  # fmt: skip
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Lookahead(**options)


@pytest.mark.parametrize("target", [0, 4])
def test_a_target_that_is_no_other_class(target):
    process = begin(Lookahead(forget_loss="target", target=target))
    with pytest.raises(ValueError, match=f"target: got {target}; needs a class below 4 that no forget sample has"):
        process.step()


def test_substitute_labels_need_class_logits():
    model = nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Linear(3, 4)).double()
    process = begin(Lookahead(forget_loss="random_label"), model=model)
    with pytest.raises(ValueError, match=r"forget_loss: got 'random_label' for a model whose output is \(20, 2, 4\)"):
        process.step()
