import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from small import net, samples, sets, trained
from torch import nn

from entangle_fast import storage
from entangle_fast.figures.relearning import relearning_figure, write_relearning
from entangle_fast.methods.training import batch_order
from entangle_fast.metrics import Relearning, anamnesis, relearn
from entangle_fast.metrics.relearning_attackers import ROWS

D64 = torch.float64
QUICK = dict(progress=False, seeds=3, steps=12, batch=8)
LR = {"sgd": 0.2, "adam": 0.05, "retain": 0.2, "prototype": 0.2}


class Frozen(nn.Module):
    """A BatchNorm with statistics, dropout, a convolution, a frozen parameter, a model in train mode."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.drop, self.head = nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2), nn.Dropout(0.5), nn.Linear(8, 4)
        self.a.bias.requires_grad_(False)
        self.norm.running_mean.uniform_(-0.5, 0.5)

    def forward(self, x):
        return self.head(self.drop(torch.tanh(self.norm(self.a(x[:, None])))).flatten(1))


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Two threads on models this small only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pair(_one_thread):
    """An original that knows the forget class, and one that was made to forget it by ascent."""
    original = trained(D64)
    unlearned = copy.deepcopy(original)
    x, y = sets(D64)["forget"]
    sgd = torch.optim.SGD([p for p in unlearned.parameters() if p.requires_grad], lr=0.1)
    while F.cross_entropy(unlearned(x), y) < 4:
        sgd.zero_grad()
        (-F.cross_entropy(unlearned(x), y)).backward()
        sgd.step()
    sgd.zero_grad()
    return unlearned, original


def attacked(pair, attacker="sgd", **options):
    s = sets(D64)
    return relearn(*pair, s["forget"], retain=s["remote"], attacker=attacker, **{"lr": LR[attacker], **QUICK, **options})


def two_classes(weight):
    model = nn.Linear(1, 2, bias=False, dtype=D64)
    model.weight.data = torch.tensor([[weight], [-weight]], dtype=D64)
    return model


def test_a_delay_known_by_hand():
    # loss log(1 + e^-d) of one logit difference d, that a step of lr moves by 2 lr / (1 + e^d)
    x, y = torch.ones(5, 1, dtype=D64), torch.zeros(5, dtype=torch.int64)
    lr, ε, T = 0.5, 0.05, 60
    d, target = -3.0, math.log1p(math.exp(-2.0))
    ds = [d := d + 2 * lr / (1 + math.exp(d)) if t else d for t in range(T + 1)]
    losses = [math.log1p(math.exp(-d)) for d in ds]
    delay = next(t for t, loss in enumerate(losses) if loss <= target + ε)
    assert 5 < delay < T
    for batched in ("loop", "vmap"):
        r = relearn(two_classes(-1.5), two_classes(1.0), (x, y), lr=lr, steps=T, seeds=2, tolerance=ε, batched=batched, progress=False)
        assert r.delays.tolist() == [delay, delay] and r.median == delay
        torch.testing.assert_close(r.curve, torch.tensor([losses, losses], dtype=D64), rtol=1e-12, atol=1e-14)
        excess = [max(0.0, loss - target) for loss in losses]
        assert r.area.tolist() == pytest.approx([sum(a + b for a, b in zip(excess, excess[1:])) / 2] * 2, rel=1e-12)
        assert r.weight_gap == pytest.approx(2.5 * math.sqrt(2), rel=1e-12)
        assert r.weight_path.tolist() == pytest.approx([sum((d - ds[0]) / math.sqrt(2) for d in ds[1:])] * 2, rel=1e-12)
        assert r.prediction_gap == pytest.approx(losses[0] - target, rel=1e-12)
        slope = 1 / (1 + math.exp(-3.0))
        assert r.mu == pytest.approx(2 * slope**2 / (2 * r.prediction_gap), rel=1e-12)
        assert r.estimate == pytest.approx(math.log(r.prediction_gap / ε) / (lr * r.mu), rel=1e-12)
        assert r.accuracy[0].tolist() == [100.0 * (d > 0) for d in ds] and r.original_accuracy == 100.0


@pytest.mark.parametrize("attacker", LR)
def test_vmap_and_loop_are_the_same(pair, attacker):
    runs = [attacked(pair, attacker, batched=b, share=0.6, momentum=0.5) for b in ("vmap", "loop")]
    assert [r.batched for r in runs] == ["vmap", "loop"]
    for name in ("curve", "accuracy", "delays", "area", "weight_path"):
        torch.testing.assert_close(getattr(runs[0], name), getattr(runs[1], name), rtol=1e-10, atol=1e-12)
    assert (runs[0].curve[:, -1] < runs[0].curve[:, 0]).all()
    assert len({tuple(c.tolist()) for c in runs[0].curve}) == 3  # each seed draws its own


@pytest.mark.parametrize("attacker", ("sgd", "adam", "retain"))
def test_a_step_is_the_optimiser_s(pair, attacker):
    r = attacked(pair, attacker, momentum=0.5, seeds=(4,))
    model, (x, y) = copy.deepcopy(pair[0]), sets(D64)["forget"]
    data = sets(D64)["remote" if attacker == "retain" else "forget"]
    known = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(4))
    rows = torch.cat([known[batch_order(len(known), 4, epoch)] for epoch in range(9)]).split(8)
    parameters = [p for p in model.parameters() if p.requires_grad]
    step = torch.optim.Adam(parameters, lr=0.05) if attacker == "adam" else torch.optim.SGD(parameters, lr=0.2, momentum=0.5)
    losses, start, path = [], [p.detach().clone() for p in parameters], 0.0
    for t in range(13):
        losses.append(F.cross_entropy(model(x), y).item())
        path += math.sqrt(sum((p.detach() - q).square().sum().item() for p, q in zip(parameters, start)))
        step.zero_grad()
        F.cross_entropy(model(data[0][rows[t]]), data[1][rows[t]]).backward()
        step.step()
    assert r.curve[0].tolist() == pytest.approx(losses, rel=1e-10)
    assert r.weight_path.item() == pytest.approx(path, rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attacker", LR)
@pytest.mark.parametrize("batched", ["loop", "vmap"])
def test_attacks_on_16_bit_models_go_as_far(pair, attacker, dtype, batched):
    """At the default rates a step of SGD is shorter than 16 bits can tell, and Adam's eps is 0 in float16. What stays is the
    gradients' own rounding, of which Adam makes steps as long as others: 0.12 of the path."""
    models = [copy.deepcopy(m).to(dtype) for m in pair]
    near, far = (
        relearn(*(m.to(to) for m in models), sets(to)["forget"], retain=sets(to)["remote"], attacker=attacker, batched=batched, **QUICK)
        for to in (dtype, D64)
    )
    torch.testing.assert_close(near.weight_path, far.weight_path, rtol=0.15, atol=0)


