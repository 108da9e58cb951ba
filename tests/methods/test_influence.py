"""Every form of Influence against methods.md §3 written out with plain autograd and the reference's noise."""

import math

import pytest
import torch
import torch.nn.functional as F
from small import data, flat, net, trained
from torch import nn

from entangle_fast.methods import Influence
from entangle_fast.methods.influence import contraction
from entangle_fast.methods.process import NonFinite, sample_cross_entropy
from entangle_fast.reference import philox

F64 = torch.float64
SIZES = dict(epochs=1.5, batch=17, forget_batch=8, lr=0.1, omega=0.5, gamma=0.7, clip=2.0, sigma=0.05)
NEAR = round(17 * 24 / 68)  # 24 adjacent and 44 remote samples: a batch in that proportion


def start(config, dtype=F64, model=None, seed=0):
    return config.start(trained(dtype) if model is None else model, data(dtype=dtype), sample_cross_entropy, seed)


def run(process, steps=None):
    return [process.step() for _ in range(process.total - process.done if steps is None else steps)]


def plain(c, d, model, steps, seed=0):
    """The equations on parameters one by one, two backwards, noise from reference/philox.py."""
    params = [p for p in model.parameters() if p.requires_grad]
    on = [c.on == "all" or p.dim() > 1 for p in params]
    unit = [float(p.detach().square().mean().sqrt()) if c.noise == "relative" else 1.0 for p in params]
    keys = list(dict.fromkeys((o, u * o) for o, u in zip(on, unit)))  # one stream for each group and step
    step = 0

    def move(grads, lr, decay, noise):
        nonlocal step
        at = [0] * len(keys)
        with torch.no_grad():
            for p, g, o, u in zip(params, grads, on, unit):
                j = keys.index((o, u * o))
                xi = philox.normal(p.numel(), seed, step * len(keys) + j, at[j]).view(p.shape).double()
                at[j] += p.numel()
                p.copy_((1 - lr * decay * o) * p - lr * g + noise * o * u * xi)
        step += 1

    def gradient(value):
        return torch.autograd.grad(value, params)

    def retain(k):
        parts = [s.batch(k, n) for s, n in ((d.adjacent, NEAR), (d.remote, 17 - NEAR))]
        return gradient(sum(F.cross_entropy(model(x), y, reduction="sum") for _, x, y in parts) / 17)

    def ascent(k):
        _, x, y = d.forget.batch(k, c.forget_batch)
        losses = F.cross_entropy(model(x), y, reduction="none")
        return [-c.gamma * g for g in gradient(torch.where(losses < c.clip, losses, losses.detach()).mean())]

    def joint(k, drift):
        lr = c.lr * (1 - k / steps) if c.schedule == "linear" else c.lr
        grads = [a + b for a, b in zip(retain(k), ascent(k))]
        move(grads, lr, c.omega * drift, math.sqrt(lr) * c.sigma * drift)

    if c.form == "one_shot":
        move([torch.zeros_like(p) for p in params], 1.0, 1 - c.shrink, c.perturb)
    if c.form in ("joint", "one_shot"):
        for k in range(steps):
            joint(k, c.form == "joint")
    else:
        forget = kept = 0
        for k in range(steps):
            lr = c.lr * (1 - k / steps) if c.schedule == "linear" else c.lr
            if k % (c.eliminate + c.repair) < c.eliminate:
                move(ascent(forget), lr, c.omega, math.sqrt(lr) * c.sigma)
                forget += 1
            else:
                move(retain(kept), lr, 0.0, 0.0)
                kept += 1


@pytest.mark.parametrize("form", ["joint", "alternate", "one_shot"])
@pytest.mark.parametrize("options", [
    {}, {"on": "weights"}, {"noise": "absolute"}, {"schedule": "constant", "on": "all"}, {"clip": math.inf, "on": "weights",
                                                                                        "noise": "absolute"},
], ids=str)  # fmt: skip
def test_it_takes_the_steps_of_the_equations(form, options):
    c = Influence(**{**SIZES, "form": form, "eliminate": 2, "repair": 3, **options})
    process, other = start(c), trained(F64)
    rows = run(process)
    steps = 10 if form == "alternate" else 6  # 1.5 passes over 68 samples are 6 batches of 17: two cycles of 2 + 3
    assert len(rows) == steps + (form == "one_shot")
    plain(c, process.data, other, steps)
    # float32 normals: their last bits are the backend's own
    torch.testing.assert_close(flat(process.model), flat(other), rtol=0, atol=1e-6)
    assert (flat(other) - flat(trained(F64))).norm() > 0.1
    assert rows[-1]["loss_remote"] > 0 and rows[-1]["epoch"] == pytest.approx(1.5)


