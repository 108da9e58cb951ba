"""The jobs: what is measured, by whom, and the bytes and FLOPs that each has to move and do, counted by formula.

A job gives providers name → function; those that return tensors must agree with the first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from models import MODELS, build
from peers import GRAM, there

from entangle_fast import reference

ours = torch.ops.entangle_fast


@dataclass
class Job:
    op: str
    shape: dict
    dtype: torch.dtype
    make: Callable[[], dict[str, Callable]]
    flops: float = 0.0
    bytes: float = 0.0
    tolerance: float = 1e-3
    slow: bool = False
    providers: tuple[str, ...] = ()
    key: str = field(init=False)

    def __post_init__(self):
        short = str(self.dtype).removeprefix("torch.")
        self.key = "-".join([self.op, *(f"{k}{v}" for k, v in self.shape.items()), short])


def _parameters(name):
    with torch.device("meta"):
        return sum(p.numel() for p in MODELS[name][0]().parameters())


def model_gram(name, n, dtype=torch.float32, providers=("ours", "plain", "capture_only", "vmap", "opacus", "torchjd"), slow=False):
    def make():
        model, x, y = build(name, n, dtype)
        return {p: (lambda f=GRAM[p]: f(model, x, y)) for p in providers if there(p)}

    return Job("model_gram", {"model": name, "n": n}, dtype, make, flops=float(n) * n * _parameters(name),
               tolerance=2e-2 if dtype == torch.bfloat16 else 1e-3, slow=slow, providers=providers)  # fmt: skip


def _plain_gram(a, b):
    G = torch.einsum("nto,nti->noi", b, a).flatten(1)
    return G @ G.T


def gram(n, t, d_in, d_out, dtype=torch.float32, route="tiles"):
    def make():
        a, b = torch.randn(n, t, d_in).to(dtype), torch.randn(n, t, d_out).to(dtype)
        return {
            "ours": lambda: ours.gram(a, b, None, None, route),
            "reference": lambda: reference.gram(a, b, route=route),
            "torch": lambda: _plain_gram(a, b),
        }

    work = 2.0 * n * t * d_in * d_out + float(n) * n * d_in * d_out if route == "tiles" else float(n * t) ** 2 * (d_in + d_out)
    moved = n * t * (d_in + d_out) * dtype.itemsize
    return Job("gram_" + route, dict(n=n, t=t, i=d_in, o=d_out), dtype, make, work, moved, 2e-2 if dtype.itemsize == 2 else 1e-3,
               providers=("ours", "reference", "torch"))  # fmt: skip


def gram_conv(n, c_in, c_out, size, dtype=torch.float32, kernel=3):
    rest = ((kernel, kernel), (1, 1), (kernel // 2, kernel // 2), (1, 1), 1)

    def make():
        x, g = torch.randn(n, c_in, size, size).to(dtype), torch.randn(n, c_out, size, size).to(dtype)

        def unfold():
            cols = F.unfold(x, kernel, padding=kernel // 2)
            G = torch.bmm(g.flatten(2), cols.mT).flatten(1)
            return G @ G.T

        return {"ours": lambda: ours.gram_conv(x, g, *rest, None, None, "tiles"),
                "reference": lambda: reference.gram_conv(x, g, *rest), "torch": unfold}  # fmt: skip

    width = c_in * kernel**2 * c_out
    return Job("gram_conv", dict(n=n, i=c_in, o=c_out, s=size), dtype, make, 2.0 * n * size**2 * width + float(n) * n * width,
               n * size**2 * (c_in + c_out) * dtype.itemsize, 2e-2 if dtype.itemsize == 2 else 1e-3,
               providers=("ours", "reference", "torch"))  # fmt: skip


def gram_embedding(n, t, d, vocabulary):
    def make():
        ids, b = (torch.rand(n, t) ** 4 * vocabulary).long(), torch.randn(n, t, d)  # common ids are common
        return {"ours": lambda: ours.gram_embedding(ids, b), "reference": lambda: reference.gram_embedding(ids, b)}

    return Job("gram_embedding", dict(n=n, t=t, d=d, v=vocabulary), torch.float32, make, 0, n * t * d * 4, providers=("ours", "reference"))


def sqnorm(n, t, d_in, d_out, dtype=torch.float32):
    def make():
        a, b = torch.randn(n, t, d_in).to(dtype), torch.randn(n, t, d_out).to(dtype)
        return {"ours": lambda: ours.sqnorm(a, b), "reference": lambda: reference.sqnorm(a, b),
                "torch": lambda: torch.einsum("nto,nti->noi", b, a).square().sum((1, 2))}  # fmt: skip

    work = 2.0 * n * t * min(t * (d_in + d_out), d_in * d_out)
    return Job("sqnorm", dict(n=n, t=t, i=d_in, o=d_out), dtype, make, work, n * t * (d_in + d_out) * dtype.itemsize, 2e-2,
               providers=("ours", "reference", "torch"))  # fmt: skip


def combine_disjoint(n, t, d):
    """Stage 2's three means: rows of w on disjoint contiguous segments."""

    def make():
        a, b, w = torch.randn(n, t, d), torch.randn(n, t, d), torch.zeros(3, n)
        for row, segment in zip(w, torch.arange(n).chunk(3)):
            row[segment] = 1 / len(segment)
        return {"ours": lambda: ours.combine(a, b, w),
                "torch": lambda: torch.stack([(b * v[:, None, None]).flatten(0, 1).T @ a.flatten(0, 1) for v in w])}  # fmt: skip

    return Job("combine", dict(n=n, t=t, d=d, m=3), torch.float32, make, 2.0 * n * t * d * d, n * t * d * 8, providers=("ours", "torch"))


