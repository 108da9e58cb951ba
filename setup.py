"""Builds entangle_fast/_C.abi3.so: one stable-ABI library for torch >= 2.11 and Python >= 3.10, through ninja.

No compiler, no torch in the build environment, or a failing compile leave a pure-Python install that works, and
one line that says why. ENTANGLE_FAST_REQUIRE_EXT=1 makes that an error; ENTANGLE_FAST_SANITIZE=1 builds with ASan and
UBSan; CXX names the compiler. There is no CUDA C++ yet.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
TORCH_TARGET = "0x020b000000000000"  # torch 2.11, the oldest that the library must load beside
CXXFLAGS = "-O3 -std=c++20 -fPIC -fopenmp-simd -ffp-contract=fast -fno-math-errno -fno-trapping-math -fvisibility=hidden -Wall"
# isa/*.cpp is compiled once for each of these and chosen at run time (cpu/isa.cpp)
ISAS = {
    "plain": "",
    "avx2": "-march=x86-64-v3",
    "avx512": "-march=x86-64-v4 -mprefer-vector-width=512",
    "avx512bf16": "-march=x86-64-v4 -mprefer-vector-width=512 -mavx512bf16",
}
SANITIZE = "-fsanitize=address,undefined -fno-omit-frame-pointer -g"


def say(line: str) -> None:
    print(f"entangle_fast: {line}", file=sys.stderr)


def ninja_file(output: Path, work: Path, torch_dir: Path) -> str:
    cxx = os.environ.get("CXX", "g++")
    includes = f"-I{CSRC} -I{torch_dir}/include -I{torch_dir}/include/torch/csrc/api/include -I{sysconfig.get_path('include')}"
    defines = f"-DTORCH_TARGET_VERSION={TORCH_TARGET} -DPy_LIMITED_API=0x030a0000"
    flags = CXXFLAGS
    if os.environ.get("ENTANGLE_FAST_SANITIZE"):
        flags += f" {SANITIZE}"
    sources = [CSRC / "library.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]
    builds = {work / f"{source.stem}.o": (source, "") for source in sources}
    for source in sorted((CSRC / "cpu" / "isa").glob("*.cpp")):
        for isa, march in ISAS.items() if platform.machine() in ("x86_64", "AMD64") else [("plain", "")]:
            # -Wno-…: GCC 12 calls its own _mm512_undefined_epi32 uninitialized
            more = f"{march} -DEF_ISA={isa} -Wno-uninitialized -Wno-maybe-uninitialized"
            builds[work / f"{source.stem}.{isa}.o"] = (source, more)
    link = f"-shared -L{torch_dir}/lib -ltorch -ltorch_cpu -lc10 -Wl,-rpath,$ORIGIN/../torch/lib"
    if os.environ.get("ENTANGLE_FAST_SANITIZE"):
        link += f" {SANITIZE}"
    lines = [
        "rule cxx",
        f"  command = {cxx} -MMD -MF $out.d {flags} {defines} {includes} $more -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {cxx} $in -o $out {link.replace('$ORIGIN', '$$ORIGIN')}",
    ]
    for obj, (source, more) in builds.items():
        lines += [f"build {obj}: cxx {source}", f"  more = {more}"]
    lines += [f"build {output}: link {' '.join(map(str, builds))}", f"default {output}", ""]
    return "\n".join(lines)


class BuildWithNinja(build_ext):
    def run(self):
        try:
            self.build()
        except Exception as error:  # any failure must leave the pure-Python package installable
            if os.environ.get("ENTANGLE_FAST_REQUIRE_EXT"):
                raise
            say(f"installing without compiled kernels ({error}); everything works, slower; `entangle-fast doctor` says more")

    def build(self):
        cxx = os.environ.get("CXX", "g++")
        if shutil.which(cxx) is None:
            raise RuntimeError(f"no C++ compiler: {cxx} not found")
        try:
            import torch
        except ImportError:
            raise RuntimeError("torch is not installed where this builds: install it first, then use --no-build-isolation")
        import ninja

        output = Path(self.get_ext_fullpath("entangle_fast._C")).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        work = Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        (work / "build.ninja").write_text(ninja_file(output, work, Path(torch.__file__).parent))
        tool = Path(ninja.BIN_DIR) / "ninja"
        done = subprocess.run([str(tool), "-C", str(work)], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            print(done.stdout, file=sys.stderr)
            raise RuntimeError("the C++ compiler failed; its output is above")


setup(
    ext_modules=[Extension("entangle_fast._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": BuildWithNinja},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
