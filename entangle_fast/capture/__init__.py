"""capture: one forward and one backward that leave, for each parameter, the factors of its per-sample gradients."""

from .errors import CaptureError
from .tape import Tape, capture, check_capture

__all__ = ["CaptureError", "Tape", "capture", "check_capture"]
