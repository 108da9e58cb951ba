"""Compiles for GPUs that are not there: records what the wrappers launch, then hands exactly that to triton.compile.

``python launches.py`` prints registers, spills and shared memory of every launch on every target.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32), "gfx942": ("hip", "gfx942", 64)}
SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}  # bytes one block may have
MAJOR = {"sm_80": 8, "sm_90": 9, "sm_100": 10, "gfx942": None}
OPTIONS = ("num_warps", "num_stages", "maxnreg")


def record(calls, target: str | None = None) -> list[tuple]:
    """(kernel, arguments by name, options) of every launch that ``calls()`` makes, on ``target`` if given; nothing runs."""
    import torch
    from entangle_fast.kernels import cache, tune
    from triton.runtime.jit import JITFunction

    found = []

    def run(self, *args, grid, warmup, **kwargs):
        x, y, z = (*grid, 1, 1)[:3]
        assert 0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16, f"{self.fn.__name__}: a grid of {grid}"
        bound = dict(zip(self.arg_names, args))
        bound.update({k: v for k, v in kwargs.items() if k in self.arg_names})
        found.append((self, bound, {k: kwargs[k] for k in OPTIONS if k in kwargs}))
        for x in bound.values():
            if isinstance(x, torch.Tensor):
                x.zero_()  # nothing was computed: wrappers that read a count back must read none

    kept, JITFunction.run, major, tune.major = JITFunction.run, run, tune.major, lambda: MAJOR.get(target)
    try:
        calls()
    finally:
        JITFunction.run, tune.major = kept, major
        cache._made.clear()  # tables were zeroed too
    return found


def _source(kernel, bound):
    """The specialisation that a launch with these arguments gets: types, ones, multiples of 16."""
    import torch
    from triton.compiler import ASTSource

    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64",
             torch.int64: "i64", torch.int32: "i32", torch.int8: "i8", torch.bool: "i1"}  # fmt: skip
    signature, constants, attrs = {}, {}, {}
    for at, param in enumerate(kernel.params):
        value = bound[param.name]
        if param.is_constexpr:
            signature[param.name], constants[param.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[param.name] = f"*{names[value.dtype]}"
            if value.data_ptr() % 16 == 0:
                attrs[(at,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float) or param.annotation_type == "fp64":
            signature[param.name] = param.annotation_type or "fp32"
        elif value == 1 and not param.do_not_specialize:
            signature[param.name], constants[param.name] = "constexpr", 1
        else:
            signature[param.name] = param.annotation_type or ("i32" if -(2**31) <= value < 2**31 else "i64")
            if value % 16 == 0 and not param.do_not_specialize:
                attrs[(at,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attrs)


def built_for(target: str, launch):
    """The compiled kernel of one launch."""
    import triton
    from triton.backends.compiler import GPUTarget

    kernel, bound, options = launch
    if TARGETS[target][0] == "hip":
        options = {k: v for k, v in options.items() if k != "maxnreg"}
    return triton.compile(_source(kernel, bound), target=GPUTarget(*TARGETS[target]), options=options)


def compile_for(target: str, launch):
    """The compiled kernel, and registers, bytes spilled (registers on AMD) and shared memory of one launch."""
    built = built_for(target, launch)
    registers, spills = _resources(target, built)
    return built, {"registers": registers, "spills": spills, "shared": built.metadata.shared}


def _resources(target, built):
    if target == "gfx942":
        text = built.asm["amdgcn"]
        return tuple(int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count"))
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder) / "k.cubin", Path(folder) / "k.ptx"
        cubin.write_bytes(built.asm["cubin"])
        text = _run(tools / "cuobjdump", "--dump-resource-usage", cubin)
        registers, stack = int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])
        if not stack:
            return registers, 0
        # a stack also serves the range reduction of sin and cos: ask ptxas what of it is spills
        ptx.write_text(built.asm["ptx"])
        ptxas = os.environ.get("TRITON_PTXAS_PATH") or tools / "ptxas-blackwell"  # the newer of the two that ship
        arch = re.search(r"\.target (\w+)", built.asm["ptx"])[1]
        text = _run(ptxas, "-v", f"-arch={arch}", ptx, "-o", "/dev/null")
        return registers, max(int(x) for x in re.findall(r"(\d+) bytes spill stores", text))


def _run(*command) -> str:
    done = subprocess.run(list(map(str, command)), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True)
    return done.stdout


def unique(launches):
    """One launch for each kernel and specialisation."""
    seen = {}
    for launch in launches:
        source = _source(launch[0], launch[1])
        seen.setdefault((launch[0].fn.__module__, source.hash(), str(launch[2])), launch)
    return list(seen.values())


def label(launch) -> str:
    kernel, bound, _ = launch
    named = "TABLED", "MATCH", "SYMMETRIC", "SPLIT", "GAUSSIAN", "TURNED", "NOISE", "COUNTED", "WRITE", "BOUNDED", "MEAN"
    flags = [k for k in named if bound.get(k)]
    pointers = {str(x.dtype).removeprefix("torch.") for x in bound.values() if hasattr(x, "data_ptr")}
    kind = str(bound.get("P") or bound.get("DTYPE") or "/".join(sorted(p for p in pointers if "float" in p)))
    return " ".join([kernel.fn.__module__.rsplit(".", 1)[-1] + kernel.fn.__name__, kind, *flags])


def main() -> None:
    wanted = sys.argv[1:]
    import workloads

    for name in wanted or workloads.NAMES:
        for target in TARGETS:
            for launch in unique(record(lambda: workloads.run(workloads.calls(name)), target)):  # noqa: B023
                print(f"{label(launch):50s}", target, json.dumps([*compile_for(target, launch)[1].values()]), flush=True)


if __name__ == "__main__":
    main()
