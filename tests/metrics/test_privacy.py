import json
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from pretend import DEVICE, pretended
from sklearn.metrics import roc_auc_score, roc_curve
from torch import nn

from entangle_fast.metrics import membership
from entangle_fast.metrics.outputs import logit_confidence, logits
from entangle_fast.metrics.privacy import (
    auc,
    classifier_scores,
    entropy,
    modified_entropy,
    population_scores,
    roc,
    tpr_at,
    ulira_scores,
)

F64 = torch.float64


class AsIs(nn.Module):
    def forward(self, x):
        return x


def drawn(n, margin=0.0, seed=0, classes=3):
    """Logits (n, C) float32 whose label is ``margin`` higher on average, and the labels."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=g)
    return torch.randn(n, classes, generator=g) + margin * F.one_hot(y, classes), y


# ---- curves ----


@pytest.mark.parametrize("ties", [False, True])
def test_auc_and_roc_agree_with_scikit_learn(generator, ties):
    members, others = torch.randn(40, generator=generator) + 0.5, torch.randn(70, generator=generator)
    if ties:
        members, others = members.round(), others.round()
    truth, scores = torch.cat([torch.ones(40), torch.zeros(70)]), torch.cat([members, others])
    assert auc(members, others) == pytest.approx(roc_auc_score(truth, scores), abs=1e-14)
    fpr, tpr = roc(members, others)
    theirs = roc_curve(truth, scores, drop_intermediate=False)
    torch.testing.assert_close(fpr, torch.from_numpy(theirs[0]))
    torch.testing.assert_close(tpr, torch.from_numpy(theirs[1]))
    assert torch.trapezoid(tpr, fpr).item() == pytest.approx(auc(members, others), abs=1e-14)


def test_auc_by_hand():
    assert auc(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 0.0])) == (1 + 1 + 0.5 + 1) / 4
    assert auc(torch.tensor([torch.inf]), torch.tensor([torch.inf, -torch.inf])) == 0.75
    assert auc(torch.zeros(3), torch.zeros(5)) == 0.5


def test_tpr_at_does_not_interpolate():
    fpr, tpr = roc(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.0]))
    assert tpr_at(fpr, tpr, 0.0) == tpr_at(fpr, tpr, 0.49) == 0.5 and tpr_at(fpr, tpr, 0.5) == 1.0


@pytest.mark.parametrize("members, others", [([], [1.0]), ([1.0], []), ([torch.nan], [1.0])])
def test_curves_refuse(members, others):
    for call in (auc, roc):
        with pytest.raises(ValueError, match="scores: got"):
            call(torch.tensor(members), torch.tensor(others))


# ---- scores ----


def test_logit_confidence_by_definition_and_without_overflow():
    out, y = drawn(9)
    p = out.double().softmax(1)[torch.arange(9), y]
    torch.testing.assert_close(logit_confidence(out, y), (p / (1 - p)).log())
    torch.testing.assert_close(logit_confidence(torch.stack([out, 2 * out]), y)[1], logit_confidence(2 * out, y))
    assert logit_confidence(torch.tensor([[900.0, 0.0]]), torch.tensor([0])).item() == 900.0


def test_entropies_by_definition():
    out, y = drawn(9)
    out = out.double()
    p = out.softmax(1)
    torch.testing.assert_close(entropy(out), -(p * p.log()).sum(1))
    expected = []
    for row, c in zip(p.tolist(), y.tolist()):
        others = sum(q * math.log(1 - q) for k, q in enumerate(row) if k != c)
        expected.append(-(1 - row[c]) * math.log(row[c]) - others)
    torch.testing.assert_close(modified_entropy(out, y), torch.tensor(expected, dtype=F64))
    sure = torch.tensor([[300.0, 0.0, 0.0]] * 2, dtype=F64)
    right, wrong = modified_entropy(sure, torch.tensor([0, 1])).tolist()
    assert 0 <= right < 1e-100 and wrong == pytest.approx(600 - math.log(2))  # −log p_y − log(1 − p_0)


def test_classifier_sees_what_no_threshold_does():
    # members have a label's margin of 0 or 6, others of 3: no threshold on the loss tells them
    g = torch.Generator().manual_seed(1)
    y = torch.zeros(400).long()
    z = torch.randn(400, 3, generator=g, dtype=F64) * 0.3
    member = torch.arange(400) < 200
    z[:200, 1] += 2.0  # a second choice that only members have
    scores = classifier_scores(z, y, member)
    assert auc(scores[member], scores[~member]) > 0.95
    assert torch.equal(scores, classifier_scores(z, y, member)) and not torch.equal(scores, classifier_scores(z, y, member, seed=1))


def test_classifier_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match="pip install scikit-learn, or leave it out"):
        membership(AsIs(), drawn(5), drawn(5))
    assert membership(AsIs(), drawn(5), drawn(5, seed=1), attacks="loss").members == 5


def test_population_scores_by_counting():
    losses, y = torch.tensor([0.5, 2.0, 1.0], dtype=F64), torch.tensor([0, 0, 1])
    known, labels = torch.tensor([1.0, 2.0, 3.0, 1.0], dtype=F64), torch.tensor([0, 0, 0, 1])
    assert (-population_scores(losses, y, known, labels)).tolist() == [1 / 4, 3 / 4, 1.0]
    with pytest.raises(ValueError, match="population: no sample of label 1"):
        population_scores(losses, y, known[:3], labels[:3])


def test_population_keeps_its_false_alarms():
    known, others = (drawn(4000, seed=s) for s in (1, 2))
    scores = population_scores(*(f(*s) for s in (others, known) for f in (lambda x, y: F.cross_entropy(x, y, reduction="none"),
                                                                         lambda x, y: y)))  # fmt: skip
    assert (-scores <= 0.05).double().mean().item() == pytest.approx(0.05, abs=0.012)


@pytest.mark.parametrize("variance", ["sample", "global"])
def test_ulira_is_the_ratio_of_two_gaussians(variance):
    g = torch.Generator().manual_seed(3)
    phi, was_in = torch.randn(12, 5, generator=g, dtype=F64), torch.rand(12, 5, generator=g) < 0.5
    target = torch.randn(5, generator=g, dtype=F64)
    expected = []
    for i in range(5):
        sides = []
        for mask in (was_in, ~was_in):
            mine = phi[mask[:, i], i]
            residues = torch.cat([phi[mask[:, j], j] - phi[mask[:, j], j].mean() for j in range(5)])
            sigma = mine.std() if variance == "sample" else (residues.square().sum() / (len(residues) - 5)).sqrt()
            sides.append(torch.distributions.Normal(mine.mean(), sigma).log_prob(target[i]))
        expected.append(sides[0] - sides[1])
    torch.testing.assert_close(ulira_scores(target, phi, was_in, variance), torch.stack(expected))


def test_ulira_finds_samples_that_a_loss_threshold_does_not():
    # each sample has its own difficulty, much wider than what membership adds
    g = torch.Generator().manual_seed(4)
    n, k = 300, 32
    hard = 10 * torch.randn(n, generator=g, dtype=F64)
    was_in = torch.rand(k, n, generator=g) < 0.5
    phi = hard + 2.0 * was_in + 0.5 * torch.randn(k, n, generator=g, dtype=F64)
    member = torch.arange(n) < 150
    target = hard + 2.0 * member + 0.5 * torch.randn(n, generator=g, dtype=F64)
    scores = ulira_scores(target, phi, was_in)
    assert auc(scores[:150], scores[150:]) > 0.98 and abs(auc(target[:150], target[150:]) - 0.5) < 0.15


@pytest.mark.parametrize("change, message", [
    (dict(confidence=torch.zeros(4, 3)), "shadows: got confidences"), (dict(was_in=torch.ones(4, 2)), "the second bool"),
    (dict(was_in=torch.ones(4, 2).bool()), "is out in 0 of the models"), (dict(variance="mean"), "variance: got 'mean'"),
    (dict(confidence=torch.zeros(4, 2)), "its variance is 0"), (dict(confidence=torch.full((4, 2), torch.nan)), "not finite"),
])  # fmt: skip
def test_ulira_refuses(change, message):
    was_in = (torch.arange(4) < 2)[:, None].expand(4, 2)
    good = dict(target=torch.zeros(2), confidence=torch.arange(8.0).view(4, 2), was_in=was_in)
    with pytest.raises(ValueError, match=message):
        ulira_scores(**{**good, **change})


# ---- the whole ----


def test_nothing_to_tell():
    found = membership(AsIs(), drawn(600, seed=1), drawn(500, seed=2), attacks=("loss", "entropy", "modified_entropy", "classifier"))
    assert all(abs(v - 0.5) < 0.05 for v in found.auc.values()) and not found.collapsed and found.why == ""
    assert (found.members, found.nonmembers) == (600, 500) and set(found.tpr_at["loss"]) == {0.001, 0.01}


@pytest.mark.parametrize("margin, why", [(1.5, "still known"), (-1.5, "forgetting itself shows")])
def test_far_from_a_half_on_either_side_is_a_failure(margin, why):
    found = membership(AsIs(), drawn(300, margin), drawn(300, seed=1))
    assert found.collapsed and why in found.why and "loss: AUC" in found.why
    assert (found.auc["loss"] > 0.5) == (margin > 0) and found.auc["classifier"] > 0.6  # it learns the sign
    assert found.tpr_at["loss"][0.01] >= found.tpr_at["loss"][0.001]


def test_a_constant_model_is_a_failure():
    x, y = torch.zeros(50, 3), torch.zeros(50).long()
    found = membership(AsIs(), (x, y), (x, y), attacks=("loss", "entropy"))
    assert found.auc == {"loss": 0.5, "entropy": 0.5} and found.collapsed and "answers everything alike" in found.why


def test_few_samples_are_allowed_their_chance():
    found = membership(AsIs(), drawn(8, seed=110), drawn(8, seed=10), attacks="loss")
    assert 0.05 < abs(found.auc["loss"] - 0.5) < 0.44 and not found.collapsed


def test_all_attacks_and_summary():
    n = 60
    g = torch.Generator().manual_seed(0)
    shadows = torch.randn(8, 2 * n, generator=g), (torch.arange(8) % 2 == 0)[:, None].expand(8, 2 * n)
    found = membership(AsIs(), drawn(n, 1.0), drawn(n, seed=1), population=drawn(200, seed=2), shadows=shadows,
                       attacks=("loss", "entropy", "modified_entropy", "classifier", "population", "ulira"))  # fmt: skip
    summary = json.loads(json.dumps(found.summary()))
    assert str(found).startswith(f"{next(iter(found.auc))} AUC {next(iter(found.auc.values())):.3f}, ") and "\n" not in str(found)
    assert f"({found.members} members, {found.nonmembers} nonmembers)" in str(found) and str(found).endswith(found.why)
    assert set(summary["auc"]) == set(found.roc) == set(summary["tpr_at"]) and len(summary["auc"]) == 6
    assert summary["tpr_at"]["loss"] == {"0.001": found.tpr_at["loss"][0.001], "0.01": found.tpr_at["loss"][0.01]}
    assert summary["collapsed"] is True and summary["members"] == n
    with pretended():
        there = tuple(t.to(DEVICE) for t in shadows)
        again = membership(AsIs(), drawn(n, 1.0), drawn(n, seed=1), shadows=there, attacks="ulira")
    assert again.auc["ulira"] == found.auc["ulira"]


@pytest.mark.parametrize("change, message", [
    (dict(attacks=("los",)), "attacks: got 'los'"), (dict(attacks=()), "at least one attack"), (dict(tolerance=-1), "tolerance"),
    (dict(attacks="population"), "population: missing"), (dict(attacks="ulira"), "shadows: missing"),
    (dict(members=(torch.zeros(0, 3), torch.zeros(0).long())), "members: got no samples"),
    (dict(members=(torch.zeros(2, 3), torch.tensor([0, 3]))), "members: got labels from 0 to 3"),
    (dict(members=(torch.zeros(2, 3), torch.tensor([0]))), "members: 2 samples but 1 labels"),
    (dict(members=(torch.zeros(2, 1), torch.zeros(2).long())), "C >= 2"),
    (dict(members=drawn(1), attacks="classifier"), "the smaller set has 1 samples"),
])  # fmt: skip
def test_membership_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        membership(AsIs(), **{"members": drawn(4), "nonmembers": drawn(4, seed=1), **change})


def test_outputs_are_float64_and_finite():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    x, y = drawn(5)
    out, labels = logits(model, (x, y), batch_size=2)
    torch.testing.assert_close(out, model[0](x).double().detach())
    assert torch.equal(labels, y) and out.dtype == F64 and model.training and model[1].training
    with pytest.raises(FloatingPointError, match="not finite"):
        logits(AsIs(), (x * torch.nan, y))
