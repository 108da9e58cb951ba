"""Builds entangle_fast/_C.abi3.so: one stable-ABI library for torch >= 2.11 and Python >= 3.10, through ninja.

No compiler, no torch in the build environment, or a failing compile leave a pure-Python install that works, and
one line that says why. ENTANGLE_FAST_REQUIRE_EXT=1 makes that an error; ENTANGLE_FAST_SANITIZE=1 builds with ASan and
UBSan; CXX names the compiler.

The CUDA kernels (csrc/cuda) go into the same library wherever nvcc is found, whether or not there is a GPU: static
cudart, machine code for sm_80, sm_90a and sm_100, or for what TORCH_CUDA_ARCH_LIST names ("9.0a", "8.0;9.0+PTX").
ENTANGLE_FAST_CUDA=0 leaves them out; =1 makes a missing nvcc an error.
"""

import os
import platform
import re
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
CUDA_ARCHS = "8.0;9.0a;10.0"
NVCCFLAGS = "-O3 -std=c++17 --expt-relaxed-constexpr -Xptxas -v -Xcompiler -fPIC,-fvisibility=hidden,-Wall -Xcompiler -Wno-unknown-pragmas"
SANITIZE = "-fsanitize=address,undefined -fno-omit-frame-pointer -g"


def say(line: str) -> None:
    print(f"entangle_fast: {line}", file=sys.stderr)


