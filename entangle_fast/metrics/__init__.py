"""Model in, numbers out."""
from .accuracy import accuracy, evaluate, predict
from .losses import loss_distribution, sample_losses

__all__ = ["accuracy", "evaluate", "loss_distribution", "predict", "sample_losses"]
