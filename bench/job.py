"""What a benchmark job is: who takes part, and the bytes and FLOPs that each has to move and do, counted by formula."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch

PACKAGES = {"opacus": "opacus", "ghost": "opacus", "torchjd": "torchjd", "backpack": "backpack", "pot": "ot", "geomloss": "geomloss"}
FLOORS = ("plain", "capture_only")  # they do less than the job, and give no result
TRUSTED = ("reference", "torch", "vmap", "vmap_qr", "authors", "autograd_loop", "torchjd", "foreach")  # first there: the one compared with


@dataclass
class Job:
    """One row of the benchmark for each provider.

    make: names wanted → {name: call}. A call returns a tensor, the same for every provider within ``tolerance`` (relative,
        in the 2-norm), but for the FLOORS. It may change its inputs: the first call of each is what is compared.
    flops, bytes: what the operation cannot do without, 0 where no formula is claimed.
    memory: provider → bytes that it needs; "" for what all of them share.
    """

    op: str
    shape: dict
    dtype: torch.dtype
    make: Callable[[Sequence[str]], dict[str, Callable]]
    providers: tuple[str, ...]
    flops: float = 0.0
    bytes: float = 0.0
    tolerance: float = 1e-3
    slow: bool = False
    memory: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return "-".join([self.op, *(f"{k}{v}" for k, v in self.shape.items()), str(self.dtype).removeprefix("torch.")])

    @property
    def whole_model(self) -> bool:
        return "model" in self.shape

    def why_not(self, provider: str) -> str:
        """Why this machine cannot run a provider; empty where it can."""
        package = PACKAGES.get(provider)
        if package and find_spec(package) is None:
            return f"{package} is not installed"
        if provider == "compile" and not compiler():
            return "no C++ compiler for torch.compile: install g++, or name one in CXX"
        need, there = 1.1 * (self.memory.get("", 0) + self.memory.get(provider, 0)), available()
        return f"needs {need / 2**30:.1f} GiB, {there / 2**30:.1f} GiB are available" if need > there else ""

    def calls(self, only: Sequence[str] | None = None) -> dict[str, Callable]:
        """The calls of those that can run, on the same tensors every time."""
        wanted = [p for p in only or self.providers if not self.why_not(p)]
        torch.manual_seed(0)
        made = self.make(wanted)
        return {p: made[p] for p in wanted}


def compiler() -> str | None:
    named = os.environ.get("CXX")
    return shutil.which(named) if named else shutil.which("g++") or shutil.which("clang++")


def available() -> float:
    """Bytes of memory that can be had without swapping; unlimited where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next((int(x.split()[1]) * 1024.0 for x in lines if x.startswith("MemAvailable")), float("inf"))


def tolerance(dtype: torch.dtype) -> float:
    return 2e-2 if dtype.itemsize == 2 else 1e-3