def test_without_noise_it_is_the_same_to_rounding():
    c = Influence(**{**SIZES, "sigma": 0.0, "on": "all"})
    process, other = start(c), trained(F64)
    run(process)
    plain(c, process.data, other, 6)
    torch.testing.assert_close(flat(process.model), flat(other), rtol=1e-10, atol=1e-11)


def test_the_gradient_is_bounded():
    c = Influence(**{**SIZES, "sigma": 0.0, "omega": 0.0, "max_norm": 1e-3, "schedule": "constant"})
    process = start(c)
    before = flat(process.model)
    run(process, 1)
    assert (flat(process.model) - before).norm() == pytest.approx(0.1 * 1e-3, rel=1e-6)


def test_noise_has_the_scale_of_each_tensor_and_spares_the_vectors():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 400), nn.BatchNorm1d(400), nn.Linear(400, 4))
    with torch.no_grad():
        model[2].weight *= 50
    before = [p.detach().clone() for p in model.parameters()]
    c = Influence(form="one_shot", shrink=1.0, perturb=0.2, on="weights")
    run(start(c, torch.float32, model), 1)
    moved = [(p.detach() - b) for p, b in zip(model.parameters(), before)]
    for i, (p, m) in enumerate(zip(before, moved)):
        if p.dim() < 2:
            assert not m.any(), i
        else:
            assert m.std().item() == pytest.approx(0.2 * p.square().mean().sqrt().item(), rel=0.06)
    first, last = (m.flatten()[:1600] / m.std() for m in (moved[0], moved[4]))
    assert abs((first * last).mean()) < 0.1  # streams of their own


@pytest.mark.parametrize("form", ["joint", "alternate", "one_shot"])
@pytest.mark.parametrize("cut", [1, 4])
def test_a_resumed_run_has_the_same_bits(form, cut):
    c = Influence(**SIZES, form=form, repair=3)
    whole, first = start(c, torch.float32, seed=3), start(c, torch.float32, seed=3)
    run(whole), run(first, cut)
    second = start(c, torch.float32, net(seed=7), seed=3)  # other weights: their scale must not count
    second.model.load_state_dict(first.model.state_dict())
    second.done = cut
    second.load({k: v.clone() for k, v in first.state().items()})
    run(second)
    assert torch.equal(flat(second.model), flat(whole.model))
    other = start(c, torch.float32, seed=4)
    run(other)
    assert not torch.equal(flat(other.model), flat(whole.model))


# ---- contraction ----


