"""Peak memory of a piece of work."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Peak memory above what was held at the start, in MB (10⁶ bytes): ``with PeakMemory(device) as peak: …; peak.mb``.

    CPU: the process's resident set, its high-water mark reset at the start where Linux allows it.
    CUDA: torch's allocator on ``device``.
    """

    def __init__(self, device="cpu"):
        self.device, self.mb = torch.device(device), 0.0

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
            return self
        _give_back_freed()
        try:
            _RESET.write_text("5")
        except OSError:
            pass  # then the mark is the process's own, an upper limit
        self._start = _resident("VmRSS")
        return self

    def __exit__(self, *_):
        cuda = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if cuda else _resident("VmHWM")
        self.mb = max(0.0, (peak - self._start) / 1e6)


def _give_back_freed() -> None:
    """Freed memory that the allocator still holds would hide what the work needs."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def _resident(field: str) -> int:
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
