"""Runs Triton's compiled kernels on CPU tensors: the PTX that a GPU would get, by the machine of machine.h.

    with gpu.running("sm_90"):
        gram.gram(a, b)        # entangle_fast.kernels, launched as on an H100

Every tensor that lives may be touched, nothing else.
"""

import contextlib
import ctypes
import functools
import gc
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
# of warps: instructions; requests to global memory, 32-byte sectors they touch, bytes they ask for; passes over the banks of shared
# memory if no two words met in one, and as it is
COUNTED = ("instructions", "requests", "sectors", "bytes", "passes", "wavefronts")
sys.path.insert(0, str(HERE.parent / "kernels"))
PROCESSORS = {"sm_80": 108, "sm_90": 132}  # an A100's, an H100's: they set how sums are split
FLAGS = "-std=c++20 -O2 -march=native -ffp-contract=off -fPIC -shared".split()


@functools.cache
def machine() -> ctypes.CDLL:
    text = b"".join(f.read_bytes() for f in sorted([*HERE.glob("*.h"), *HERE.glob("*.cpp")]))
    processor = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("flags")), "")
    key = hashlib.sha256(text + " ".join(FLAGS).encode() + processor.encode()).hexdigest()[:16]
    output = Path(tempfile.gettempdir()) / f"ef_ptx_{os.getuid()}" / f"machine-{key}.so"
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        part = output.with_suffix(f".{os.getpid()}")
        command = [os.environ.get("CXX", "g++"), *FLAGS, str(HERE / "machine.cpp"), "-o", str(part)]
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            raise RuntimeError(f"g++ does not compile machine.cpp:\n{done.stdout[:8000]}")
        part.rename(output)
    library = ctypes.CDLL(str(output))
    library.ptx_error.restype = ctypes.c_char_p
    library.ptx_read.restype = ctypes.c_void_p
    return library


class Program:
    def __init__(self, ptx: str):
        self.handle = ctypes.c_void_p(machine().ptx_read(ptx.encode(), b""))
        if not self.handle:
            raise RuntimeError(machine().ptx_error().decode())
        self.params = machine().ptx_params(self.handle)

    def launch(self, grid, threads: int, shared: int, args: list[int], seed=1, eager=False, copies_fenced=False) -> dict[str, int]:
        """args: bits. copies_fenced: what cp.async copied needs no fence before wgmma reads it. Returns what was counted."""
        assert len(args) == self.params, f"{self.params} parameters, {len(args)} arguments"
        allowed = [x for pair in _living() for x in pair]
        counted = (ctypes.c_uint64 * len(COUNTED))()
        held = (ctypes.c_uint64 * len(args))(*args)
        where = (ctypes.c_void_p * len(args))(*(ctypes.addressof(held) + 8 * k for k in range(len(args))))
        failed = machine().ptx_launch(
            self.handle, (ctypes.c_uint32 * 3)(*grid), ctypes.c_uint32(1), ctypes.c_uint32(threads), ctypes.c_uint32(shared), where,
            (ctypes.c_uint64 * len(allowed))(*allowed),
            ctypes.c_int64(len(allowed) // 2), ctypes.c_uint32(seed), int(eager), int(copies_fenced), counted,
        )  # fmt: skip
        if failed:
            raise RuntimeError(machine().ptx_error().decode())
        return dict(zip(COUNTED, counted))


def _living() -> list[tuple[int, int]]:
    """[from, to) of the storages of all tensors, sorted and joined."""
    found = set()
    for x in gc.get_objects():
        if type(x) in (torch.Tensor, torch.nn.Parameter) and x.device.type == "cpu" and torch._C._has_storage(x):
            storage = x.untyped_storage()
            if storage.nbytes():
                found.add((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
    out = []
    for low, high in sorted(found):
        if out and low <= out[-1][1] and high <= out[-1][1]:
            continue
        out.append((low, high))
    return out


def bits(value, kind: str) -> int:
    import struct

    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if kind in ("fp32", "fp64"):
        return int.from_bytes(struct.pack("<f" if kind == "fp32" else "<d", value), "little")
    return int(value) & (2**64 - 1)


@functools.cache
def _program(ptx: str) -> Program:
    return Program(ptx)


@contextlib.contextmanager
def running(target: str, seed: int = 1, eager: bool = False, counted: list | None = None):
    """Every launch of a Triton kernel within runs compiled for ``target``; counted gets (kernel's name, counts) of each."""
    import launches
    import triton
    from entangle_fast.kernels import launch, tune
    from triton.runtime.jit import JITFunction

    # before pull request 9610 Triton sets no fence.proxy.async between cp.async and wgmma: known, and not to be mended from here
    copies_fenced = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)

    def run(self, *args, grid, warmup, **kwargs):
        bound = dict(zip(self.arg_names, args))
        bound.update({k: v for k, v in kwargs.items() if k in self.arg_names})
        built = launches.built_for(target, (self, bound, {k: kwargs[k] for k in launches.OPTIONS if k in kwargs}))
        program = _program(built.asm["ptx"])
        signature = built.src.signature
        values = [bits(bound[name], kind) for name, kind in signature.items() if kind != "constexpr"]
        assert program.params >= len(values), f"{self.fn.__name__}: {program.params} parameters, {len(values)} arguments"
        values += [0] * (program.params - len(values))  # scratch that no kernel here has
        found = program.launch((*grid, 1, 1)[:3], built.metadata.num_warps * 32, built.metadata.shared, values, seed, eager, copies_fenced)
        if counted is not None:
            counted.append((self.fn.__name__, found))

    kept = JITFunction.run, tune.major, launch.processors
    JITFunction.run, tune.major, launch.processors = run, lambda: launches.MAJOR.get(target), lambda x: PROCESSORS[target]
    try:
        yield
    finally:
        JITFunction.run, tune.major, launch.processors = kept
