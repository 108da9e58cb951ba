"""Compiles a .cu file with g++ against cuda_host.h and runs its launchers on CPU tensors.

    library = load("gram")
    run(library.ef_cuda_gram, a, b, n, ..., seed=3, eager=True)

Every tensor handed over is registered, so that the kernels' Span sees accesses outside of it.
"""

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
CUDA = HERE.parents[1] / "csrc" / "cuda"
FLAGS = "-std=c++20 -O1 -fPIC -shared -DEF_CUDA_HOST -Wno-unknown-pragmas -fsanitize=bounds -fsanitize-undefined-trap-on-error".split()

TORCH = Path(torch.__file__).parent
BINDING_FLAGS = ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{TORCH}/include", f"-I{TORCH}/include/torch/csrc/api/include"]
LIBRARIES = f"-L{TORCH}/lib -ltorch -ltorch_cpu -lc10".split()


def _cache() -> Path:
    return Path(os.environ.get("EF_CUDA_HOST_CACHE") or Path(tempfile.gettempdir()) / f"ef_cuda_host_{os.getuid()}")


@functools.cache
def _headers() -> bytes:
    files = [*HERE.rglob("*.h"), *HERE.rglob("*.cuh"), HERE / "exports.cpp", *CUDA.glob("*.cuh"), *CUDA.glob("*.h")]
    return b"".join(f.read_bytes() for f in sorted(files))


@functools.cache
def load(source: str | Path) -> ctypes.CDLL:
    """``source``: a file, or the name of one in csrc/cuda. Compiled once for each content of it and of the headers."""
    path = Path(source) if Path(source).suffix else CUDA / f"{source}.cu"
    key = hashlib.sha256(path.read_bytes() + _headers() + " ".join(FLAGS).encode()).hexdigest()[:16]
    output = _cache() / f"{path.stem}-{key}.so"
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        part = output.with_suffix(f".{os.getpid()}")
        command = [os.environ.get("CXX", "g++"), *FLAGS, f"-I{HERE}", f"-I{CUDA}", "-x", "c++", str(path), str(HERE / "exports.cpp")]
        done = subprocess.run([*command, "-o", str(part)], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            raise RuntimeError(f"g++ does not compile {path.name}:\n{done.stdout[:8000]}")
        part.rename(output)
    library = ctypes.CDLL(str(output), mode=os.RTLD_LOCAL)
    library.cuda_host_error.restype = library.cuda_host_visited.restype = ctypes.c_char_p
    return library


class Factors(ctypes.Structure):
    """csrc/cuda/gram.h's Factors of a (n, t, d_in), b (n, t, d_out), unit stride inside."""

    _fields_ = [
        ("a", ctypes.c_void_p), ("b", ctypes.c_void_p), ("n", ctypes.c_int64), ("t", ctypes.c_int64),
        ("a_sample", ctypes.c_int64), ("a_position", ctypes.c_int64), ("b_sample", ctypes.c_int64), ("b_position", ctypes.c_int64),
    ]  # fmt: skip

    def __init__(self, a: Tensor, b: Tensor):
        super().__init__(a.data_ptr(), b.data_ptr(), *a.shape[:2], *a.stride()[:2], *b.stride()[:2])
        self.tensors = (a, b)


def allow(library, x: Tensor, beyond: int = 0) -> None:
    size = x.untyped_storage().nbytes() - x.storage_offset() * x.element_size() - beyond
    library.cuda_host_allow(ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(max(size, 0)))


def run(launcher, *args, library=None, seed: int = 1, eager: bool = False, off: tuple[str, int] = ("", 0), beyond: int = 0) -> None:
    """Calls a launcher; tensors go as their addresses, floats as double, the stream as null.

    off: (file, line) of one synchronisation to leave out. beyond: bytes by which every tensor is declared shorter.
    Raises RuntimeError where the header saw a deadlock, an access outside, or a broken rule.
    """
    library.cuda_host_begin(ctypes.c_uint(seed), int(eager), off[0].encode(), int(off[1]))
    passed = []
    for x in args:
        if isinstance(x, Tensor):
            allow(library, x, beyond)
            passed.append(ctypes.c_void_p(x.data_ptr()))
        elif isinstance(x, Factors):
            allow(library, x.tensors[0], beyond)
            allow(library, x.tensors[1], beyond)
            passed.append(ctypes.byref(x))
        elif isinstance(x, float):
            passed.append(ctypes.c_double(x))
        else:
            passed.append(ctypes.c_int64(x) if isinstance(x, int) else x)
    code = launcher(*passed, None)
    if code:
        raise RuntimeError(f"error {code}: {library.cuda_host_error().decode() or 'an access outside of a tensor'}")


def visited(library) -> set[tuple[str, int]]:
    """(file, line) of every synchronisation that ran in this process."""
    return {(name, int(line)) for name, line in (x.rsplit(":", 1) for x in library.cuda_host_visited().decode().split())}
