"""The benchmark matrix of bench/gpu.sh: medians with a cold L2 cache, against plain PyTorch on the same tensors.

Writes bench/results/<device>/<commit>.json after every job, so that a run cut short leaves what it measured.
A job whose result does not agree with its peer's is recorded as wrong, without a time.
"""

import argparse
import json
import os
import statistics
import sys
import time
import traceback
import xml.etree.ElementTree as xml
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from entangle_fast.kernels import gram as gram_kernels
from entangle_fast.kernels import warmup

import entangle_fast as ef

ROOT = Path(__file__).resolve().parent
DEVICE = "cuda"


class Timer:
    """Medians of a function's time on the device, the L2 cache overwritten before each run."""

    def __init__(self, repeats: int):
        self.repeats = repeats
        self.flush = torch.empty(256 << 20, dtype=torch.int8, device=DEVICE)

    def __call__(self, run, limit_s: float = 8.0) -> dict:
        run()
        torch.cuda.synchronize()
        times, began = [], time.perf_counter()
        while len(times) < self.repeats and (len(times) < 3 or time.perf_counter() - began < limit_s):
            self.flush.zero_()
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop))
        return {"ms": statistics.median(times), "ms_min": min(times), "ms_max": max(times), "runs": len(times)}


def peak_bytes(run) -> int:
    """Memory that ``run`` holds at its worst beyond what was there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def ceilings(timer: Timer) -> dict:
    """What this very machine reaches: bytes/s of a device copy, FLOP/s of a large bf16 product."""
    x = torch.empty(1 << 30, dtype=torch.int8, device=DEVICE)
    y = torch.empty_like(x)
    copy = timer(lambda: y.copy_(x))["ms"]
    a = torch.randn(8192, 8192, device=DEVICE).bfloat16()
    product = timer(lambda: a @ a)["ms"]
    return {"copy_bytes_per_s": 2 * x.numel() / copy * 1e3, "gemm_bf16_flops_per_s": 2 * 8192**3 / product * 1e3}


def close(x, y, tolerance: float) -> bool:
    xs, ys = (v if isinstance(v, (list, tuple)) else [v] for v in (x, y))
    return all(((p.double() - q.double()).norm() <= tolerance * q.double().norm()).item() for p, q in zip(xs, ys))


def step_job(count: int):
    """Two directions, bf16 parameters, fp32 momentum; bytes: directions twice, θ and v read and written, gradient read."""
    each = 1 << 24
    sizes = [each] * (count // each)
    make = lambda dtype: [torch.randn(s, device=DEVICE).to(dtype) for s in sizes]  # noqa: E731
    params, momentum = make(torch.bfloat16), make(torch.float32)
    forget, retain = make(torch.bfloat16), make(torch.bfloat16)

    def ours():
        k = ef.ops.step_gram([forget, retain])
        ef.ops.step_update(params, momentum, forget, [retain], (k[0, 1] / k[1, 1]).float().reshape(1), lr=1e-3, beta=0.9)

    def authors():
        """Flatten both directions, project, and write back, as the published code does."""
        u, r = (torch.cat([g.flatten() for g in gs]).float() for gs in (forget, retain))
        u = u - (u @ r) / (r @ r) * r
        at = 0
        for p, v in zip(params, momentum):
            v.mul_(0.9).add_(u[at : at + p.numel()])
            p.sub_(1e-3 * v)
            at += p.numel()

    start = [x[:1024].clone() for x in (params[0], momentum[0])]

    def once(run):
        params[0][:1024], momentum[0][:1024] = start
        run()
        return params[0][:1024].clone()

    total = sum(sizes)
    return dict(ours=ours, peer=authors, bytes=total * (2 * 2 + 2 * 2 + 2 * 4 + 2 * 2),
                agree=lambda: close(once(ours), once(authors), 1e-2), need="≥ 85 % of copy bandwidth, ≥ 3× the peer")  # fmt: skip


def rows_job(n: int, layers: int, d: int):
    pairs = [tuple(torch.randn(n, d, device=DEVICE).bfloat16() for _ in range(2)) for _ in range(layers)]
    ours = lambda: gram_kernels.gram_rows_grouped(pairs)  # noqa: E731
    peer = lambda: sum((a @ a.T).float() * (b @ b.T).float() for a, b in pairs)  # noqa: E731
    return dict(ours=ours, peer=peer, flops=layers * 2 * n * n * 2 * d / 2, bytes=layers * 2 * n * d * 2,
                agree=lambda: close(ours(), peer(), 2e-2), need="≥ 5× the per-layer torch loop")  # fmt: skip


def vit_job(n: int, blocks: int):
    """The linear layers of ViT-B/16 at 224², ``blocks`` of its 12 blocks; FLOPs: forming and contracting gradients."""
    t, widths = 197, [(768, 2304), (768, 768), (768, 3072), (3072, 768)]
    layers = [(torch.randn(n, t, i, device=DEVICE).bfloat16(), torch.randn(n, t, o, device=DEVICE).bfloat16())
              for i, o in widths]  # fmt: skip
    ours = lambda: [ef.ops.gram(a, b, route="tiles") for _ in range(blocks) for a, b in layers]  # noqa: E731

    def peer():
        """Materialise each layer's per-sample gradients: n·P of them, then one product."""
        out = []
        for _ in range(blocks):
            for a, b in layers:
                g = torch.bmm(b.mT, a).flatten(1)
                out.append((g @ g.T).float())
        return out

    weights = blocks * sum(i * o for i, o in widths)
    return dict(ours=ours, peer=peer, flops=2 * n * t * weights + n * n * weights, memory=True,
                agree=lambda: close(ours(), peer(), 2e-2), need="≥ 3× TorchJD, ≤ 1/5 of its memory")  # fmt: skip


