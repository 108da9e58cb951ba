"""Every CUDA kernel compiled by nvcc for the three targets: no spills, registers and shared memory that fit.

The objects are those of the installation, brought up to date by ninja (seconds, or nothing); what ptxas said stands beside each.
"""

import re
import shutil
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


# threads of a block × registers: two blocks a multiprocessor, or too few loads are in flight; float64 may take one
BANDWIDTH = {"step": 128, "step_adamw": 128, "lookahead": 128, "sample_loss": 64, "w2": 64}


def test_bandwidth_kernels_leave_room_for_two_blocks(logs):
    for source, name, target, _, registers, _ in kernels(logs):
        wide = re.search(r"(updateIddd|adamwIdd|(forward|backward)Id)", name)
        if source in BANDWIDTH and not wide and not any(f in name for f in FOREIGN):
            assert registers <= BANDWIDTH[source], f"{name} on {target}: {registers} registers"


# what a block may have with cudaFuncAttributeMaxDynamicSharedMemorySize, beside what the kernel has statically (none here)
DYNAMIC = {  # source: (expression over its constants, bytes on the smallest target that runs it)
    "gram": ("2 * kBlock * kPitch + kWarps * GradientTile<T>::WARP_BYTES", 166912),  # sm_80
    "project": (
        "kRows * kPitch<T> + kWarps * GradientTile<T>::WARP_BYTES + kWarps * GradientTile<T>::WIDTH * (int)sizeof(uint32_t)", 166912,
    ),
}


@pytest.mark.parametrize("source", DYNAMIC)
def test_dynamic_shared_memory_fits(source, tmp_path):
    """-Xptxas -v knows static shared memory only; gram_sm90.cuh has an assertion of its own."""
    if shutil.which("g++") is None:
        pytest.skip("g++ not found: the sizes are constants of the sources")
    size, limit = DYNAMIC[source]
    text = (ROOT / "csrc" / "cuda" / f"{source}.cu").read_text()
    assert size in text, "the kernel asks for another size"
    checks = "".join(f"static_assert({size.replace('<T>', f'<{t}>')} <= {limit});\n" for t in ("float", "Bf16", "Half"))
    probe = tmp_path / "probe.cpp"
    probe.write_text(f'#include "{source}.cu"\nnamespace ef::cuda {{\n{checks}}}\n')
    host = ROOT / "tests" / "cuda_host"
    flags = ["-std=c++20", "-fsyntax-only", "-DEF_CUDA_HOST", "-Wno-unknown-pragmas", f"-I{host}", f"-I{ROOT / 'csrc' / 'cuda'}"]
    done = subprocess.run(["g++", *flags, str(probe)], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[:2000]


def test_no_warnings(logs):
    for source, text in logs.items():
        assert not re.search(r"\bwarning\b", text), f"{source}.cu:\n{text[:2000]}"


@pytest.fixture(scope="module")
def machine_code(logs):
    """source → {function: its SASS for sm_90a}; cuobjdump and nvdisasm come with triton."""
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this triton brings no cuobjdump")

    def read(source):
        command = [str(tool), "-sass", "-arch", "sm_90a", str(WORK / f"{source}.cu.o")]
        text = subprocess.run(command, text=True, capture_output=True, check=True).stdout
        return dict(f.split("\n", 1) for f in text.split("Function : ")[1:])

    return read


@pytest.mark.parametrize("source, kernel", [("step", "update"), ("step", "gram"), ("step_adamw", "adamw")])
def test_step_reads_sixteen_bytes_at_a_time(machine_code, source, kernel):
    functions = {name: code for name, code in machine_code(source).items() if kernel in name}
    assert functions
    for name, code in functions.items():
        assert "LDG.E.EF.128" in code and (kernel == "gram" or "STG.E.EF.128" in code), name


def test_gram_uses_the_tensor_cores(machine_code):
    """wgmma fed by TMA in the form for sm_90a, mma.sync in the others."""
    functions = machine_code("gram")
    wgmma = {name: code for name, code in functions.items() if "form_wgmma" in name or "add_wgmma" in name}
    assert len(wgmma) == 6 and all("HGMMA" in code and "UTMALDG" in code and "SYNCS" in code for code in wgmma.values())
    for name, code in wgmma.items():  # clusters: form's, and that of 256 samples
        assert ("MULTICAST" in code) == ("form" in name or "ILi256E" in name), name
    others = [code for name, code in functions.items() if "gram_mma" in name]
    assert len(others) == 6 and all("HMMA" in code for code in others)


def test_gram_waits_for_the_kernel_before_it(machine_code):
    """griddepcontrol.wait (ACQBULK) ahead of all access to memory, launch_dependents (PREEXIT) behind it, what needs neither before."""
    functions = {name: code for name, code in machine_code("gram").items() if "wgmma" in name or "add_partials" in name}
    assert len(functions) == 7
    for name, code in functions.items():
        before, wait, after = code.partition("ACQBULK")
        assert wait and not re.search(r"\b(UTMALDG|LDG|STG|ATOM|RED|LD|ST)\b", before), name
        if "wgmma" in name:
            assert "PREEXIT" in after and all(x in before for x in ("UTMACCTL.PF", "SYNCS", "UCGABAR_WAIT")), name
