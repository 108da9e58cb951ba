import copy

import pytest
import torch
import torch.nn.functional as F
from small import CLASSES, D, flat
from stepping import begin, follow, forget_batch, gradient, resumes_to_the_bit, retain_batch, trained
from torch import nn

from entangle_fast.methods import METHODS
from entangle_fast.methods.scrub import Scrub

SIZES = dict(batch=17, forget_batch=8, lr=0.02)
# 20 forget samples: 3 max-steps an epoch; 68 retain samples: 4 min-steps
ORDER = [("max", 0), ("max", 1), ("max", 2), ("min", 0), ("min", 1), ("min", 2), ("min", 3), ("max", 3), ("max", 4), ("max", 5),
         ("min", 4), ("min", 5), ("min", 6), ("min", 7), ("min", 8), ("min", 9), ("min", 10), ("min", 11)]  # fmt: skip


@pytest.mark.parametrize("options", [{}, dict(alpha=0.3, gamma=2.0, temperature=4.0, max_norm=0.05, momentum=0.5), dict(temperature=1.0)])
def test_it_alternates_and_takes_the_paper_s_steps(options):
    config = Scrub(**SIZES, epochs=3, max_epochs=2, **options)
    teacher = trained(torch.float64)

    def distance(model, x):
        p, q = (m(x).div(config.temperature).softmax(1) for m in (teacher, model))
        return config.temperature**2 * (p.detach() * (p.detach() / q).log()).sum(1).mean()

    def direction(model, d, k):
        kind, number = ORDER[k]
        if kind == "max":
            return gradient(-distance(model, forget_batch(d, number, 8)[0]), model)
        x, y = retain_batch(d, number, 17)
        return gradient(config.alpha * distance(model, x) + config.gamma * F.cross_entropy(model(x), y), model)

    # the first max-step starts at the teacher, where the distance has no gradient: only rounding, which clipping would scale up
    process = follow(config, direction, steps=len(ORDER), tolerance=1e-7)
    assert process.total == len(ORDER) and [process.place(k) for k in range(18)] == [(kind == "max", n) for kind, n in ORDER]


def test_the_teacher_is_the_model_that_it_was():
    process = begin(Scrub(**SIZES))
    before = copy.deepcopy(process.model)
    for _ in range(9):
        process.step()
    x = process.data.forget.tensors[0]
    with torch.no_grad():
        found = process.distance(x, process.model(x))
        p, q = before(x).div(2).log_softmax(1), process.model(x).div(2).log_softmax(1)
    torch.testing.assert_close(found, 4 * (p.exp() * (p - q)).sum(1))
    assert found.mean() > 1e-4 and (flat(process.model) - flat(before)).norm() > 1e-3


def test_a_tied_weight_is_one_parameter():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, CLASSES)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.out(self.b(self.a(x).tanh()).tanh())

    process = begin(Scrub(**SIZES), torch.float32, Tied())
    before = copy.deepcopy(process.model)
    for _ in range(5):
        process.step()
    x = process.data.forget.tensors[0]
    with torch.no_grad():
        torch.testing.assert_close(process.distance(x, before(x)), torch.zeros(20), atol=1e-6, rtol=0)
        assert process.distance(x, process.model(x)).mean() > 1e-6


def test_resume(tmp_path):
    resumes_to_the_bit(Scrub(**SIZES), tmp_path, steps=12, cut=8)


def test_epochs_count_passes_over_the_retain_set():
    process = begin(Scrub(**SIZES, epochs=3, max_epochs=2))
    assert [round(process.step()["epoch"], 2) for _ in range(18)] == [
        0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1.25, 1.5, 1.75, 2, 2.25, 2.5, 2.75, 3]  # fmt: skip


@pytest.mark.parametrize("change, message", [
    (dict(lr=0.0), "lr: got 0.0"), (dict(temperature=-1.0), "temperature: got"), (dict(epochs=1.5), "epochs: got 1.5; needs a whole"),
    (dict(epochs=1, max_epochs=2), "max_epochs: got 2; needs at most epochs, 1"), (dict(alpha=-1.0), "alpha: got"),
    (dict(gamma=float("inf")), "gamma: got"), (dict(momentum=1.0), "momentum: got"), (dict(forget_batch=0), "forget_batch: got 0"),
])  # fmt: skip
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        Scrub(**change)


def test_outputs_that_are_not_logits_are_refused():
    model = nn.Sequential(nn.Linear(D, CLASSES * 2), nn.Unflatten(1, (CLASSES, 2)))
    before = flat(model).clone()
    process = begin(Scrub(), torch.float32, model)
    process.loss = lambda out, y: out.flatten(1).square().sum(1)
    with pytest.raises(ValueError, match="scrub needs class logits"):
        process.step()
    assert torch.equal(flat(model), before) and METHODS["scrub"] is Scrub
