"""What capture raises."""


class CaptureError(RuntimeError):
    """The model cannot be captured as it is; the message names the parameter or module and the mend."""
