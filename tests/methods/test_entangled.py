"""The whole step of Entangled against methods.md §1 written out with plain autograd."""

import math

import pytest
import torch
import torch.nn.functional as F
from small import data, flat, net, trained

from entangle_fast.methods import Entangled
from entangle_fast.methods.process import sample_cross_entropy

F64 = torch.float64
SIZES = dict(remote_batch1=16, forget_batch1=8, adjacent_batch2=8, forget_batch2=8, remote_batch2=12, batch_limit=2)


def gradient(value, model):
    params = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, params)])


def put(model, vector):
    params, at = [p for p in model.parameters() if p.requires_grad], 0
    with torch.no_grad():
        for p in params:
            p.copy_(vector[at : at + p.numel()].view(p.shape))
            at += p.numel()


def ce(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def plain_stage1(c, model, d, steps):
    """Adam on −γ L_f^clip + λ h + (μ/2) h², and λ ← λ + μ h."""
    with torch.no_grad():
        start = ce(model, *d.remote.tensors).mean()
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=c.lr1)
    lam = 0.0
    for k in range(steps):
        _, xf, yf = d.forget.batch(k, c.forget_batch1)
        _, xr, yr = d.remote.batch(k, c.remote_batch1)
        forget = ce(model, xf, yf)
        kept = torch.where(forget < c.clip, forget, forget.detach())
        if c.penalty:
            kept = torch.where(forget < c.clip, forget - c.penalty / (forget + 1e-3), 0)
        h = ce(model, xr, yr).mean() - start
        adam.zero_grad()
        (-c.gamma * kept.mean() + lam * h + c.mu / 2 * h**2).backward()
        adam.step()
        lam = lam + c.mu * h.item()
    adam.zero_grad()
    return lam


def plain_stage2(c, model, d, steps, away):
    """v ← m v + ∇L_adj; v ← v − P_V v; θ ← θ − η v. away(k) gives the rows that span V."""
    theta = flat(model)
    v = torch.zeros_like(theta)
    for k in range(steps):
        _, xa, ya = d.adjacent.batch(k, c.adjacent_batch2)
        g = gradient(ce(model, xa, ya).mean(), model)
        g = g * min(1.0, c.max_norm2 / g.norm().item())
        span = away(k).double()
        gram = span @ span.T + c.ridge * torch.eye(len(span), dtype=F64)

        def onto(x, span=span, gram=gram):
            return (span.T @ (torch.linalg.pinv(gram, rtol=1e-11, hermitian=True) @ (span @ x.double()))).to(x.dtype)

        v = c.momentum * v + g
        v = v - onto(v if c.project == "momentum" else g)
        rate = c.lr2 * (1 - k / steps) if c.schedule2 == "linear" else c.lr2
        theta = theta - rate * v
        put(model, theta)
    return v


def w2_plain(values, reference, kind):
    if kind == "sorted":
        return (values.sort().values - reference.sort().values).square().mean()
    if kind == "moments":
        return (values.mean() - reference.mean()) ** 2 + (values.std(correction=0) - reference.std(correction=0)) ** 2
    xc, yc = values - values.mean(0), reference - reference.mean(0)
    nuclear = torch.linalg.matrix_norm(xc @ yc.T, "nuc")
    return ((values.mean(0) - reference.mean(0)).square().sum()
            + (xc.square().sum() + yc.square().sum() - 2 * nuclear) / len(values))  # fmt: skip


def two_means(c, model, d):
    """Sums over batch_limit minibatches of ∇L̃_f and ∇L_rem, W2 within each minibatch."""
    x, y = d.forget.tensors
    with torch.no_grad():
        reference = model(x).clone() if c.w2 == "features" else ce(model, x, y)
    latest = reference.clone()
    sign = {"paper": 1, "code": -1}[c.forget_sign]

    def away(k):
        forget = remote = 0
        for j in range(c.batch_limit):
            rows, xf, yf = d.forget.batch(c.batch_limit * k + j, c.forget_batch2)
            losses = ce(model, xf, yf)
            values = model(xf) if c.w2 == "features" else losses
            if c.w2_set == "batch":
                distance = w2_plain(values, reference[rows], c.w2)
            else:  # the batch's own losses among the latest of the others, scaled up to the set
                latest[rows] = values.detach()
                mixed = latest.clone()
                mixed[rows] = values
                distance = w2_plain(mixed, reference, c.w2) * len(x) / len(rows)
            forget = forget + gradient((1 - c.alpha) * sign * losses.mean() + c.alpha * distance, model)
            _, xr, yr = d.remote.batch(c.batch_limit * k + j, c.remote_batch2)
            remote = remote + gradient(ce(model, xr, yr).mean(), model)
        return torch.stack([forget, remote])

    return away


