"""capture: one forward and one backward that leave, for each parameter, the factors of its per-sample gradients."""

from .context import capture, check_capture
from .errors import CaptureError
from .tape import Tape

__all__ = ["CaptureError", "Tape", "capture", "check_capture"]
