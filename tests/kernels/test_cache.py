"""What kernels keep on the device, under a clock of fake streams and captures: no GPU is needed for the order of events."""

import pytest
import torch

pytest.importorskip("triton")

from entangle_fast.kernels import cache  # noqa: E402

GPU = torch.device("cuda", 0)


class Event:
    def __init__(self):
        self.over, self.asked = False, 0

    def query(self):
        self.asked += 1
        return self.over


class Stream:
    def __init__(self):
        self.events, self.waits = [], []

    def record_event(self):
        self.events.append(Event())
        return self.events[-1]

    def wait_event(self, event):
        self.waits.append(event)


class Table(torch.Tensor):
    """A tensor that remembers the streams it was handed to."""

    def record_stream(self, stream):
        self.__dict__.setdefault("streams", []).append(stream)


class Device:
    def __init__(self):
        self.here, self.recording = Stream(), False


@pytest.fixture
def device(monkeypatch):
    device = Device()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: device.here)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: device.recording)
    monkeypatch.setattr(cache, "_made", {})
    monkeypatch.setattr(cache, "_in_graphs", {})
    return device


def make():
    return torch.zeros(3).as_subclass(Table)


def test_its_own_stream_waits_for_nothing(device):
    one = cache.cached("a", GPU, make)
    assert cache.cached("a", GPU, make) is one
    assert not device.here.waits and not device.here.events[0].asked and not hasattr(one, "streams")


def test_another_stream_waits_until_it_is_filled(device):
    one, first = cache.cached("a", GPU, lambda: (make(), make())), device.here
    device.here = Stream()
    assert cache.cached("a", GPU, make) is one
    assert device.here.waits == first.events and all(x.streams == [device.here] for x in one)
    first.events[0].over, device.here = True, Stream()
    for _ in range(2):
        cache.cached("a", GPU, make)
    assert not device.here.waits and first.events[0].asked == 2  # once it was over nobody asked again


def test_what_a_graph_fills_is_its_own(device):
    device.recording = True
    one = cache.cached("a", GPU, make)
    assert cache.cached("a", GPU, make) is not one and not device.here.events
    device.recording = False
    assert cache.cached("a", GPU, make) is not one


def test_what_a_graph_reads_outlives_the_others(device, monkeypatch):
    monkeypatch.setattr(cache, "_KEPT", 3)
    read, other = (cache.cached(key, GPU, make) for key in ("read", "other"))
    device.recording, device.here = True, Stream()
    assert cache.cached("read", GPU, make) is read and not device.here.waits
    device.recording = False
    for key in range(5):
        cache.cached(key, GPU, make)
    assert cache.cached("read", GPU, make) is read and cache.cached("other", GPU, make) is not other
    assert len(cache._made) <= 3


def test_on_the_cpu_it_is_only_kept():
    assert cache.cached("a", torch.device("cpu"), make) is cache.cached("a", torch.device("cpu"), make)
