"""Whole models of the GPU matrix: the Gram of ViT-B/16, a stage-2 step of ResNet-18."""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn as nn
import torch.nn.functional as F
from gpu_job import DEVICE, Job, at_least
from models import Residual, ViT
from peers import GRAM

import entangle_fast as ef
from entangle_fast.methods.data import Data
from entangle_fast.methods.process import sample_cross_entropy

BF16 = torch.bfloat16


def vit_gram(n: int, d: int = 768, heads: int = 12, depth: int = 12, patch: int = 16, size: int = 224) -> Job:
    """ViT-B/16 (mean-pooled, no class token), bfloat16. FLOPs: n²P for the products of the gradients, half of a square."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = ViT(d, heads, depth, patch, classes=10).to(BF16)
        x, y = torch.randn(n, 3, size, size, dtype=BF16), torch.randint(0, 10, (n,))
    contracted = float(n) * n * sum(p.numel() for p in model.parameters())
    names = ("plain", "torchjd") if find_spec("torchjd") else ("plain",)  # `plain` gives no Gram: its time alone counts
    few = min(n, 16)

    def exact():
        """A corner of the Gram, one backward a sample, the same weights in float32."""
        wide = ViT(d, heads, depth, patch, classes=10).to(DEVICE)
        wide.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
        return GRAM["autograd_loop"](wide, x[:few].float(), y[:few])()

    def result(call):
        found = call()
        return None if found is None else found[:few, :few].float()

    def floor(m):
        return m.ms["plain"] + contracted / (0.7 * m.top["gemm_bf16_flops_per_s"]) * 1e3 if "plain" in m.ms else None

    return Job(GRAM["ours"](model, x, y), {name: GRAM[name](model, x, y) for name in names}, (), ("ours",), exact=exact, result=result,
               tolerance=5e-2, flops=contracted, memory=True,
               needs={"ours: ≤ 1.3× (forward and backward + n²P at 70 % of the GEMM rate)":
                      lambda m, p: None if floor(m) is None else m.ms[p] <= 1.3 * floor(m),
                      "ours: ≥ 3× TorchJD": lambda m, p: at_least(m.faster(p, "torchjd"), 3),
                      "ours: ≤ 1/5 of TorchJD's memory": lambda m, p: at_least(m.smaller(p, "torchjd"), 5)})  # fmt: skip


def resnet18(classes: int = 10, width: int = 64) -> nn.Module:
    """ResNet-18 for 224²: the stem of 7 × 7, stride 2 and a pooling; BatchNorm frozen, as in every step of ours."""
    layers = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    c = width
    for i in range(4):
        k = width * 2**i
        layers += [Residual(c, k, 2 if i else 1), Residual(k, k, 1)]
        c = k
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, classes)).eval()


def stage2(adjacent: int, forget: int, remote: int, size: int = 224, width: int = 64) -> Job:
    """A stage-2 step of ef.Entangled on three batches in memory, against plain forward and backward of the same samples."""
    torch.manual_seed(0)
    counts = {"adjacent": adjacent, "forget": forget, "remote": remote}
    with torch.device(DEVICE):
        model = resnet18(width=width).to(BF16)
        sets = {k: (torch.randn(m, 3, size, size, dtype=BF16), torch.randint(0, 10, (m,))) for k, m in counts.items()}
    config = ef.Entangled(epochs1=0, epochs2=1e6, lr2=1e-9, batch_limit=1, **{f"{k}_batch2": m for k, m in counts.items()})
    process = config.start(model, Data.of(**sets, device=DEVICE, seed=0, allow_overlap=True), sample_cross_entropy, 0)
    params = list(model.parameters())

    def losses(x, y):
        return F.cross_entropy(model(x).float(), y, reduction="none")

    def each():
        for x, y in sets.values():
            torch.autograd.grad(losses(x, y).mean(), params)

    whole = [torch.cat(parts) for parts in zip(*sets.values())]

    def together():
        torch.autograd.grad(losses(*whole).mean(), params)

    def result(call):
        row = call()
        return None if row is None else torch.stack([row[f"loss_{k}"].float() for k in counts])

    @torch.no_grad()
    def exact():
        return torch.stack([losses(*sets[k]).mean() for k in counts])

    return Job(process.step, {"plain, one batch": together, "plain, three batches": each}, (), ("ours",), exact=exact, result=result,
               tolerance=2e-2, needs={f"ours: ≤ 1.15× {p}": lambda m, o, p=p: at_least(m.faster(o, p), 1 / 1.15)
                                      for p in ("plain, one batch", "plain, three batches")})  # fmt: skip


def jobs(long: bool = False) -> dict:
    out = {"stage-2 step, ResNet-18 at 224², bf16": lambda: stage2(128, 64, 192), "gram ViT-B/16 n=128 bf16": lambda: vit_gram(128)}
    if long:
        out |= {f"gram ViT-B/16 n={n} bf16": lambda n=n: vit_gram(n) for n in (32, 64)}
    return out


def small() -> dict:
    return {"vit": vit_gram(4, 16, 2, 1, 4, 8), "stage 2": stage2(3, 2, 2, 32, 4)}