def test_the_prototype_attack_moves_the_forget_row_alone(pair):
    r = attacked(pair, "prototype", shots=3, seeds=(2,), steps=4)
    model, (x, y) = copy.deepcopy(pair[0]), sets(D64)["forget"]
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))[:3]
    prototype = model[:-1](x[chosen]).mean(0)
    row, losses = model[-1].weight[0].detach().clone(), []
    for t in range(5):
        model[-1].weight.data[0] = row + t * 0.2 * row.norm() * prototype / prototype.norm()
        losses.append(F.cross_entropy(model(x), y).item())
    assert r.curve[0].tolist() == pytest.approx(losses, rel=1e-10)
    with pytest.raises(ValueError, match="head: got 'nowhere', which is no module of the model; needs .* nn.Linear .*, such as '.*'"):
        attacked(pair, "prototype", head="nowhere")


def test_delays_that_never_come(pair):
    r = attacked(pair, lr=1e-6)
    assert r.delays.isinf().all() and r.median == math.inf and str(r) == "sgd: > 12 steps (> 12 to > 12, 3 seeds)"
    s = r.summary()
    assert s["median"] == s["q25"] == math.inf and s["not_recovered"] == 3
    assert json.loads(json.dumps(storage.plain(s)))["delays"] == [None] * 3
    assert math.isnan(anamnesis(r, r))
    # half of the seeds: the median is between a number and inf
    mixed = attacked(pair, seeds=2)
    mixed.curve[0] = 9.0
    assert mixed.at(0.05).delays.isinf().tolist() == [True, False] and mixed.at(0.05).median == math.inf


