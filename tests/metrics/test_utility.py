import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from entangle_fast.metrics import accuracy, evaluate, utility
from entangle_fast.metrics.utility import agreement, brier, calibration_error, divergence
from entangle_fast.tasks import Triple


@pytest.fixture
def model():
    return nn.Linear(4, 3)


def some(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=g), torch.randint(3, (n,), generator=g)


def test_accuracy_is_that_of_evaluate(model):
    sets = SimpleNamespace(test=Triple(some(7), some(8, 1), some(9, 2)), test_fine=Triple(torch.zeros(7).long(), torch.ones(8).long(),
                           torch.arange(9) % 2 + 2), class_names=("a", "b", "c", "d"))  # fmt: skip
    found, known = utility(model, sets), evaluate(model, sets)
    for name in ("forget", "adjacent", "remote"):
        assert found[name]["accuracy"] == pytest.approx(known[name])
    assert {c: v for row in found.values() for c, v in row["per_class"].items()} == pytest.approx(known["per_class"])


def test_mapping_and_labels(model):
    x, y = some(30)
    found = utility(model, {"mine": (x, y)}, batch_size=7)["mine"]
    assert found["accuracy"] == pytest.approx(accuracy(model, (x, y))) and set(found["per_class"]) == {"0", "1", "2"}
    assert found["per_class"]["1"] == pytest.approx(accuracy(model, (x[y == 1], y[y == 1])))
    assert "kl_retrained" not in found and json.dumps(found)


def test_against_a_retrained_model(model):
    x, y = some(30)
    other = nn.Linear(4, 3)
    found = utility(model, {"s": (x, y)}, retrained=other)["s"]
    p, q = (m(x).detach().double().softmax(1) for m in (model, other))
    assert found["kl_retrained"] == pytest.approx((q * (q / p).log()).sum(1).mean().item())
    assert found["agreement"] == pytest.approx(100 * (p.argmax(1) == q.argmax(1)).double().mean().item())
    same = utility(model, {"s": (x, y)}, retrained=model)["s"]
    assert same["kl_retrained"] == 0 and same["agreement"] == 100


def two(confidences, right):
    """Two-class probabilities of the given confidence, and labels that make the prediction right or not."""
    p = torch.tensor(confidences, dtype=torch.float64)
    return torch.stack([p, 1 - p], 1), torch.tensor([0 if r else 1 for r in right])


def test_calibration_error_by_hand():
    p, y = two([0.6, 0.7, 0.8, 0.9], [0, 1, 1, 1])
    assert calibration_error(p, y, bins=2) == pytest.approx(0.5 * abs(0.5 - 0.65) + 0.5 * abs(1 - 0.85))
    assert calibration_error(p, y, bins=4) == pytest.approx((0.6 + 0.3 + 0.2 + 0.1) / 4)
    # equal width: (0.5, 0.75], (0.75, 1]
    p, y = two([0.6, 0.7, 0.75, 0.9], [0, 1, 1, 1])
    assert calibration_error(p, y, bins=4, binning="width") == pytest.approx((3 * abs(2 / 3 - 2.05 / 3) + 0.1) / 4)
    assert calibration_error(p, y, bins=1) == calibration_error(p, y, bins=1, binning="width") == pytest.approx(abs(0.75 - 2.95 / 4))


def test_a_calibrated_model_has_little_and_a_sure_one_has_its_error():
    g = torch.Generator().manual_seed(0)
    p = (3 * torch.randn(20000, 4, generator=g, dtype=torch.float64)).softmax(1)
    y = torch.multinomial(p, 1, generator=g)[:, 0]
    for binning in ("mass", "width"):
        assert calibration_error(p, y, binning=binning) < 0.015
        sure = torch.eye(4)[torch.zeros(1000).long()]
        assert calibration_error(sure, torch.arange(1000) % 4, binning=binning) == pytest.approx(0.75)


def test_ties_do_not_depend_on_the_order():
    p, y = two([0.8] * 10, [1] * 5 + [0] * 5)
    shuffled = torch.tensor([0, 5, 1, 6, 2, 7, 3, 8, 4, 9])
    assert calibration_error(p, y, bins=3) == pytest.approx(0.3) == calibration_error(p[shuffled], y[shuffled], bins=3)


def test_brier_and_divergence_by_hand():
    p, y = two([0.8, 0.6], [1, 0])
    assert brier(p, y) == pytest.approx((2 * 0.2**2 + 2 * 0.6**2) / 2)
    gold, out = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    assert divergence(gold, out) == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert divergence(torch.tensor([[2000.0, 0.0]]), torch.tensor([[0.0, 2000.0]])) == 2000
    assert agreement(gold, out) == 100


@pytest.mark.parametrize("call, message", [
    (lambda m: utility(m, some(4)), r"sets: got tuple; .*: .'data': \.\.\.., or metrics.accuracy, which takes one set"),
    (lambda m: utility(m, TensorDataset(*some(4))), "sets: got TensorDataset; .*: .'data': "), (lambda m: utility(m, 3), "Datasets$"),
    (lambda m: utility(m, {"s": some(4)}, bins=0), "bins, binning: got 0"),
    (lambda m: utility(m, {"s": some(4)}, binning="x"), "got 15 and 'x'"),
    (lambda m: utility(m, {"s": some(4)}, retrained=nn.Linear(4, 2)), "retrained"),
    (lambda m: utility(m, {"s": (some(4)[0], torch.full((4,), 3))}), "s: got labels from 3 to 3"),
    (lambda m: utility(m, {"s": (torch.zeros(0, 4), torch.zeros(0).long())}), "s: got no samples"),
])  # fmt: skip
def test_refusals(model, call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(model)
