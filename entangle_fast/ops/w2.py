"""w2: Wasserstein-2 distances to a frozen reference, each with its per-sample weights."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import call
from . import check


def _losses(losses: Tensor, reference: Tensor) -> None:
    check.per_sample(losses=losses, reference=reference)
    check.same_device(losses=losses, reference=reference)


@check.kinds
def w2_sorted(losses: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Exact W2² between the distributions of two sets of losses (methods.md §1, the paper's closed form).

    losses (n,), reference (m,) → value () in nats², weights (n,) = ∂value/∂losses; n ≠ m is exact too.

    Equivalent to: ``(losses.sort().values - reference.sort().values).square().mean()`` for n = m
    """
    _losses(losses, reference)
    return call("w2_sorted", losses, reference)


@check.kinds
def w2_moments(losses: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """(μ − μ̄)² + (σ − σ̄)²: W2² between Gaussians with the two sets' moments (population σ).

    losses (n,), reference (m,) → value (), weights (n,) = ∂value/∂losses.

    Equivalent to: ``(losses.mean() - reference.mean()) ** 2 + (losses.std(correction=0) - reference.std(correction=0)) ** 2``
    """
    _losses(losses, reference)
    return call("w2_moments", losses, reference)


@check.kinds
def w2_features(features: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """W2² between Gaussians fitted to two sets of feature vectors (Bures metric).

    features (n, d), reference (m, d) → value (), weights (n, d) = ∂value/∂features.

    Equivalent to: ``x, y = features - features.mean(0), reference - reference.mean(0);
    (features.mean(0) - reference.mean(0)).square().sum() + x.square().sum() / len(x) + y.square().sum() / len(y)
    - 2 * torch.linalg.matrix_norm(x @ y.T, "nuc") / (len(x) * len(y)) ** 0.5``
    """
    for name, x in (("features", features), ("reference", reference)):
        check.require(x.dim() == 2 and len(x) > 0, f"{name}: shape {tuple(x.shape)}; needs vectors (n, d), n >= 1")
    check.require(features.shape[1] == reference.shape[1],
                  f"reference: width {reference.shape[1]} against {features.shape[1]} in features")  # fmt: skip
    check.same_device(features=features, reference=reference)
    check.floating(features=features, reference=reference)
    return call("w2_features", features, reference)