def run(c, dtype=F64, steps=None):
    """The process after some steps, and another model at the same start."""
    model, other = trained(dtype), trained(dtype)
    process = c.start(model, data(dtype=dtype), sample_cross_entropy, 0)
    rows = [process.step() for _ in range(process.total if steps is None else steps)]
    return process, rows, other


@pytest.mark.parametrize("options", [{}, {"penalty": 1.0, "clip": 1.0}, {"gamma": 0.3, "mu": 2.0}])
def test_stage1(options):
    c = Entangled(**SIZES, epochs1=2.0, lr1=0.02, epochs2=0.0, **options)
    process, rows, other = run(c)
    lam = plain_stage1(c, other, process.data, len(rows))
    assert len(rows) == math.ceil(2 * 44 / 16) and rows[-1]["stage"] == "stage1"
    torch.testing.assert_close(flat(process.model), flat(other), rtol=1e-10, atol=1e-10)
    assert rows[-1]["multiplier"].item() == pytest.approx(lam, rel=1e-10)
    assert (flat(other) - flat(trained(F64))).abs().max() > 0.05


STAGE2 = [
    {"forget_sign": sign, "alpha": alpha} for sign in ("paper", "code") for alpha in (0.0, 0.3, 1.0)
] + [
    {"w2": "moments"}, {"w2": "features"}, {"w2_set": "whole"}, {"w2_set": "whole", "w2": "moments"},
    {"w2_set": "whole", "w2": "features"}, {"ridge": 1e-2}, {"ridge": 1e-8, "forget_sign": "code"},
    {"project": "gradient"}, {"max_norm2": 0.05}, {"momentum": 0.0}, {"batch_limit": 1},
    {"schedule2": "linear"},
]  # fmt: skip


@pytest.mark.parametrize("options", STAGE2, ids=str)
def test_stage2(options):
    c = Entangled(**{**SIZES, "epochs1": 0.0, "epochs2": 2.0, "lr2": 0.05, **options})
    process, rows, other = run(c)
    v = plain_stage2(c, other, process.data, len(rows), two_means(c, other, process.data))
    assert len(rows) == 6 and rows[-1]["stage"] == "stage2"
    torch.testing.assert_close(flat(process.model), flat(other), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.cat([b.flatten() for b in process.sgd.buffers]), v, rtol=1e-8, atol=1e-9)
    if not c.ridge:
        assert all(-1 <= r["cosine"] <= 1 and 0 <= r["removed"] <= 1 for r in rows)
    assert (flat(other) - flat(trained(F64))).norm() > 1e-3


@pytest.mark.parametrize("away_from", ["samples", "forget_samples"])
@pytest.mark.parametrize("options", [{}, {"project": "gradient"}, {"ridge": 1e-3}], ids=str)
def test_away_from_samples(away_from, options):
    c = Entangled(**{**SIZES, "epochs1": 0.0, "epochs2": 1.0, "lr2": 0.05, "away_from": away_from, **options})
    process, rows, other = run(c)
    d = process.data

    def away(k):
        def each(samples, size):
            _, x, y = samples.batch(k, size)
            return [gradient(ce(other, x[i : i + 1], y[i : i + 1]).sum(), other) for i in range(len(x))]

        if away_from == "samples":
            return torch.stack(each(d.forget, 8) + each(d.remote, 12))
        mean = 0
        for j in range(2):
            _, x, y = d.remote.batch(2 * k + j, 12)
            mean = mean + gradient(ce(other, x, y).mean(), other)
        return torch.stack([*each(d.forget, 8), mean])

    # at the first step W2 is at its minimum, so that ∇L̃_f is along the mean forget gradient
    span = away(0)
    means = [span[:8].mean(0), span[8:].mean(0)]
    angle = torch.nn.functional.cosine_similarity(*means, dim=0)
    torch.testing.assert_close(torch.as_tensor(rows[0]["cosine"]), angle.to(rows[0]["cosine"].dtype), rtol=1e-6, atol=1e-6)
    plain_stage2(c, other, d, len(rows), away)
    torch.testing.assert_close(flat(process.model), flat(other), rtol=1e-8, atol=1e-8)
    assert all(-1 <= r["cosine"] <= 1 and r["loss_forget"] > 0 and r["loss_remote"] > 0 and r["w2"] >= 0 for r in rows)


