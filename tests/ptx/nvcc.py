"""What nvcc makes of csrc/cuda, on the CPU: its host code above cudart.cpp, its PTX on the machine, the bindings as in tests/cuda_host.

    library("sm_90a")  # torch.ops.entangle_fast_cuda_host once it is loaded
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gpu
import torch
from build import BINDING_FLAGS, CUDA, LIBRARIES
from build import HERE as HOST

HERE = Path(__file__).parent
NVCC_FLAGS = "-O3 -std=c++17 --expt-relaxed-constexpr -cudart none -Xcompiler -fPIC,-fvisibility=hidden".split()
HOST_FLAGS = "-std=c++20 -O1 -fPIC -DEF_CUDA_HOST".split()


def _run(command) -> None:
    done = subprocess.run(list(map(str, command)), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed:\n{done.stdout[:8000]}")


def _toolkit() -> Path:
    """The folder of nvcc's headers."""
    done = subprocess.run(["nvcc", "-dryrun", "-x", "cu", os.devnull, "-o", os.devnull], text=True, capture_output=True)
    found = next(line.partition("TOP=")[2] for line in done.stderr.splitlines() if "TOP=" in line)
    return Path(found) / "include"


@functools.cache
def library(target: str) -> Path:
    """A library of the kernels compiled for ``target``, with the files of PTX beside it; the machine that it calls is loaded."""
    assert shutil.which("nvcc"), "nvcc is not there"
    files = [HERE / "cudart.cpp", HERE / "tensor_map.h", Path(__file__), *HOST.glob("*.h")]
    files += [f for folder in (CUDA, CUDA.parent) for f in folder.iterdir() if f.suffix in (".cu", ".cuh", ".h", ".cpp", ".inc")]
    key = hashlib.sha256(b"".join(f.read_bytes() for f in sorted(files)) + torch.__version__.encode() + target.encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"ef_ptx_{os.getuid()}" / f"nvcc-{target}-{key}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            _build(part, target)
            part.rename(folder)
        except OSError:  # another process was first
            if not folder.exists():
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    ctypes.CDLL(gpu.machine()._name, mode=ctypes.RTLD_GLOBAL)
    return folder / "bound.so"


def _build(part: Path, target: str) -> None:
    number = target.removeprefix("sm_")
    device = [f"-gencode=arch=compute_{number},code=compute_{number}", "--keep", "--keep-dir", part]
    host = [os.environ.get("CXX", "g++"), *HOST_FLAGS, f"-I{HOST}", f"-I{CUDA}"]
    commands = [["nvcc", *NVCC_FLAGS, *device, "-c", f, "-o", part / f"{f.stem}.o"] for f in sorted(CUDA.glob("*.cu"))]
    commands += [[*host, *BINDING_FLAGS, "-c", f, "-o", part / f"{f.stem}.o"] for f in sorted(CUDA.glob("*.cpp"))]
    commands += [[host[0], *HOST_FLAGS, f"-I{_toolkit()}", "-c", HERE / "cudart.cpp", "-o", part / "cudart.o"]]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(_run, commands))
    _run([host[0], "-shared", *sorted(part.glob("*.o")), *LIBRARIES, "-o", part / "bound.so"])
    for f in part.iterdir():
        if f.suffix not in (".so", ".ptx"):
            f.unlink()


def begin(control: ctypes.CDLL, target: str, change=lambda name, text: text) -> None:
    """The library of ``target`` gets its kernels; change(name of the source, PTX) → PTX."""
    control.cuda_host_device(int(target.removeprefix("sm_").rstrip("a")))
    for f in sorted(library(target).parent.glob("*.ptx")):
        control.cuda_host_module(change(f.stem, f.read_text()).encode())
