"""What is made once on a device and kept: tables of pointers and indices, counters."""

import torch
from torch import Tensor

_KEPT = 4096
_made: dict = {}
_in_graphs: dict = {}  # what a captured graph reads: replays may come for as long as the process lives


class _Made:
    """A value, the stream that fills it, and an event behind its filling until that is known to be over."""

    def __init__(self, value, device: torch.device):
        self.value, self.stream, self.filled = value, None, None
        if device.type == "cuda":
            self.stream = torch.cuda.current_stream(device)
            self.filled = self.stream.record_event()

    def use(self, device: torch.device) -> None:
        """Nothing where it is used on its own stream; another waits for the filling, and its memory for the other's use."""
        if self.stream is None or (here := torch.cuda.current_stream(device)) == self.stream:
            return
        if self.filled is not None:
            if self.filled.query():
                self.filled = None
            else:
                here.wait_event(self.filled)
        for x in self.value if isinstance(self.value, tuple) else (self.value,):
            if isinstance(x, Tensor):
                x.record_stream(here)


def capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def cached(key, device: torch.device, make):
    """``make()``, kept by ``key`` and device; what is made inside a graph capture is the graph's, whose replays alone fill it."""
    key = (key, device)
    found, recording = _made.get(key), capturing(device)
    if found is None:
        value = make()
        if not recording:
            if len(_made) >= _KEPT:
                _made.clear()
                _made.update(_in_graphs)
            _made[key] = _Made(value, device)
        return value
    if recording:  # its filling is over: a capture begins with a synchronisation
        _in_graphs[key] = found
    else:
        found.use(device)
    return found.value