@pytest.mark.parametrize("away_from", ["samples", "forget_samples"])
def test_float32_takes_the_same_steps_to_rounding(away_from):
    c = Entangled(**SIZES, epochs1=1.0, lr1=5e-3, epochs2=2.0, lr2=0.02, away_from=away_from)
    single, double = run(c, torch.float32)[0], run(c)[0]
    assert single.model[0].weight.dtype == torch.float32
    moved = (flat(double.model) - flat(trained(F64))).norm()
    # a Gram in float32 knows the span of samples down to singular values of √eps only
    assert (flat(single.model).double() - flat(double.model)).norm() < 5e-2 * moved


def test_float32_errs_no_more_than_plain_float32():
    """The trainings that lead to the starts differ by rounding too, and the steps magnify it: so the measure is the plain form."""
    c = Entangled(**SIZES, epochs1=1.0, lr1=5e-3, epochs2=2.0, lr2=0.02)
    single, rows, plain = run(c, torch.float32)
    stage1 = sum(r["stage"] == "stage1" for r in rows)
    plain_stage1(c, plain, single.data, stage1)
    plain_stage2(c, plain, single.data, len(rows) - stage1, two_means(c, plain, single.data))
    double = flat(run(c)[0].model)
    assert single.model[0].weight.dtype == plain[0].weight.dtype == torch.float32
    ours, theirs = ((flat(model).double() - double).norm() for model in (single.model, plain))
    assert ours < 2 * theirs, (ours, theirs)


def test_both_stages_in_a_row():
    c = Entangled(**SIZES, epochs1=1.0, lr1=0.02, epochs2=1.0, lr2=0.05)
    process, rows, other = run(c)
    plain_stage1(c, other, process.data, 3)
    plain_stage2(c, other, process.data, 3, two_means(c, other, process.data))
    assert [r["stage"] for r in rows] == ["stage1"] * 3 + ["stage2"] * 3 and [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    torch.testing.assert_close(flat(process.model), flat(other), rtol=1e-10, atol=1e-10)


def test_what_is_frozen_stays_and_the_mode_is_restored():
    c = Entangled(**SIZES, w2="features")
    model = trained().train()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    process = c.start(model, data(), sample_cross_entropy, 0)
    while process.done < process.total:
        process.step()
        assert [m.training for m in model.modules()] == modes
    process.facts()
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters()) and not model[3].weight.requires_grad
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked", "3.weight"):
        assert torch.equal(model.state_dict()[name], before[name])
    assert not torch.equal(model.state_dict()["0.weight"], before["0.weight"])


def test_first_order_proposition():
    """4.1 on a smooth model: order 2 for what is protected, 1 for what is descended."""
    process, _, _ = run(Entangled(**SIZES, lr1=0.02, lr2=0.02))
    before = flat(process.model)
    found = process.facts()["first_order"]
    assert found["applies"] and torch.equal(flat(process.model), before)
    assert 1.8 < found["order_forget"] < 2.2 and 1.8 < found["order_remote"] < 2.2, found
    assert 0.9 < found["order_adjacent"] < 1.1
    assert found["change_adjacent"] == pytest.approx(found["predicted_adjacent"], rel=0.1) and found["predicted_adjacent"] < 0


