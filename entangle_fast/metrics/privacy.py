"""Membership inference: can forgotten training samples be told from samples of the same kind that were never trained on?

Scores are larger where an attack takes a sample for a member. AUC 0.5 is what unlearning wants; an AUC far from it on either
side is a failure: above, the samples are still known; below, they stand out by how badly the model does on them.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..methods.data import Samples
from ..ops import check
from .outputs import logit_confidence, logits

ATTACKS = ("loss", "entropy", "modified_entropy", "classifier", "population", "ulira")
LOW_FPR = (0.001, 0.01)
FOLDS = 5


@dataclass
class Membership:
    """What the attacks found.

    Attributes:
        auc: attack → area under its ROC, members being the positives.
        tpr_at: attack → {FPR: the largest TPR at no more than this FPR}; FPRs below 1/nonmembers mean no false alarm at all.
        roc: attack → (fpr, tpr), float64 from (0, 0) to (1, 1), one point a distinct score.
        collapsed, why: an AUC is further from 0.5 than tolerance and chance allow, or all scores are equal; which, in words.
        members, nonmembers: how many samples of each.
    """

    auc: dict[str, float]
    tpr_at: dict[str, dict[float, float]]
    roc: dict[str, tuple[Tensor, Tensor]] = field(repr=False)
    collapsed: bool
    why: str
    members: int
    nonmembers: int

    def __str__(self) -> str:
        """As in "loss AUC 0.536, entropy AUC 0.541 (300 members, 100 nonmembers)", and why it is a failure."""
        found = ", ".join(f"{attack} AUC {value:.3f}" for attack, value in self.auc.items())
        return f"{found} ({self.members} members, {self.nonmembers} nonmembers){f'; {self.why}' if self.collapsed else ''}"

    def summary(self) -> dict:
        """All but the ROCs, as JSON takes it."""
        rates = {attack: {str(fpr): tpr for fpr, tpr in found.items()} for attack, found in self.tpr_at.items()}
        return {"auc": dict(self.auc), "tpr_at": rates, "collapsed": self.collapsed, "why": self.why,
                "members": self.members, "nonmembers": self.nonmembers}


@check.kinds
def membership(
    model: nn.Module, members: Samples, nonmembers: Samples, *, attacks=("loss", "entropy", "classifier"),
    population: Samples | None = None, shadows: tuple[Tensor, Tensor] | None = None, seed: int = 0,
    tolerance: float = 0.05, batch_size: int = 1024,
) -> Membership:  # fmt: skip
    """Attack a model's membership. For unlearning: members = forget training samples, nonmembers = test samples of the
    forgotten classes.

    Args:
        members, nonmembers: (x, y) tensors, x (n, ...), y (n,) int64, or map-style Datasets of such pairs, read in batches.
        attacks: any of
            "loss": −cross-entropy (Yeom et al., CSF 2018).
            "entropy": −entropy of the prediction.  "modified_entropy": see `modified_entropy`.
            "classifier": logistic regression on confidences, cross-validated (`classifier_scores`; needs scikit-learn).
            "population": the loss against that of other nonmembers, needs ``population`` (`population_scores`).
            "ulira": per-sample Gaussians of shadow models, needs ``shadows`` (`ulira_scores`).
        population: further nonmembers, given likewise.
        shadows: (confidence, was_in), each (k, members + nonmembers), samples in that order: `logit_confidence` of k shadow
            models, and whether the sample had been trained on and then unlearned in that one.
        seed: of the folds.  tolerance: how far from 0.5 an AUC may be; three standard errors of chance are allowed in any case.

    Raises ValueError for sets that are empty, bad labels, unknown attacks or what an attack lacks; ImportError without
    scikit-learn; FloatingPointError when logits are not finite.

    >>> import torch, entangle_fast as ef
    >>> x, y, model = torch.randn(40, 4), torch.arange(40) % 2, torch.nn.Linear(4, 2)
    >>> found = ef.metrics.membership(model, (x[:20], y[:20]), (x[20:], y[20:]), attacks=("loss",))
    >>> sorted(found.auc), found.members, found.nonmembers
    (['loss'], 20, 20)
    """
    attacks = (attacks,) if isinstance(attacks, str) else tuple(attacks)
    if unknown := [a for a in attacks if a not in ATTACKS]:
        raise ValueError(f"attacks: got {unknown[0]!r}; needs any of {', '.join(ATTACKS)}")
    if not attacks or not tolerance >= 0:
        raise ValueError(f"attacks, tolerance: got {attacks} and {tolerance}; needs at least one attack, a number >= 0")
    for name, attack, given in (("population", "population", population), ("shadows", "ulira", shadows)):
        if attack in attacks and given is None:
            raise ValueError(f"{name}: missing; the attack {attack!r} needs it")
    if "classifier" in attacks:
        _sklearn()  # before the work, not after it
    found = [logits(model, given, batch_size, name) for name, given in (("members", members), ("nonmembers", nonmembers))]
    out, y = (torch.cat(both) for both in zip(*found))
    n, m = (len(labels) for _, labels in found)
    is_member = torch.arange(n + m) < n
    scores = {}
    for attack in attacks:
        if attack == "loss":
            scores[attack] = -_losses(out, y)
        elif attack == "entropy":
            scores[attack] = -entropy(out)
        elif attack == "modified_entropy":
            scores[attack] = -modified_entropy(out, y)
        elif attack == "classifier":
            scores[attack] = classifier_scores(out, y, is_member, seed)
        elif attack == "population":
            known, known_y = logits(model, population, batch_size, "population")
            scores[attack] = population_scores(_losses(out, y), y, _losses(known, known_y), known_y)
        else:
            scores[attack] = ulira_scores(logit_confidence(out, y), *(t.cpu() for t in shadows))
    pairs = {attack: (s[:n], s[n:]) for attack, s in scores.items()}
    aucs = {attack: auc(*pair) for attack, pair in pairs.items()}
    rocs = {attack: roc(*pair) for attack, pair in pairs.items()}
    rates = {attack: {rate: tpr_at(*curve, rate) for rate in LOW_FPR} for attack, curve in rocs.items()}
    reasons = [_collapse(a, aucs[a], len(rocs[a][0]) == 2, n, m, tolerance) for a in attacks]
    why = "; ".join(r for r in reasons if r)
    return Membership(aucs, rates, rocs, bool(why), why, n, m)


def _collapse(attack: str, value: float, constant: bool, n: int, m: int, tolerance: float) -> str:
    """Why this AUC is a failure, or nothing."""
    if constant:
        return f"{attack}: all scores are equal, so that 0.5 says nothing: the model answers everything alike"
    chance = 3 * math.sqrt((n + m + 1) / (12 * n * m))  # of the Mann–Whitney statistic when nothing can be told
    if abs(value - 0.5) <= max(tolerance, chance):
        return ""
    told = "the forgotten samples are still known" if value > 0.5 else "forgetting itself shows: they stand out as unlike unseen samples"
    return f"{attack}: AUC {value:.3f}, {told}"


def auc(members: Tensor, nonmembers: Tensor) -> float:
    """P(a member's score > a nonmember's) + ½ P(equal), from mid-ranks (Mann–Whitney).  (n,), (m,) → a number in [0, 1]."""
    scores = _both(members, nonmembers)
    _, place, counts = scores.unique(return_inverse=True, return_counts=True)
    counts = counts.double()
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[place]
    n, m = len(members), len(nonmembers)
    return ((ranks[:n].sum() - n * (n + 1) / 2) / (n * m)).item()


def roc(members: Tensor, nonmembers: Tensor) -> tuple[Tensor, Tensor]:
    """(fpr, tpr) at every distinct threshold, from none to all: float64, one longer than the distinct scores."""
    scores = _both(members, nonmembers)
    order = scores.argsort(descending=True)
    hit = (order < len(members)).double()
    ranked = scores[order]
    ends = torch.cat([ranked[1:] != ranked[:-1], torch.ones(1, dtype=torch.bool)])  # equal scores are taken together
    tpr, fpr = hit.cumsum(0)[ends] / len(members), (1 - hit).cumsum(0)[ends] / len(nonmembers)
    return torch.cat([fpr.new_zeros(1), fpr]), torch.cat([tpr.new_zeros(1), tpr])


def tpr_at(fpr: Tensor, tpr: Tensor, rate: float) -> float:
    """The largest TPR at an FPR of at most ``rate``; no interpolation between points."""
    return tpr[fpr <= rate].max().item()


def _both(members: Tensor, nonmembers: Tensor) -> Tensor:
    scores = torch.cat([members, nonmembers]).double()
    if not len(members) or not len(nonmembers) or scores.dim() != 1 or torch.isnan(scores).any():
        raise ValueError(f"scores: got {len(members)} of members and {len(nonmembers)} of nonmembers, "
                         f"{int(torch.isnan(scores).sum())} NaN; needs (n,) and (m,), n, m > 0, without NaN")
    return scores


# ---- scores ----


def _losses(out: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(out, y, reduction="none")


def entropy(out: Tensor) -> Tensor:
    """Entropy of the predictions in nats.  logits (n, C) → (n,)."""
    p = out.log_softmax(1)
    return -(p.exp() * p).sum(1)


def modified_entropy(out: Tensor, y: Tensor) -> Tensor:
    """−(1 − p_y) log p_y − Σ_{c≠y} p_c log(1 − p_c), in nats.  logits (n, C), y (n,) → (n,).

    Song & Mittal, "Systematic Evaluation of Privacy Risks of Machine Learning Models", USENIX Security 2021 [paper]: unlike
    the entropy it tells a confident wrong answer from a right one.
    """
    own = torch.nn.functional.one_hot(y, out.shape[1]).bool()
    log_p = out.log_softmax(1)
    top = log_p.argmax(1)
    log_rest = torch.log1p(-log_p.exp())
    # the one 1 − p_c that may round to 0
    log_rest.scatter_(1, top[:, None], (log_p.gather(1, top[:, None])[:, 0] - logit_confidence(out, top))[:, None])
    terms = torch.where(own, log_rest.exp() * log_p, log_p.exp() * log_rest)
    return -terms.sum(1)


def classifier_scores(out: Tensor, y: Tensor, is_member: Tensor, seed: int = 0) -> Tensor:
    """Log-odds of membership from a logistic regression that has not seen the sample.

    Features [ours]: `logit_confidence` of the label and the ten largest log-probabilities in order, standardised. Stratified
    folds, 5 or as many as the smaller class has samples; classes weighted alike. Scores of all folds are pooled, which for
    a handful of samples draws the AUC a little below that of one fold.

    logits (n, C), y (n,), is_member (n,) bool → (n,). Raises ImportError without scikit-learn.
    """
    make_pipeline, StandardScaler, LogisticRegression, StratifiedKFold, cross_val_predict = _sklearn()
    smaller = int(min(is_member.sum(), (~is_member).sum()))
    if smaller < 2:
        raise ValueError(f"classifier: the smaller set has {smaller} samples; needs at least 2 members and 2 nonmembers")
    top = out.log_softmax(1).sort(1, descending=True).values[:, :10]
    features = torch.cat([logit_confidence(out, y).unsqueeze(1), top], 1).numpy()
    folds = StratifiedKFold(min(FOLDS, smaller), shuffle=True, random_state=seed)
    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, class_weight="balanced"))
    found = cross_val_predict(regression, features, is_member.numpy(), cv=folds, method="decision_function")
    return torch.from_numpy(found)


def _sklearn():
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold, cross_val_predict
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError("the attack 'classifier' needs scikit-learn: pip install scikit-learn, or leave it out of attacks=") from error
    return make_pipeline, StandardScaler, LogisticRegression, StratifiedKFold, cross_val_predict


def population_scores(losses: Tensor, y: Tensor, known: Tensor, known_y: Tensor) -> Tensor:
    """−p, p = (1 + #{population losses of the same label ≤ ℓ_i}) / (1 + #{of that label}).  (n,), (n,), (m,), (m,) → (n,).

    The population attack of Ye et al., "Enhanced Membership Inference Attacks against Machine Learning Models", CCS 2022
    [paper], thresholds the loss at a quantile of the population's; a threshold for each label and the count of one are [ours]:
    p ≤ α then has FPR ≤ α for samples drawn as the population is.
    """
    scores = torch.empty_like(losses, dtype=torch.float64)
    for label in y.unique():
        same = known[known_y == label].sort().values
        if not len(same):
            raise ValueError(f"population: no sample of label {int(label)}; needs some of every label that is attacked")
        mine = y == label
        scores[mine] = -(1 + torch.searchsorted(same, losses[mine], right=True)).double() / (1 + len(same))
    return scores


def ulira_scores(target: Tensor, confidence: Tensor, was_in: Tensor, variance: str = "sample") -> Tensor:
    """log N(φ_i; μ_in, σ_in) − log N(φ_i; μ_out, σ_out): the U-LiRA attack, per sample.

    Kurmanji et al., NeurIPS 2023 and Hayes et al., arXiv 2403.01218 [paper], after Carlini et al., S&P 2022: shadow models
    that were trained on the sample and unlearned it, against such that never saw it.

    Args:
        target: (n,) `logit_confidence` of the attacked model.
        confidence: (k, n) of the shadow models.  was_in: (k, n) bool: trained on and then unlearned.
        variance: "sample", or "global": one over all samples for each side, for less than some 64 shadow models.

    Raises ValueError for shapes that do not fit, or a sample with too few shadows on a side (2, or 1 with "global").
    """
    if confidence.dim() != 2 or confidence.shape != was_in.shape or confidence.shape[1:] != target.shape or was_in.dtype != torch.bool:
        raise ValueError(f"shadows: got confidences {tuple(confidence.shape)} and {was_in.dtype} {tuple(was_in.shape)} for "
                         f"{len(target)} samples; needs (k, {len(target)}) of each, the second bool")
    if variance not in ("sample", "global"):
        raise ValueError(f"variance: got {variance!r}; needs 'sample' or 'global'")
    if not torch.isfinite(confidence).all():
        raise ValueError("shadows: confidences are not finite; needs logit_confidence of finite logits")
    least = 2 if variance == "sample" else 1
    sides = []
    for name, mask in (("in", was_in), ("out", ~was_in)):
        if int(mask.sum(0).min()) < least:
            raise ValueError(f"shadows: a sample is {name} in {int(mask.sum(0).min())} of the models; needs at least {least}")
        w = mask.double()
        mean = (w * confidence).sum(0) / w.sum(0)
        squares = w * (confidence - mean) ** 2
        # less one degree of freedom for each mean that was fitted
        spread = squares.sum(0) / (w.sum(0) - 1) if variance == "sample" else squares.sum() / (w.sum() - len(target))
        if not (spread > 0).all():
            raise ValueError(f"shadows: the models agree on a sample that is {name}, its variance is 0; needs variance='global', "
                             "or models trained with different seeds")
        sides.append(-0.5 * ((target - mean) ** 2 / spread + spread.log()))
    return sides[0] - sides[1]
