"""Integer tables on the device (pointers, strides, sizes of many tensors) without a host synchronisation."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cache import cached, capturing

_ARGS = 16


@triton.jit(do_not_specialize=["count", *(f"v{i}" for i in range(_ARGS))])
def _write(
    out, count,
    v0: tl.int64, v1: tl.int64, v2: tl.int64, v3: tl.int64, v4: tl.int64, v5: tl.int64, v6: tl.int64,
    v7: tl.int64, v8: tl.int64, v9: tl.int64, v10: tl.int64, v11: tl.int64, v12: tl.int64, v13: tl.int64,
    v14: tl.int64, v15: tl.int64,
):  # fmt: skip
    """out[e] = v_e for e < count: the values travel as kernel arguments, which a CUDA graph stores."""
    tl.store(out + 0, v0, mask=count > 0)
    tl.store(out + 1, v1, mask=count > 1)
    tl.store(out + 2, v2, mask=count > 2)
    tl.store(out + 3, v3, mask=count > 3)
    tl.store(out + 4, v4, mask=count > 4)
    tl.store(out + 5, v5, mask=count > 5)
    tl.store(out + 6, v6, mask=count > 6)
    tl.store(out + 7, v7, mask=count > 7)
    tl.store(out + 8, v8, mask=count > 8)
    tl.store(out + 9, v9, mask=count > 9)
    tl.store(out + 10, v10, mask=count > 10)
    tl.store(out + 11, v11, mask=count > 11)
    tl.store(out + 12, v12, mask=count > 12)
    tl.store(out + 13, v13, mask=count > 13)
    tl.store(out + 14, v14, mask=count > 14)
    tl.store(out + 15, v15, mask=count > 15)


@triton.jit
def pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """An address from a table as a pointer; hinted after the cast, before which Triton 3.6 and 3.9 lose the hint."""
    p = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p


def write_by_arguments(values: list[int], device: torch.device) -> Tensor:
    """The table as kernel arguments: the only way into a graph capture that reads no host memory at replay."""
    out = torch.empty(len(values), dtype=torch.int64, device=device)
    for lo in range(0, len(values), _ARGS):
        part = values[lo : lo + _ARGS]
        _write[(1,)](out[lo:], len(part), *part, *([0] * (_ARGS - len(part))))
    return out


def table(values: list[int], device: torch.device) -> Tensor:
    """``values`` as int64 on ``device``; the same values again cost nothing."""

    def make():
        if capturing(device):
            return write_by_arguments(values, device)
        if device.type == "cuda":  # compiled and loaded now: a capture that comes next can do neither
            cached("writer", device, lambda: write_by_arguments([0], device))
        host = torch.tensor(values, dtype=torch.int64)
        return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host

    return cached(("table", tuple(values)), device, make)