def test_first_order_is_measured_in_float64_whatever_the_model_is():
    process, _, _ = run(Entangled(**SIZES, lr1=0.02, lr2=0.02), torch.float32)
    found = process.facts()["first_order"]
    assert 1.8 < found["order_forget"] < 2.2 and 1.8 < found["order_remote"] < 2.2, found
    assert next(process.model.parameters()).dtype == torch.float32


def test_first_order_refutes_a_direction_that_is_not_projected(monkeypatch):
    from entangle_fast.methods import propositions

    process, _, _ = run(Entangled(**SIZES, lr1=0.02, lr2=0.02))
    monkeypatch.setattr(propositions.weights, "project_onto", lambda gram, inner, ridge: torch.zeros(2, dtype=F64))
    assert process.facts()["first_order"]["order_remote"] < 1.5


def test_forget_bound_proposition():
    """4.2: where every forget sample has ℓ ≥ m > log n and L̃_f moved by ε, accuracy stays below the bound."""
    c = Entangled(**SIZES, epochs1=20.0, lr1=0.03, mu=1.0, clip=20.0, lr2=1e-3, alpha=0.9)
    process, _, _ = run(c)
    found = process.facts()["forget_bound"]
    x, y = process.data.forget.tensors
    after = ce(process.model, x, y).detach()
    before = process.bound["start"]
    epsilon = 0.1 * (after.mean() - before.mean()) + 0.9 * (after.sort().values - before.sort().values).square().mean()
    assert found["epsilon"] == pytest.approx(abs(epsilon.item()), rel=1e-9) and found["classes"] == 4
    assert found["m"]["min"] == pytest.approx(before.min().item()) and found["log_n"] == pytest.approx(math.log(4))
    assert found["holds_for_all_samples"] and found["m"]["min"] > math.log(4)
    m = found["m"]["min"]
    bound = (0.1 / 0.9 + math.sqrt(found["epsilon"] / 0.9)) ** 2 / (m - math.log(4)) ** 2
    assert found["bound"]["min"] == pytest.approx(bound) and bound < 1
    assert (process.model(x).argmax(1) == y).double().mean() <= bound


def test_a_bound_that_says_nothing_is_none():
    process, _, _ = run(Entangled(**SIZES, epochs1=0.0, epochs2=1.0, alpha=0.0, lr2=1e-4))
    found = process.facts()["forget_bound"]
    assert not found["holds_for_all_samples"] and set(found["bound"].values()) == {None}


def test_no_second_stage_no_propositions():
    process, _, _ = run(Entangled(**SIZES, epochs2=0.0))
    assert process.facts() == {}


@pytest.mark.parametrize("change, message", [
    ({"alpha": 1.5}, "alpha: got 1.5; needs a number in"), ({"alpha": math.nan}, "alpha: got nan"),
    ({"lr1": -1.0}, "lr1: got -1"), ({"epochs2": math.inf}, "epochs2: got inf"), ({"ridge": -1.0}, "ridge: got -1"),
    ({"batch_limit": 0}, "batch_limit: got 0"), ({"momentum": 1.0}, "momentum: got 1.0"),
    ({"w2": "sort"}, "w2: got 'sort'; needs one of 'sorted', 'moments', 'features'"),
    ({"forget_sign": "author"}, "forget_sign: got 'author'"), ({"away_from": "mean"}, "away_from: got 'mean'"),
    ({"clip": math.nan}, "clip: got nan"), ({"max_norm2": 0.0}, "max_norm2: got 0"),
])  # fmt: skip
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        Entangled(**change)


def test_a_model_without_a_trainable_parameter_or_of_two_dtypes():
    model = net().requires_grad_(False)
    with pytest.raises(ValueError, match="model: no trainable parameter"):
        Entangled().start(model, data(), sample_cross_entropy, 0)
    model = net()
    model[5].double()
    with pytest.raises(ValueError, match="model: parameters are torch.float32 on cpu, torch.float64 on cpu; need one dtype"):
        Entangled().start(model, data(), sample_cross_entropy, 0)
    model = net()
    model[5].to("meta")
    with pytest.raises(ValueError, match="torch.float32 on cpu, torch.float32 on meta; need one dtype on one device"):
        Entangled().start(model, data(), sample_cross_entropy, 0)
