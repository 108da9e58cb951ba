"""Which of a kernel's few configurations runs: the first, unless a sweep on this device found another faster.

Never timed inside a call: a step stays free of host synchronisation, and the order of summation, and so every
bit of the result, depends on the committed default or on the file that ``sweep`` wrote, not on a race.
"""

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


def config(kernel: str, configs: list[dict], key: str = "") -> dict:
    """The configuration for ``kernel`` on problems of kind ``key`` (a dtype, say)."""
    index = _chosen().get(f"{kernel}/{key}", 0)
    return configs[index if index < len(configs) else 0]


def sweep(kernel: str, configs: list[dict], key: str, run) -> int:
    """Time ``run()`` under each configuration and keep the fastest for this device; returns its index."""
    chosen, times = _chosen(), []
    for index in range(len(configs)):
        chosen[f"{kernel}/{key}"] = index
        times.append(triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median"))
    best = min(range(len(configs)), key=times.__getitem__)
    chosen[f"{kernel}/{key}"] = best
    _path().parent.mkdir(parents=True, exist_ok=True)
    _path().write_text(json.dumps(chosen, indent=1, sort_keys=True))
    return best