def linear_loss_job(vocabulary: int, n: int, t: int, d: int):
    h = torch.randn(n, t, d, device=DEVICE).bfloat16().requires_grad_()
    weight = (torch.randn(vocabulary, d, device=DEVICE) / d**0.5).bfloat16().requires_grad_()
    target = torch.randint(0, vocabulary, (n, t), device=DEVICE)

    def ours():
        return torch.autograd.grad(ef.ops.linear_sample_loss(h, weight, target).sum(), (h, weight))

    def peer():
        logits = F.linear(h, weight).float()
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(n, t).mean(1)
        return torch.autograd.grad(loss.sum(), (h, weight))

    return dict(ours=ours, peer=peer, flops=6 * n * t * d * vocabulary, memory=True,
                agree=lambda: close(ours(), peer(), 3e-2), need="≤ 1/8 of the memory of logits")  # fmt: skip


def loss_job(rows: int, classes: int):
    x, target = torch.randn(rows, classes, device=DEVICE).bfloat16(), torch.randint(0, classes, (rows,), device=DEVICE)
    return dict(ours=lambda: ef.ops.sample_loss(x, target), peer=lambda: F.cross_entropy(x.float(), target, reduction="none"),
                bytes=rows * classes * 2, need="",
                agree=lambda: close(ef.ops.sample_loss(x, target), F.cross_entropy(x.float(), target, reduction="none"), 1e-4))  # fmt: skip


def distance_job(kind: str, n: int):
    x, y = torch.randn(n, device=DEVICE), torch.randn(n, device=DEVICE) + 1
    op = getattr(ef.ops, f"w2_{kind}")
    peer = {"sorted": lambda: x.sort(), "moments": lambda: (x.mean() - y.mean()) ** 2 + (x.std() - y.std()) ** 2}[kind]
    exact = lambda: getattr(ef.reference, f"w2_{kind}")(x.double(), y.double())  # noqa: E731
    return dict(ours=lambda: op(x, y), peer=peer, bytes=4 * n * (3 if kind == "moments" else 4),
                agree=lambda: close(op(x, y), exact(), 1e-4),
                need="≤ 1.2× torch.sort alone (it sorts both sides)" if kind == "sorted" else "≥ 70 % of copy bandwidth")  # fmt: skip


def contraction_job(op: str, n: int, t: int, d: int):
    a, b = (torch.randn(n, t, d, device=DEVICE).bfloat16() for _ in range(2))
    w, basis = torch.randn(2, n, device=DEVICE), torch.randn(16, d, d, device=DEVICE).bfloat16()
    calls = {
        "pairs": (lambda: ef.ops.gram(a, b, route="pairs"),
                  lambda: ((a.flatten(0, 1) @ a.flatten(0, 1).T) * (b.flatten(0, 1) @ b.flatten(0, 1).T))
                  .view(n, t, n, t).float().sum((1, 3)), n * n * t * t * 2 * d),
        "sqnorm": (lambda: ef.ops.sqnorm(a, b), lambda: torch.bmm(b.mT, a).float().square().sum((1, 2)), 2 * n * t * d * d),
        "combine": (lambda: ef.ops.combine(a, b, w),
                    lambda: torch.stack([torch.einsum("nto,nti->oi", b * v.bfloat16()[:, None, None], a).float() for v in w]),
                    4 * n * t * d * d),
        "project": (lambda: ef.ops.project(a, b, basis),
                    lambda: (torch.bmm(b.mT, a).flatten(1) @ basis.flatten(1).T).float(), 2 * n * t * d * d + 32 * n * d * d),
    }  # fmt: skip
    ours, peer, flops = calls[op]
    return dict(ours=ours, peer=peer, flops=flops, agree=lambda: close(ours(), peer(), 3e-2), need="")


