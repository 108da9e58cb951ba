"""Pay for Triton's compilations before the first step."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch

from .dispatch import BackendError

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def warmup(
    device: str | torch.device | int = "cuda", dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32), *, sweep: bool = False
) -> None:
    """Compile every Triton kernel and launch it once, on small tensors, so that the first step does not wait for that.

    To be called before anything is timed or captured into a CUDA graph: neither a compilation nor the first upload of a
    pointer table belongs there. Compiled kernels stay on disk (TRITON_CACHE_DIR); the CUDA C++ kernels need no compilation.

    Args:
        device: a CUDA or ROCm device.
        dtypes: of bfloat16, float16, float32; the dtypes of parameters and activations.
        sweep: also time the few configurations of each matrix kernel and keep the fastest for this device, in a file in
            XDG_CACHE_HOME that later processes read; the order of sums, and so the last bits of results, follow it.

    Not yet run on a GPU.

    Raises: BackendError where triton or a GPU is missing; ValueError for a device that is no GPU and for other dtypes.
    """
    device = torch.device(device)
    if device.type != "cuda":  # HIP devices are called "cuda" too
        raise ValueError(f"device: got {str(device)!r}; Triton kernels run on a GPU: give 'cuda' or 'cuda:<number>'")
    if wrong := [d for d in dtypes if d not in DTYPES]:
        raise ValueError(f"dtypes: got {wrong[0]}; needs some of {', '.join(map(str, DTYPES))}")
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = f"torch {torch.__version__} sees none" if built else f"torch {torch.__version__} is built without CUDA and ROCm"
        raise BackendError(f"warmup: no GPU: {why}; on the CPU there is nothing to compile")
    if (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: got {str(device)!r}; this machine has {torch.cuda.device_count()}, counted from 0")
    try:
        kernels = importlib.import_module(f"{__package__}.kernels.warmup")
    except ModuleNotFoundError as error:
        raise BackendError(f"warmup: {error.name} is not installed; `pip install 'entangle_fast[triton]'`") from error
    with torch.cuda.device(device):
        kernels.warmup(torch.device("cuda", torch.cuda.current_device()), tuple(dtypes), sweep)
        torch.cuda.synchronize()
