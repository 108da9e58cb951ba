"""The CUDA kernels and their bindings on the CPU: everything in csrc/cuda by g++ in one library, torch.ops.entangle_fast_cuda_host.

    cuda = ops()
    cuda.step_gram(cpu_tensors, 2)

What a kernel may touch is exactly the tensors that its binding hands over (span.h); anything else is a RuntimeError.
"""

import ctypes
import functools
import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from build import BINDING_FLAGS, CUDA, FLAGS, HERE, LIBRARIES, _cache

# "sm_80", "sm_90a", "sm_100": what nvcc makes of the sources for it (tests/ptx), in the emulator's place
COMPILED = os.environ.get("EF_CUDA_COMPILED") or None
if COMPILED:
    sys.path.insert(0, str(HERE.parent / "ptx"))
    import nvcc


def _object(source: Path, more: list[str], shared: bytes) -> Path:
    """Compiled once for each content of the source and of the headers."""
    key = hashlib.sha256(source.read_bytes() + shared + " ".join([*FLAGS, *more]).encode()).hexdigest()[:16]
    output = _cache() / f"{source.stem}-{key}.o"
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        part = output.with_suffix(f".{os.getpid()}")
        flags = [f for f in FLAGS if f != "-shared"]
        command = [os.environ.get("CXX", "g++"), *flags, *more, f"-I{HERE}", f"-I{CUDA}", "-x", "c++", "-c", str(source), "-o", str(part)]
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            raise RuntimeError(f"g++ does not compile {source.name}:\n{done.stdout[:8000]}")
        part.rename(output)
    return output


@functools.cache
def library() -> Path:
    if COMPILED:
        return nvcc.library(COMPILED)
    headers = [*HERE.rglob("*.h"), *HERE.rglob("*.cuh"), *CUDA.glob("*.cuh"), *CUDA.glob("*.h"), *CUDA.parent.glob("*.inc")]
    shared = torch.__version__.encode() + b"".join(f.read_bytes() for f in sorted(headers))
    sources = [(f, BINDING_FLAGS) for f in sorted(CUDA.glob("*.cpp"))] + [(f, []) for f in sorted(CUDA.glob("*.cu"))]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda s: _object(*s, shared), [*sources, (HERE / "exports.cpp", [])]))
    output = _cache() / f"bound-{hashlib.sha256(' '.join(map(str, objects)).encode()).hexdigest()[:16]}.so"
    if not output.exists():
        part = output.with_suffix(f".{os.getpid()}")
        subprocess.run([os.environ.get("CXX", "g++"), "-shared", *map(str, objects), *LIBRARIES, "-o", str(part)], check=True)
        part.rename(output)
    return output


@functools.cache
def ops():
    """The operations, on CPU tensors."""
    torch.ops.load_library(library())
    control()
    return torch.ops.entangle_fast_cuda_host


@functools.cache
def control() -> ctypes.CDLL:
    """The same library, for the emulator's own switches (exports.cpp)."""
    found = ctypes.CDLL(str(library()))
    if COMPILED:
        nvcc.begin(found, COMPILED)
    found.cuda_host_error.restype = found.cuda_host_visited.restype = found.cuda_host_launches.restype = ctypes.c_char_p
    return found


def begin(seed: int = 1, eager: bool = False, off: tuple[str, int] = ("", 0)) -> None:
    """The order of threads, the moment of asynchronous copies, and one synchronisation to leave out, from here on."""
    control().cuda_host_begin(ctypes.c_uint(seed), int(eager), off[0].encode(), int(off[1]))
