"""Which of a kernel's few configurations runs: the first, unless a sweep on this device found another faster.

A configuration with ``on`` is for GPUs of that major compute capability alone, and comes before the others there where
operands are aligned: else their elements come one by one through registers, of which it leaves none.
Never timed inside a call: a step stays free of host synchronisation, and the order of summation, and so every
bit of the result, depends on the committed default or on the file that ``sweep`` wrote, not on a race.
"""

import functools
import json
import os
from pathlib import Path

import torch
import triton

_CHOSEN: dict[str, int] | None = None


def _path() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = torch.cuda.get_device_name().replace(" ", "_") if torch.cuda.is_available() else "cpu"
    return Path(cache) / "entangle_fast" / f"triton-{triton.__version__}-{name}.json"


def _chosen() -> dict[str, int]:
    global _CHOSEN
    if _CHOSEN is None:
        try:
            _CHOSEN = json.loads(_path().read_text())
        except (OSError, ValueError):
            _CHOSEN = {}
    return _CHOSEN


@functools.cache
def _capability(index: int) -> int:
    return torch.cuda.get_device_capability(index)[0]


def major() -> int | None:
    """The major compute capability of the current GPU; None without one, and on AMD's."""
    return _capability(torch.cuda.current_device()) if torch.cuda.is_available() and torch.version.hip is None else None


def _served(configs: list[dict], aligned: bool = True) -> list[int]:
    """Those for this device, its own ones first."""
    own = [i for i, c in enumerate(configs) if aligned and "on" in c and c["on"] == major()]
    return own + [i for i, c in enumerate(configs) if "on" not in c]


def config(kernel: str, configs: list[dict], key: str = "", aligned: bool = True) -> dict:
    """The configuration for ``kernel`` on problems of kind ``key`` (a dtype, say)."""
    served = _served(configs, aligned)
    index = _chosen().get(f"{kernel}/{key}")
    return {k: v for k, v in configs[index if index in served else served[0]].items() if k != "on"}


def sweep(kernel: str, configs: list[dict], key: str, run) -> int:
    """Time ``run()`` under each configuration and keep the fastest for this device; returns its index."""
    chosen, times = _chosen(), {}
    for index in _served(configs):
        chosen[f"{kernel}/{key}"] = index
        times[index] = triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median")
    best = min(times, key=times.get)
    chosen[f"{kernel}/{key}"] = best
    _path().parent.mkdir(parents=True, exist_ok=True)
    _path().write_text(json.dumps(chosen, indent=1, sort_keys=True))
    return best