def test_what_was_never_forgotten_has_no_delay(pair):
    r = attacked((pair[1], pair[1]))
    assert r.delays.tolist() == [0, 0, 0] and r.estimate == 0 and r.weight_gap == 0


def test_reading_at_another_tolerance(pair):
    r = attacked(pair, lr=0.05)
    wide, direct = r.at(1.0), attacked(pair, lr=0.05, tolerance=1.0)
    assert (wide.delays < r.delays).all() and torch.equal(wide.delays, direct.delays) and wide.estimate == direct.estimate


def test_seldom_measured_curves_are_late_not_wrong(pair):
    every, seldom = attacked(pair, lr=0.05, steps=11), attacked(pair, lr=0.05, steps=11, eval_every=4)
    assert seldom.steps.tolist() == [0, 4, 8, 11]
    assert torch.equal(seldom.curve, every.curve[:, seldom.steps]) and torch.equal(seldom.weight_path, every.weight_path)
    assert (seldom.delays >= every.delays).all()


def test_many_samples_are_measured_in_parts_or_in_part(pair):
    x, y = samples(2 * ROWS + 7, 5, [0], D64)
    whole = relearn(*pair, (x, y), test=sets(D64)["forget"], eval_samples=None, **QUICK)
    assert whole.curve[0, 0].item() == pytest.approx(F.cross_entropy(pair[0](x), y).item(), rel=1e-12)
    assert whole.test_curve[1, 0].item() == pytest.approx(F.cross_entropy(pair[0](sets(D64)["forget"][0]), y[:20]).item(), rel=1e-12)
    part = [relearn(*pair, (x, y), eval_samples=50, **{**QUICK, "seeds": s}) for s in (2, (7, 8))]
    assert torch.equal(part[0].curve[:, 0], part[1].curve[:, 0])  # the same samples for every seed
    assert part[0].curve[0, 0] != whole.curve[0, 0]
    assert abs(part[0].mu - whole.mu) / whole.mu < 0.2


def test_the_models_are_left_as_found():
    model, other = Frozen().to(D64).train(), Frozen().to(D64)
    model.norm.eval()
    before = [copy.deepcopy(m.state_dict()) for m in (model, other)]
    modes = [m.training for m in model.modules()]
    for attacker in LR:
        for batched in ("vmap", "loop"):
            a, b = (attacked((model, other), attacker, batched=batched) for _ in range(2))
            assert torch.equal(a.curve, b.curve)  # no dropout, same draws
    assert [m.training for m in model.modules()] == modes and all(p.grad is None for p in model.parameters())
    for m, kept in zip((model, other), before):
        assert all(torch.equal(v, kept[k]) for k, v in m.state_dict().items())


def test_auto():
    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x):
            return self.layer(x) if x.sum() > -1e9 else x  # a branch on data cannot be vmapped

    for model, way in ((net(), "vmap"), (Frozen(), "loop"), (Stubborn(), "loop")):
        assert relearn(model, model, samples(9, 0, [0, 1]), **QUICK).batched == way
    with pytest.raises(RuntimeError):
        relearn(Stubborn(), Stubborn(), samples(9, 0, [0, 1]), batched="vmap", **QUICK)