def jobs(long: bool) -> dict:
    out = {
        "step P=1e9 k=2": lambda: step_job(10**9),
        "gram rows n=1024 50x4096": lambda: rows_job(1024, 50, 4096),
        "gram tiles ViT-B/16 n=128": lambda: vit_job(128, 12),
        "linear_sample_loss V=128k 8x2048 d=4096": lambda: linear_loss_job(131072, 8, 2048, 4096),
        "sample_loss 8192x50257": lambda: loss_job(8192, 50257),
        "w2 sorted n=1e6": lambda: distance_job("sorted", 10**6),
        "w2 moments n=1e6": lambda: distance_job("moments", 10**6),
        "gram pairs n=256 t=16 d=768": lambda: contraction_job("pairs", 256, 16, 768),
        "sqnorm n=128 t=197 d=768": lambda: contraction_job("sqnorm", 128, 197, 768),
        "combine n=128 t=197 d=768": lambda: contraction_job("combine", 128, 197, 768),
        "project n=128 t=197 d=768 k=16": lambda: contraction_job("project", 128, 197, 768),
    }
    if long:
        out |= {f"step P={p:.0e} k=2": lambda p=p: step_job(int(p)) for p in (1e8, 3e8)}
        out |= {f"gram rows n={n} 50x4096": lambda n=n: rows_job(n, 50, 4096) for n in (128, 256, 512, 2048)}
        out |= {f"gram pairs n=256 t={t} d=768": lambda t=t: contraction_job("pairs", 256, t, 768) for t in (2, 4, 8, 32)}
        out |= {f"sample_loss {n}x1000": lambda n=n: loss_job(n, 1000) for n in (256, 65536)}
    return out


def measure(job: dict, timer: Timer, top: dict) -> dict:
    if not job["agree"]():
        return {"wrong": "the result does not agree with the peer's", "need": job["need"]}
    out = {"need": job["need"], **timer(job["ours"]), "peer_ms": timer(job["peer"])["ms"]}
    out["speedup"] = out["peer_ms"] / out["ms"]
    if "bytes" in job:
        out["copy_fraction"] = job["bytes"] / out["ms"] * 1e3 / top["copy_bytes_per_s"]
    if "flops" in job:
        out["gemm_fraction"] = job["flops"] / out["ms"] * 1e3 / top["gemm_bf16_flops_per_s"]
    if job.get("memory"):
        out["peak_bytes"], out["peer_peak_bytes"] = peak_bytes(job["ours"]), peak_bytes(job["peer"])
    return out


def tests_of(path: str) -> dict:
    try:
        suite = xml.parse(path).getroot().find("testsuite")
        failed = [f"{c.get('classname')}::{c.get('name')}" for c in suite if c.find("failure") is not None or c.find("error") is not None]
        return {k: int(suite.get(k)) for k in ("tests", "failures", "errors", "skipped")} | {"failed": failed}
    except (OSError, xml.ParseError, AttributeError):
        return {"missing": "the tests left no report"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--tests", default="")
    parser.add_argument("--budget", type=float, default=170, help="seconds after which no further job begins")
    parser.add_argument("--long", action="store_true")
    options = parser.parse_args()
    began = time.perf_counter()
    name = torch.cuda.get_device_name().replace(" ", "_")
    report = {
        "device": torch.cuda.get_device_name(), "commit": options.commit, "long": options.long,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "python": sys.version.split()[0],
        "torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda or torch.version.hip,
        "tests": tests_of(options.tests), "jobs": {},
    }  # fmt: skip
    folders = [ROOT / "results" / name, *([Path(os.environ["OUT"]) / "results" / name] if os.environ.get("OUT") else [])]

    def save():
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{options.commit}.json").write_text(json.dumps(report, indent=1) + "\n")

    warmup.warmup(DEVICE, dtypes=(torch.bfloat16,), sweep=options.long)
    timer = Timer(200 if options.long else 30)
    report["ceilings"] = ceilings(timer)
    save()
    print(json.dumps(report["ceilings"]))
    for title, make in jobs(options.long).items():
        if time.perf_counter() - began > options.budget:
            report["jobs"][title] = {"skipped": "no time left"}
            continue
        try:
            report["jobs"][title] = measure(make(), timer, report["ceilings"])
        except Exception as error:  # one job must not cost the others their numbers
            traceback.print_exc()
            report["jobs"][title] = {"error": f"{type(error).__name__}: {error}"}
        torch.cuda.empty_cache()
        save()
        print(title, json.dumps(report["jobs"][title]), flush=True)
    return int(any("wrong" in j or "error" in j for j in report["jobs"].values()))


if __name__ == "__main__":
    sys.exit(main())