def sample_loss(n, classes, dtype=torch.float32):
    def make():
        x, y, w = torch.randn(n, classes).to(dtype), torch.randint(0, classes, (n,)), torch.rand(n)

        def mine():
            _, ce, lse = ours.sample_loss(x, y, 1e9)
            return ours.sample_loss_backward(w, x, y, ce, lse, 1e9)

        def autograd(loss):
            z = x.detach().requires_grad_()
            return torch.autograd.grad((loss(z) * w).sum(), z)[0]

        return {"ours": mine, "torch": lambda: autograd(lambda z: F.cross_entropy(z, y, reduction="none"))}

    return Job("sample_loss", dict(n=n, C=classes), dtype, make, 0, 3 * n * classes * dtype.itemsize, 2e-2 if dtype.itemsize == 2 else 1e-3,
               providers=("ours", "torch"))  # fmt: skip


def step(P, what):
    shapes = [P // 8] * 8
    size = P // 8 * 8

    def make():
        p, v, g, d1, d2 = ([torch.randn(s) for s in shapes] for _ in range(5))
        coef = torch.tensor([0.1, 0.2])
        if what == "gram":
            return {
                "ours": lambda: ours.step_gram(d1 + d2, 2),
                "torch": lambda: _pairs_in_double(d1, d2),
                "foreach": lambda: (torch._foreach_norm(d1), torch._foreach_norm(d2), torch._foreach_mul(d1, d2)) and None,
            }
        if what == "lookahead":

            def mine():
                found = ours.step_lookahead(p, g, 1e-3)
                ours.step_lookahead_undo(p, g, *found, 1e-3)

            def clones():
                before = [x.clone() for x in p]
                torch._foreach_add_(p, g, alpha=-1e-3)
                torch._foreach_copy_(p, before)

            return {"ours": mine, "foreach": clones}

        def foreach():
            torch._foreach_mul_(v, 0.9)
            torch._foreach_add_(v, g)
            torch._foreach_add_(v, d1, alpha=-0.1)
            torch._foreach_add_(v, d2, alpha=-0.2)
            torch._foreach_mul_(p, 1 - 1e-4)
            torch._foreach_add_(p, v, alpha=-1e-3)

        return {"ours": lambda: ours.step_update(p, v, g, d1 + d2, coef, 1e-3, 0.9, 0.1), "foreach": foreach}

    moved = {"gram": 8, "lookahead": 26, "update": 28}[what]  # bytes a parameter, float32
    return Job("step_" + what, dict(P=P), torch.float32, make, 0, moved * size, slow=P > 3e7, providers=("ours", "foreach", "torch"))


def _pairs_in_double(d1, d2):
    """As the paper's authors do: per-tensor dots in double."""
    dot = lambda xs, ys: sum(torch.dot(x.flatten().double(), y.flatten().double()) for x, y in zip(xs, ys))  # noqa: E731
    return torch.stack([torch.stack([dot(d1, d1), dot(d1, d2)]), torch.stack([dot(d2, d1), dot(d2, d2)])])


def w2(n):
    def make():
        x, y = torch.rand(n), torch.rand(n)
        table = {"ours": lambda: ours.w2_sorted(x, y)[0]}
        if there("pot"):
            import ot

            table["pot"] = lambda: ot.wasserstein_1d(x, y, p=2)
        if there("geomloss"):
            import geomloss

            sinkhorn = geomloss.SamplesLoss("sinkhorn", p=2, blur=1e-3)
            table["geomloss"] = lambda: 2 * sinkhorn(x[:, None], y[:, None])
        return table

    return Job("w2_sorted", dict(n=n), torch.float32, make, 0, 8 * n, 5e-2, providers=("ours", "pot", "geomloss"))


def all_jobs() -> list[Job]:
    bf16, f32 = torch.bfloat16, torch.float32
    jobs = [model_gram(name, 256) for name in ("mlp", "cnn", "encoder")]
    jobs += [model_gram(name, 64) for name in ("mlp", "cnn", "encoder", "resnet18")]
    jobs += [model_gram("encoder", 256, bf16, ("ours", "plain", "capture_only", "vmap", "torchjd")),
             model_gram("mlp", 1024, slow=True), model_gram("resnet18", 256, slow=True),
             model_gram("vit_tiny", 64, providers=("ours", "plain", "vmap"), slow=True),
             model_gram("gpt2_small", 64, providers=("ours", "plain"), slow=True)]  # fmt: skip
    for dtype in (f32, bf16):
        jobs += [gram(256, 1, 1024, 1024, dtype, "pairs"), gram(256, 4, 512, 512, dtype, "pairs"),
                 gram(256, 64, 256, 256, dtype), gram(256, 64, 256, 1024, dtype), gram(64, 64, 256, 1024, dtype),
                 gram_conv(256, 32, 32, 32, dtype), gram_conv(256, 128, 128, 8, dtype),
                 sqnorm(256, 1, 1024, 1024, dtype), sqnorm(256, 64, 256, 1024, dtype), sqnorm(256, 16, 512, 512, dtype),
                 sample_loss(4096, 10, dtype), sample_loss(512, 1000, dtype), sample_loss(64, 50257, dtype)]  # fmt: skip
    jobs += [gram_embedding(64, 128, 256, 5000), combine_disjoint(256, 16, 512)]
    jobs += [step(P, what) for what in ("gram", "update", "lookahead") for P in (10**6, 10**7, 10**8)]
    return jobs + [w2(256), w2(4096)]


BY_KEY = {job.key: job for job in all_jobs()}
