"""weights: pure functions (losses, Grams) → per-sample weights w, so that a step's direction is Σ_i w_i g_i."""

from .losses import clipped, clipped_norms, lagrangian, means, w2
from .one_sided import pcgrad, upgrad
from .span import damped, project_away, project_onto, solve

__all__ = [
    "clipped", "clipped_norms", "damped", "lagrangian", "means", "pcgrad", "project_away", "project_onto", "solve",
    "upgrad", "w2",
]  # fmt: skip
