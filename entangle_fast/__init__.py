"""entangle_fast: make a trained PyTorch model forget some data while keeping what is entangled with it."""

from pathlib import Path as _Path

# an uninstalled or editable checkout: kernels/ and csrc/ stand beside this folder
if (_Path(__file__).parent.parent / "csrc" / "schema.inc").exists():
    __path__.append(str(_Path(__file__).parent.parent))

__version__ = "0.1.0"

from . import methods, metrics, ops, optim, tasks, weights
from .capture import CaptureError, Tape, capture, check_capture
from .dispatch import BackendError, explain
from .job import unlearn
from .methods import (
    Entangled,
    FineTune,
    Geometric,
    GradientAscent,
    Influence,
    L1Sparse,
    Lookahead,
    NegGradPlus,
    OrthoGrad,
    Pgu,
    RandomLabels,
    Retrain,
    Rosu,
    SalUn,
    Scrub,
    Ssd,
    Woodbury,
)
from .methods.process import NonFinite
from .result import Result
from .warmup import warmup

__all__ = [
    "BackendError", "CaptureError", "Entangled", "FineTune", "Geometric", "GradientAscent", "Influence", "L1Sparse",
    "Lookahead", "NegGradPlus", "NonFinite", "OrthoGrad", "Pgu", "RandomLabels", "Result", "Retrain", "Rosu", "SalUn",
    "Scrub", "Ssd", "Tape", "Woodbury", "capture", "check_capture", "explain", "methods", "metrics", "ops", "optim",
    "tasks", "unlearn", "warmup", "weights",
]  # fmt: skip
