"""What the hardware counters say beside the counted bytes and FLOPs, and which instructions the compiled kernels hold.

    python bench/gpu_profile.py --commit <hash>      → bench/results/<device>/profile-<hash>.json

ncu runs this file again with --calls triton and --calls cuda; where it is missing, or may not read the counters, the report says so.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from gpu_job import DEVICE, GPU, chosen
from gpu_matrix import ROOT, Report, versions

import entangle_fast as ef

CHECKOUT = ROOT.parent
TIME, MEMORY = "gpu__time_duration.sum", "dram__throughput.avg.pct_of_peak_sustained_elapsed"
BYTES = "dram__bytes.sum.per_second"
# the name of the tensor pipe's counter differs between chips: the first list that ncu knows
METRICS = [
    [TIME, MEMORY, BYTES, "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active"],
    [TIME, MEMORY, BYTES, "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active"],
    [TIME, MEMORY, BYTES],
]
OURS = ("_?gram", "_?update", "_?forward", "_rows", "_pairs", "_form", "_accumulate", "_moments", "_sorted", "_random", "ranks",
        "gram_mma", "form_wgmma", "add_wgmma", "project_random")  # fmt: skip


def calls(backend: str) -> None:
    """One call of each kernel that matters, large enough to fill the chip."""
    big = GPU
    n, t, d, p = (128, 192, 768, 1 << 26) if big else (4, 5, 6, 64)
    a, b = (torch.randn(n, t, d, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    params, grads = ([torch.randn(p, device=DEVICE, dtype=torch.bfloat16)] for _ in range(2))
    momentum, coef = [torch.randn(p, device=DEVICE)], torch.zeros(1, device=DEVICE)
    logits = torch.randn(2048 if big else 4, 50257 if big else 7, device=DEVICE, dtype=torch.bfloat16)
    target = torch.zeros(len(logits), dtype=torch.int64, device=DEVICE)
    losses = torch.randn(10**6 if big else 9, device=DEVICE)
    with chosen(backend):
        ef.ops.gram(a, b, route="tiles")
        ef.ops.gram(a[:64], b[:64], route="tiles")  # blocks of 64 samples
        ef.ops.step_gram([params, grads])
        ef.ops.step_update(params, momentum, grads, [grads], coef, lr=1e-3, beta=0.9)
        ef.ops.sample_loss(logits, target)
        ef.ops.w2_sorted(losses, losses)
        ef.ops.project_random(a, b, 256, seed=1)
        if backend != "cuda":  # no CUDA C++ kernel
            ef.ops.gram(a[:, 0], b[:, 0], route="rows")
            ef.ops.gram(a[:, :16], b[:, :16], route="pairs")
            ef.ops.w2_moments(losses, losses)


def parse(text: str) -> list[dict]:
    """ncu's CSV → one record for each launch: kernel, ms, percent of the peak of memory and tensor cores, bytes/s."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    found: dict[str, dict] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines))):
        if not row.get("Metric Name"):
            continue
        record = found.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
        try:
            value = float(row["Metric Value"].replace(",", ""))
        except ValueError:
            continue
        unit = row["Metric Unit"]
        scale = {"ns": 1e-6, "nsecond": 1e-6, "us": 1e-3, "usecond": 1e-3, "ms": 1.0, "msecond": 1.0, "s": 1e3, "second": 1e3,
                 "byte/s": 1.0, "Kbyte/s": 1e3, "Mbyte/s": 1e6, "Gbyte/s": 1e9, "Tbyte/s": 1e12, "byte/second": 1.0,
                 "Kbyte/second": 1e3, "Mbyte/second": 1e6, "Gbyte/second": 1e9, "Tbyte/second": 1e12}.get(unit, 1.0)  # fmt: skip
        name = {TIME: "ms", MEMORY: "dram_percent", BYTES: "dram_bytes_per_s"}.get(row["Metric Name"], "tensor_percent")
        record[name] = value * scale
    return list(found.values())