def find_nvcc() -> Path | None:
    """nvcc, or None with one line that says why; its own folder, seen through wrapper scripts, is two levels up."""
    wish = os.environ.get("ENTANGLE_FAST_CUDA", "")
    if wish not in ("", "0", "1"):
        raise RuntimeError(f"ENTANGLE_FAST_CUDA={wish}: needs 0 (leave CUDA out), 1 (require nvcc), or nothing (build where nvcc is)")
    if os.environ.get("ENTANGLE_FAST_SANITIZE"):
        return None  # the sanitizers see the CPU kernels only
    if wish == "0":
        say("CUDA kernels left out (ENTANGLE_FAST_CUDA=0)")
        return None
    homes = [Path(os.environ[v]) for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    found = next((f for h in homes if (f := h / "bin" / "nvcc").exists()), None) or shutil.which("nvcc")
    if found is None and (usual := Path("/usr/local/cuda/bin/nvcc")).exists():
        found = usual
    if found is None:
        if wish == "1":
            raise RuntimeError("ENTANGLE_FAST_CUDA=1, but nvcc is not there: set CUDA_HOME or PATH to a CUDA toolkit >= 12.8")
        say("no nvcc (PATH, CUDA_HOME): building without the CUDA kernels; GPUs are served by Triton")
        return None
    return Path(found)


def cuda_library_dir(nvcc: Path) -> Path:
    """Where libcudart_static.a is: nvcc itself says so, also from behind a wrapper script."""
    done = subprocess.run([str(nvcc), "-dryrun", "-x", "cu", os.devnull, "-o", os.devnull], text=True, capture_output=True)
    for folder in [x.strip('"') for x in re.findall(r'"?-L[^\s"]+"?', done.stderr)]:
        if (Path(folder[2:]) / "libcudart_static.a").exists():
            return Path(folder[2:]).resolve()
    raise RuntimeError(f"libcudart_static.a was not found with {nvcc}; install the CUDA runtime's development files")


def gencode() -> str:
    """TORCH_CUDA_ARCH_LIST as -gencode flags: real code for each, PTX too where it says +PTX."""
    flags = []
    for arch in re.split(r"[;,\s]+", (os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHS).strip()):
        if not (match := re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", arch)):
            raise RuntimeError(f"TORCH_CUDA_ARCH_LIST: {arch!r} is not understood; needs numbers like 8.0;9.0a;10.0+PTX")
        number = match[1] + match[2]
        if int(re.sub(r"\D", "", number)) < 80:
            raise RuntimeError(f"TORCH_CUDA_ARCH_LIST: {arch} is too old; the CUDA kernels need 8.0 or later (or ENTANGLE_FAST_CUDA=0)")
        flags.append(f"-gencode arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode arch=compute_{number},code=compute_{number}")
    return " ".join(dict.fromkeys(flags))


def cuda_rules(nvcc: Path, work: Path) -> tuple[list[str], list[Path]]:
    """Ninja lines for csrc/cuda/*.cu and their objects. Registers, spills and shared memory as ptxas tells them: <object>.txt"""
    cxx = os.environ.get("CXX", "g++")
    lines = [
        "rule nvcc",
        f"  command = {nvcc} -ccbin {cxx} -MD -MF $out.d {NVCCFLAGS} {gencode()} -c $in -o $out > $out.txt 2>&1 || (cat $out.txt; false)",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    objects = []
    for source in sorted((CSRC / "cuda").glob("*.cu")):
        objects.append(work / f"{source.stem}.cu.o")
        lines += [f"build {objects[-1]}: nvcc {source}"]
    return [*lines, f"build cuda: phony {' '.join(map(str, objects))}"], objects


def ninja_file(output: Path, work: Path, torch_dir: Path, nvcc: Path | None) -> str:
    cxx = os.environ.get("CXX", "g++")
    includes = f"-I{CSRC} -I{torch_dir}/include -I{torch_dir}/include/torch/csrc/api/include -I{sysconfig.get_path('include')}"
    defines = f"-DTORCH_TARGET_VERSION={TORCH_TARGET} -DPy_LIMITED_API=0x030a0000"
    flags = CXXFLAGS
    if os.environ.get("ENTANGLE_FAST_SANITIZE"):
        flags += f" {SANITIZE}"
    sources = [CSRC / "library.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]
    if nvcc:
        sources += sorted((CSRC / "cuda").glob("*.cpp"))
    builds = {work / f"{source.stem}.o": (source, "") for source in sources}
    for source in sorted((CSRC / "cpu" / "isa").glob("*.cpp")):
        for isa, march in ISAS.items() if platform.machine() in ("x86_64", "AMD64") else [("plain", "")]:
            # -Wno-…: GCC 12 calls its own _mm512_undefined_epi32 uninitialized
            more = f"{march} -DEF_ISA={isa} -Wno-uninitialized -Wno-maybe-uninitialized"
            builds[work / f"{source.stem}.{isa}.o"] = (source, more)
    link = f"-shared -L{torch_dir}/lib -ltorch -ltorch_cpu -lc10 -Wl,-rpath,$ORIGIN/../torch/lib"
    if os.environ.get("ENTANGLE_FAST_SANITIZE"):
        link += f" {SANITIZE}"
    if nvcc:
        link += f" -L{cuda_library_dir(nvcc)} -lcudart_static -ldl -lrt -lpthread"
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
    objects = list(builds)
    if nvcc:
        more_lines, more_objects = cuda_rules(nvcc, work)
        lines, objects = lines + more_lines, [*more_objects, *objects]
    lines += [f"build {output}: link {' '.join(map(str, objects))}", f"default {output}", ""]
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
            raise RuntimeError("torch is not installed where this builds: install it first, then use --no-build-isolation") from None
        import ninja

        output = Path(self.get_ext_fullpath("entangle_fast._C")).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        work = ROOT / "build" / "ninja"  # not build_temp, which pip makes anew each time: objects are kept between installs
        work.mkdir(parents=True, exist_ok=True)
        tool = Path(ninja.BIN_DIR) / "ninja"

        def make(nvcc: Path | None) -> bool:
            (work / "build.ninja").write_text(ninja_file(output, work, Path(torch.__file__).parent, nvcc))
            done = subprocess.run([str(tool), "-C", str(work)], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            if done.returncode:
                print(done.stdout, file=sys.stderr)
            return done.returncode == 0

        nvcc = find_nvcc()
        if make(nvcc):
            return
        strict = os.environ.get("ENTANGLE_FAST_REQUIRE_EXT") or os.environ.get("ENTANGLE_FAST_CUDA") == "1"
        if nvcc and not strict:  # a broken toolkit must not cost the CPU kernels
            say("the build with CUDA failed; its output is above; building without it")
            if make(None):
                return
        raise RuntimeError("the C++ or CUDA compiler failed; its output is above")


setup(
    ext_modules=[Extension("entangle_fast._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": BuildWithNinja},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