class Still(nn.Module):
    """Parameters without a gradient in the loss."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(7, 5, generator=generator, dtype=F64))
        self.bias = nn.Parameter(torch.randn(5, generator=generator, dtype=F64))

    def forward(self, x):
        return x.new_zeros(len(x), 4) + 0.0 * (self.weight.sum() + self.bias.sum())


@pytest.mark.parametrize("form", ["joint", "alternate", "one_shot"])
@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_where_gradients_vanish_the_distance_shrinks_at_the_rate(form, schedule):
    c = Influence(**{**SIZES, "sigma": 0.4, "form": form, "schedule": schedule, "on": "all", "epochs": 6.0})
    distances, bound = contraction(c, Still(1), Still(2), data(dtype=F64))
    torch.testing.assert_close(distances, bound, rtol=1e-6, atol=0)  # their noise is the same to the bit, rounding is not
    if form == "joint":
        steps = len(distances) - 1
        assert steps == 24
        if schedule == "constant":
            assert distances[-1] / distances[0] == pytest.approx((1 - 0.1 * 0.5) ** steps)
    assert distances[-1] < 0.9 * distances[0]


def test_biases_that_do_not_decay_do_not_contract():
    c = Influence(**{**SIZES, "on": "weights"})
    distances, bound = contraction(c, Still(1), Still(2), data(dtype=F64))
    weight, bias = ((p - q).norm() for p, q in zip(Still(1).parameters(), Still(2).parameters()))
    expected = torch.hypot(weight * bound / bound[0], bias)
    torch.testing.assert_close(distances, expected.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["logistic regression", "least squares"])
def test_on_a_convex_problem_it_shrinks_at_least_as_fast(kind):
    def squares(output, y):
        return (output - F.one_hot(y, 4)).square().sum(1) / 2

    loss = sample_cross_entropy if kind == "logistic regression" else squares
    d = data(dtype=F64)
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(nn.Linear(6, 4).double())
    before = [flat(m) for m in models]
    smooth = max((torch.cat([b[1], torch.ones(len(b[1]), 1)], 1)).square().sum(1).max().item()
                 for s in d.retain for b in [s.batch(k, len(s)) for k in range(1)])  # fmt: skip
    omega = 0.2
    lr = 2 / (smooth + 2 * omega)
    c = Influence(epochs=30.0, batch=17, forget_batch=8, lr=lr, omega=omega, gamma=0.0, sigma=0.3, on="all", schedule="constant")
    distances, bound = contraction(c, *models, d, loss)
    assert len(distances) == 121 and (distances <= bound * (1 + 1e-6)).all() and distances[-1] < 0.5 * distances[0]
    assert (distances[1:] < distances[:-1]).all()
    assert all(torch.equal(flat(m), b) for m, b in zip(models, before))


def test_without_decay_nothing_contracts():
    distances, _ = contraction(Influence(**{**SIZES, "omega": 0.0}), Still(1), Still(2), data(dtype=F64), steps=4)
    assert len(distances) == 5
    torch.testing.assert_close(distances, distances[:1].expand(5), rtol=1e-6, atol=0)


def test_runs_of_two_architectures_are_not_coupled():
    with pytest.raises(ValueError, match="other: trainable parameters of shapes"):
        contraction(Influence(), nn.Linear(6, 4), nn.Linear(6, 4, bias=False), data())


# ---- what is refused ----


@pytest.mark.parametrize("change, message", [
    ({"form": "both"}, "form: got 'both'; needs one of 'joint', 'alternate', 'one_shot'"),
    ({"noise": "rms"}, "noise: got 'rms'; needs one of"), ({"on": "bias"}, "on: got 'bias'"),
    ({"schedule": "cosine"}, "schedule: got 'cosine'"), ({"omega": -0.1}, "omega: got -0.1; needs a finite number >= 0"),
    ({"sigma": math.nan}, "sigma: got nan"), ({"gamma": math.inf}, "gamma: got inf"), ({"perturb": -1.0}, "perturb: got -1"),
    ({"clip": 0.0}, "clip: got 0.0; needs a number > 0"), ({"max_norm": math.nan}, "max_norm: got nan"),
    ({"shrink": 0.0}, "shrink: got 0.0; needs a number in"), ({"shrink": 1.5}, "shrink: got 1.5"),
    ({"lr": 2.0, "omega": 0.5}, "omega: got 0.5 with lr 2.0; needs lr·omega < 1"), ({"lr": 0.0}, "lr: got 0.0"),
    ({"epochs": -1}, "epochs: got -1"), ({"batch": 0}, "batch: got 0"), ({"forget_batch": 0}, "forget_batch: got 0"),
    ({"eliminate": 0}, "eliminate: got 0"), ({"repair": 0}, "repair: got 0"),
])  # fmt: skip
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        Influence(**change)


def test_a_step_that_would_be_non_finite_is_not_taken():
    process = start(Influence(**SIZES), torch.float32)
    process.data.forget.tensors[0][:] = math.nan
    before = flat(process.model)
    with pytest.raises(NonFinite, match="joint, step 1 of 6: non-finite loss on the forget set; the model is as it was"):
        process.step()
    assert torch.equal(flat(process.model), before)