def test_anamnesis(pair):
    r = attacked(pair, lr=0.05)

    def at(*delays):
        curve = torch.tensor([[100.0 * (t >= d) for t in r.steps.tolist()] for d in delays])
        return Relearning(**{**{n: getattr(r, n) for n, f in r.__dataclass_fields__.items() if f.init}, "accuracy": curve})

    never = at(99, 99, 99)
    assert anamnesis(at(3, 4, 9), at(8, 8, 2)) == 0.5
    assert anamnesis(at(3, 3, 3), never) == 0.0 and anamnesis(never, at(3, 3, 3)) == math.inf
    assert anamnesis(at(3, 3, 3), at(0, 0, 0)) == math.inf and math.isnan(anamnesis(at(0, 0, 0), at(0, 0, 0)))
    assert anamnesis(r, r, by="loss") == 1.0
    with pytest.raises(ValueError, match="lr: got 0.05 for the unlearned and 0.2"):
        anamnesis(r, attacked(pair))
    with pytest.raises(ValueError, match="steps: the two"):
        anamnesis(r, attacked(pair, lr=0.05, steps=9))
    with pytest.raises(ValueError, match="by, tau"):
        anamnesis(r, r, tau=5)


def test_an_attack_that_diverges_is_an_error(pair):
    with pytest.raises(FloatingPointError, match=r"attacker 'sgd', seed 0: the loss on the .* at step \d+ \(lr 1e\+308\)"):
        attacked(pair, lr=1e308)
    broken = copy.deepcopy(pair[0])
    broken[0].weight.data[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="unlearned model's loss on forget is nan"):
        attacked((broken, pair[1]))
    with pytest.raises(FloatingPointError, match="original model's loss on forget is nan"):
        attacked((pair[0], broken))


@pytest.mark.parametrize(("options", "said"), [
    (dict(attacker="sdg", lr=1.0), "attacker: got 'sdg'"), (dict(batched="yes"), "batched: got"), (dict(lr=-1.0), "lr: got -1.0"),
    (dict(momentum=1.0), "momentum: got"), (dict(share=0), "share: got 0"), (dict(batch=0), "batch: got 0"),
    (dict(steps=1.5), "steps: got 1.5"), (dict(seeds=0), "seeds: got"), (dict(seeds=(1, 1)), "seeds: got"),
    (dict(tolerance=0.0), "tolerance: got"), (dict(eval_every=0), "eval_every: got"), (dict(eval_samples=0), "eval_samples: got"),
    (dict(shots=0), "shots: got"), (dict(test=3), "test: got int"),
    (dict(test=(torch.zeros(2, 6, dtype=D64), torch.zeros(2))), "test: labels are torch.float32"),
    (dict(test=(torch.zeros(2, 6, dtype=D64), torch.tensor([0, 4]))), "test: label 4 is outside"),
])  # fmt: skip
def test_refusals(pair, options, said):
    with pytest.raises(ValueError, match=said):
        relearn(*pair, sets(D64)["forget"], **{**QUICK, **options})


def test_refused_models(pair):
    forget = sets(D64)["forget"]
    with pytest.raises(ValueError, match="retain: got None"):
        relearn(*pair, forget, attacker="retain", **QUICK)
    with pytest.raises(ValueError, match="original: parameter"):
        relearn(pair[0], nn.Linear(6, 4).double(), forget, **QUICK)
    fixed = copy.deepcopy(pair[0]).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        relearn(fixed, pair[1], forget, **QUICK)


def test_the_figure_from_numbers_or_from_a_file(pair, tmp_path):
    found = {"entangled": attacked(pair), "gradient_ascent": attacked(pair, lr=1e-6)}
    storage.save_json(tmp_path / "relearning.json", {n: r.summary() for n, r in found.items()})
    read = storage.load_json(tmp_path / "relearning.json")
    pages = [write_relearning(tmp_path / f"{i}.png", given).read_bytes() for i, given in enumerate((found, read))]
    assert pages[0][:4] == b"\x89PNG" and pages[0] == pages[1]
    with pytest.raises(ValueError, match="results: got none"):
        relearning_figure({})
