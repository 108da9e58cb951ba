"""Model in, numbers out."""
from .accuracy import accuracy, evaluate, predict
from .angle import gradient_angle
from .losses import loss_distribution, sample_losses
from .privacy import Membership, membership
from .relearning import Relearning, anamnesis, relearn
from .utility import utility

__all__ = [
    "Membership", "Relearning", "accuracy", "anamnesis", "evaluate", "gradient_angle", "loss_distribution", "membership", "predict",
    "relearn", "sample_losses", "utility",
]  # fmt: skip
