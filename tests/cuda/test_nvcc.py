"""Every CUDA kernel compiled by nvcc for the three targets: no spills, registers and shared memory that fit.

The objects are those of the installation, brought up to date by ninja (seconds, or nothing); what ptxas said stands beside each.
"""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORK = ROOT / "build" / "ninja"  # setup.py
TARGETS = ("sm_80", "sm_90a", "sm_100")
SHARED = 48 << 10  # static shared memory of one block, on any target
REGISTERS = 255
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<target>\w+)'.*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
# CUB's own kernels: their small spills are theirs
FOREIGN = ("cub", "thrust", "cuda_std")


@pytest.fixture(scope="module")
def logs():
    """source → what ptxas said."""
    ninja = pytest.importorskip("ninja")
    plan = WORK / "build.ninja"
    if not plan.exists() or "phony" not in plan.read_text():
        pytest.skip("not built with CUDA from this checkout (no nvcc, ENTANGLE_FAST_CUDA=0): nothing to check")
    named = {Path(x).name for x in re.search(r"^build cuda: phony (.*)$", plan.read_text(), re.MULTILINE)[1].split()}
    if named != {f"{f.stem}.cu.o" for f in (ROOT / "csrc" / "cuda").glob("*.cu")}:
        pytest.fail("csrc/cuda has other files than were built: reinstall with pip install --no-build-isolation -e .")
    tool = Path(ninja.BIN_DIR) / "ninja"
    done = subprocess.run([str(tool), "-C", str(plan.parent), "cuda"], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-4000:]
    return {f.name.removesuffix(".cu.o.txt"): f.read_text() for f in plan.parent.glob("*.cu.o.txt")}


def kernels(logs):
    for source, text in logs.items():
        for m in KERNEL.finditer(text):
            shared = re.search(r"(\d+) bytes smem", m["rest"])
            yield source, m["name"], m["target"], int(m["stores"]) + int(m["loads"]), int(m["registers"]), int(shared[1]) if shared else 0


def test_every_source_was_compiled_for_every_target(logs):
    seen = {(source, target) for source, _, target, *_ in kernels(logs)}
    for path in (ROOT / "csrc" / "cuda").glob("*.cu"):
        if "__global__" in path.read_text():
            assert {t for s, t in seen if s == path.stem} == set(TARGETS), path.name


def test_kernels_fit_without_spills(logs):
    wrong = []
    for source, name, target, spills, registers, shared in kernels(logs):
        if not any(f in name for f in FOREIGN) and (spills or registers > REGISTERS or shared > SHARED):
            wrong.append(f"{source}.cu {name} on {target}: {spills} bytes of spills, {registers} registers, {shared} bytes shared")
    assert not wrong, "\n".join(wrong)


def test_bandwidth_kernels_leave_room_for_two_blocks(logs):
    """256 threads at 128 registers: two blocks a multiprocessor, or too few loads are in flight; float64 may take one."""
    for source, name, target, _, registers, _ in kernels(logs):
        if source in ("step", "lookahead") and "updateIddd" not in name:
            assert registers <= 128, f"{name} on {target}: {registers} registers"


def test_no_warnings(logs):
    for source, text in logs.items():
        assert not re.search(r"\bwarning\b", text), f"{source}.cu:\n{text[:2000]}"


def test_step_reads_sixteen_bytes_at_a_time(logs):
    """In the machine code itself; cuobjdump and nvdisasm come with triton."""
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this triton brings no cuobjdump")
    command = [str(tool), "-sass", "-arch", "sm_90a", str(WORK / "step.cu.o")]
    sass = subprocess.run(command, text=True, capture_output=True, check=True).stdout
    functions = [f for f in sass.split("Function : ")[1:] if "update" in f.split("\n")[0]]
    assert functions
    for f in functions:
        assert "LDG.E.EF.128" in f and "STG.E.EF.128" in f, f.split("\n")[0]