def ncu(backend: str, seconds: float) -> dict:
    tool = shutil.which("ncu") or next((str(x) for x in sorted(Path("/opt/nvidia/nsight-compute").glob("*/ncu"))), None)
    if tool is None:
        return {"missing": "ncu is not installed"}
    said, end = "", time.perf_counter() + seconds
    for metrics in METRICS:
        command = [
            tool, "--csv", "--clock-control", "none", "--kernel-name-base", "function", "--kernel-name", f"regex:^({'|'.join(OURS)})$",
            "--launch-count", "60", "--metrics", ",".join(metrics), sys.executable, str(Path(__file__).resolve()), "--calls", backend,
        ]  # fmt: skip
        left = end - time.perf_counter()
        with tempfile.TemporaryFile("w+") as file:  # no pipe, which a child of ncu would keep open; timeout ends that child too
            code = subprocess.call(["timeout", "-k", "5", str(max(1, int(left))), *command], stdout=file, stderr=subprocess.STDOUT)
            file.seek(0)
            said = file.read()
        late = {"late": f"ncu ran past {seconds:.0f} s"} if code in (124, 137) else {}
        if launches := [r for r in parse(said) if "ms" in r]:
            return {"metrics": metrics, "launches": launches, **late}
        if late:
            return {"missing": late["late"]}
    return {"missing": "ncu gave no counters: " + " | ".join(x for x in said.splitlines() if x.startswith("=="))[-600:]}


def sass(library: Path, arch: str) -> dict:
    """Instructions of the compiled library that only the fast paths have, by kernel."""
    tool = shutil.which("cuobjdump")
    if tool is None:
        try:
            import triton

            tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        except ModuleNotFoundError:
            return {"missing": "cuobjdump is not installed"}
    done = subprocess.run([str(tool), "-sass", "-arch", arch, str(library)], text=True, capture_output=True)
    functions = [f.partition("\n") for f in done.stdout.split("Function : ")[1:]]
    if not functions:
        return {"missing": f"{library.name} holds no code for {arch}: {done.stderr.strip()[:200]}"}
    words = ("HGMMA", "UTMALDG", "HMMA", "LDG.E.EF.128")
    out = {}
    for name in ("form_wgmma", "add_wgmma", "gram_mma", "update", "project_random"):
        bodies = [body for head, _, body in functions if re.search(rf"\d{name}(I|E|[A-Z])", head)]
        out[name] = {word: sum(body.count(word) for body in bodies) for word in words}
    return out


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--budget", type=float, default=60, help="seconds in all")
    parser.add_argument("--calls", choices=("triton", "cuda"), help="only make the calls, for ncu")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    options = parser.parse_args(arguments)
    if options.calls:
        calls(options.calls)
        if GPU:
            torch.cuda.synchronize()
        return 0
    if not GPU:
        print("gpu_profile: no GPU that torch can use; nothing was measured", file=sys.stderr)
        return 3
    report = Report(f"profile-{options.commit}", options.results, commit=options.commit, **versions())
    major, minor = torch.cuda.get_device_capability()
    libraries = sorted((CHECKOUT / "entangle_fast").glob("_C*.so"))
    arch = {8: "sm_80", 9: "sm_90a"}.get(major, f"sm_{major}{minor}")  # what setup.py builds
    report.content["sass"] = sass(libraries[0], arch) if libraries else {"missing": "no compiled library"}
    report.save()
    for backend in ("triton", "cuda"):
        report.content[f"ncu_{backend}"] = ncu(backend, options.budget / 2)
        report.save()
        for r in report.content[f"ncu_{backend}"].get("launches", [report.content[f"ncu_{backend}"]]):
            print(backend, r, flush=True)
    print("written:", *report.paths)
    wgmma = report.content["sass"].get("form_wgmma")
    return int(bool(major == 9 and wgmma and not wgmma["HGMMA"]))


if __name__ == "__main__":
    sys.exit(main())
