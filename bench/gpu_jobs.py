"""Operations of the GPU matrix: the rows of both "must show" tables that one operation makes up, and some beside them.

Each function takes sizes and gives a Job whose tensors lie on the GPU at hand; tests/gpu builds every one on the CPU, small.
"""

from __future__ import annotations

import math
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from authors import dot
from gpu_job import DEVICE, Job, at_least

import entangle_fast as ef
from entangle_fast import reference

BF16 = torch.bfloat16


def _randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def step(count: int, each: int = 1 << 24) -> Job:
    """Stage 2's update with two directions: their Gram with the gradient, the 2×2 solve, one pass over all parameters.

    bf16 parameters, gradient and directions, float32 momentum: 6 bytes a parameter for the Gram; 18 for the update, which
    reads and writes θ and v and reads the gradient and both directions.
    """
    sizes = [each] * max(1, count // each)
    params, grads, forget, remote = ([_randn(s, dtype=BF16) for s in sizes] for _ in range(4))
    momentum = [_randn(s) for s in sizes]
    lr, beta = 1e-3, 0.9

    def ours():
        _, coef = ef.ops.step_project([forget, remote], None, grads)
        ef.ops.step_update(params, momentum, grads, [forget, remote], coef, lr=lr, beta=beta)

    def authors():
        """Inner products tensor by tensor in double, then one tensor after the other, as the published code goes."""
        k = torch.stack([torch.stack([dot(x, y) for y in (forget, remote)]) for x in (forget, remote)])
        c = torch.linalg.solve(k, torch.stack([dot(forget, grads), dot(remote, grads)])).float()
        for p, v, g, a, b in zip(params, momentum, grads, forget, remote):
            v.mul_(beta).add_(g).sub_(c[0] * a.float() + c[1] * b.float())
            p.sub_(lr * v)

    part = min(each, 1 << 16)
    start = params[0][:part].clone(), momentum[0][:part].clone()

    def result(call):
        params[0][:part], momentum[0][:part] = start
        call()
        return momentum[0][:part].clone(), params[0][:part].clone()

    return Job(ours, {"authors": authors}, ("step_project", "step_update"), ("triton", "cuda"), result=result, tolerance=5e-3,
               bytes=sum(sizes) * 24,
               needs={"triton: ≥ 85 % of copy bandwidth": lambda m, p: m.of_copy(p) >= 0.85,
                      "triton: ≥ 3× the authors' form": lambda m, p: at_least(m.faster(p, "authors"), 3),
                      "cuda: ≥ 90 % of copy bandwidth": lambda m, p: m.of_copy(p) >= 0.9})  # fmt: skip


def lookahead(count: int, each: int = 1 << 24) -> Job:
    """θ − αg and back to the bit. Bytes: θ and g twice, θ and one byte written; θ, g and one byte read, θ written."""
    sizes = [each] * max(1, count // each)
    params, grads = ([_randn(s) for s in sizes] for _ in range(2))

    def ours():
        residue = ef.ops.step_lookahead(params, grads, 1e-3)
        ef.ops.step_lookahead_undo(params, grads, residue, 1e-3)
        return params[0][:4096].clone()

    def clones():
        before = [p.clone() for p in params]
        torch._foreach_add_(params, grads, alpha=-1e-3)
        torch._foreach_copy_(params, before)
        return params[0][:4096].clone()

    return Job(ours, {"clones": clones}, ("step_lookahead", "step_lookahead_undo"), ("triton", "cuda"), tolerance=0.0,
               bytes=sum(sizes) * (4 * 4 + 4 + 1 + 4 * 2 + 1 + 4))  # fmt: skip


def rows(n: int, layers: int, d: int) -> Job:
    """Row form of all layers. FLOPs: half of (A Aᵀ)∘(B Bᵀ), the result being symmetric."""
    pairs = [(_randn(n, d, dtype=BF16), _randn(n, d, dtype=BF16)) for _ in range(layers)]

    def loop():
        return sum((a @ a.T).float() * (b @ b.T).float() for a, b in pairs)

    def exact():
        return sum(reference.gram(a, b, route="rows") for a, b in pairs)

    return Job(lambda: ef.ops.gram_layers(pairs), {"torch loop": loop}, ("gram_layers",), exact=exact,
               flops=2.0 * layers * n * n * d, bytes=4.0 * layers * n * d, launches=True,
               needs={"triton: one launch": lambda m, p: m.launches[p] == 1 if m.launches.get(p) else None,
                      "triton: ≥ 5× the per-layer torch loop": lambda m, p: at_least(m.faster(p, "torch loop"), 5)})  # fmt: skip


def tiles(n: int, t: int, d_in: int, d_out: int) -> Job:
    """Form for many positions. FLOPs: every gradient formed once, and half of their products."""
    a, b = _randn(n, t, d_in, dtype=BF16), _randn(n, t, d_out, dtype=BF16)

    def materialise():
        g = torch.bmm(b.mT, a).flatten(1)
        return (g @ g.T).float()

    return Job(lambda: ef.ops.gram(a, b, route="tiles"), {"torch": materialise}, ("gram",), ("triton", "cuda"), tolerance=2e-2,
               flops=2.0 * n * t * d_in * d_out + float(n) * n * d_in * d_out, memory=True,
               needs={"cuda: ≥ 60 % of the GEMM rate": lambda m, p: m.of_gemm(p) >= 0.6,
                      "cuda: ≥ 1.2× Triton": lambda m, p: at_least(m.faster(p, "triton"), 1.2)})  # fmt: skip


def linear_loss(vocabulary: int, n: int, t: int, d: int) -> Job:
    """linear_sample_loss forward and backward, the mean over samples; peers: logits in full, and Liger's fused form."""
    h, weight = _randn(n, t, d, dtype=BF16).requires_grad_(), (_randn(vocabulary, d) / d**0.5).to(BF16).requires_grad_()
    target = torch.randint(0, vocabulary, (n, t), device=DEVICE)

    def gradients(loss):
        return lambda: list(torch.autograd.grad(loss(), (h, weight)))

    def full():
        return F.cross_entropy(F.linear(h, weight).flatten(0, 1).float(), target.flatten())

    peers = {"torch": gradients(full)}
    if DEVICE != "cpu" and find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        peers["liger"] = gradients(lambda: liger(weight, h.flatten(0, 1), target.flatten()))
    logits = n * t * vocabulary * BF16.itemsize
    return Job(gradients(lambda: ef.ops.linear_sample_loss(h, weight, target).mean()), peers,
               ("linear_sample_loss", "linear_sample_loss_backward"), tolerance=3e-2, flops=6.0 * n * t * d * vocabulary, memory=True,
               needs={"triton: ≤ 1/8 of the memory of bf16 logits": lambda m, p: m.peak[p] <= logits / 8,
                      "triton: ≥ the speed of Liger": lambda m, p: at_least(m.faster(p, "liger"), 1)})  # fmt: skip


def loss(count: int, classes: int) -> Job:
    x, target = _randn(count, classes, dtype=BF16), torch.randint(0, classes, (count,), device=DEVICE)
    return Job(lambda: ef.ops.sample_loss(x, target), {"torch": lambda: F.cross_entropy(x.float(), target, reduction="none")},
               ("sample_loss",), ("triton", "cuda"), tolerance=1e-4, bytes=2.0 * count * classes)  # fmt: skip


def moments(n: int) -> Job:
    """Both sets read; the losses read again and their weights written."""
    x, y = _randn(n), _randn(n) + 1

    def plain():
        x_ = x.detach().requires_grad_()
        value = (x_.mean() - y.mean()) ** 2 + (x_.std(correction=0) - y.std(correction=0)) ** 2
        return value.detach(), torch.autograd.grad(value, x_)[0]

    return Job(lambda: ef.ops.w2_moments(x, y), {"torch": plain}, ("w2_moments",), tolerance=1e-4, bytes=16.0 * n,
               exact=lambda: reference.w2_moments(x.double(), y.double()),
               needs={"triton: ≥ 70 % of copy bandwidth": lambda m, p: m.of_copy(p) >= 0.7})  # fmt: skip


def sorted_(n: int) -> Job:
    """Both sets are sorted, one with its indices; "sort": that alone."""
    x, y = _randn(n), _randn(n) + 1

    def sort():
        return x.sort(stable=True).values, y.sort().values

    return Job(lambda: ef.ops.w2_sorted(x, y), {"sort": sort, "torch": lambda: reference.w2_sorted(x, y)}, ("w2_sorted",),
               ("triton", "cuda"), tolerance=1e-4, bytes=16.0 * n, exact=lambda: reference.w2_sorted(x.double(), y.double()),
               needs={"triton: ≤ 1.2× torch.sort of the two sets": lambda m, p: at_least(m.faster(p, "sort"), 1 / 1.2),
                      "cuda: ≥ 1.5× torch.sort and torch operations": lambda m, p: at_least(m.faster(p, "torch"), 1.5)})  # fmt: skip


def project_random(n: int, t: int, d: int, k: int) -> Job:
    """±1 directions drawn in the kernel. Peers: gradients materialised, then times a basis that lies ready, 2k·d² bytes of a layer and
    of a whole model too large; or that torch draws, as TRAK's BasicProjector does, here beside it, so that results can be compared."""
    a, b = _randn(n, t, d, dtype=BF16), _randn(n, t, d, dtype=BF16)
    elements = torch.arange(d * d, device=DEVICE)
    basis = torch.stack([x.to(BF16) for x in reference.philox.each_direction(k, elements, d * d, 1)])

    def materialise():
        return (torch.bmm(b.mT, a).flatten(1) @ basis.T).float()

    def drawn():
        torch.empty_like(basis).bernoulli_(0.5).mul_(2).sub_(1)
        return materialise()

    words = {"torch": "materialise, then project", "drawn": "materialise, draw, project"}
    return Job(lambda: ef.ops.project_random(a, b, k, seed=1), {"torch": materialise, "drawn": drawn}, ("project_random",),
               ("triton", "cuda"), tolerance=2e-2, flops=2.0 * n * t * d * d + 2.0 * n * d * d * k, memory=True,
               needs={f"{p}: ≥ 2× {what}": lambda m, p, peer=peer: at_least(m.faster(p, peer), 2)
                      for p in ("triton", "cuda") for peer, what in words.items()})  # fmt: skip


def contraction(op: str, n: int, t: int, d: int, k: int = 16) -> Job:
    a, b = _randn(n, t, d, dtype=BF16), _randn(n, t, d, dtype=BF16)
    w, basis = _randn(2, n), _randn(k, d, d, dtype=BF16)

    def pairs():
        x, y = a.flatten(0, 1), b.flatten(0, 1)
        return ((x @ x.T).float() * (y @ y.T)).view(n, t, n, t).sum((1, 3))

    def weighted():
        return torch.stack([torch.einsum("nto,nti->oi", b * v.to(BF16)[:, None, None], a).float() for v in w])

    ours, peer, flops = {
        "gram": (lambda: ef.ops.gram(a, b, route="pairs"), pairs, 2.0 * (n * t) ** 2 * d),
        "sqnorm": (lambda: ef.ops.sqnorm(a, b), lambda: torch.bmm(b.mT, a).float().square().sum((1, 2)), 2.0 * n * t * d * min(d, 2 * t)),
        "combine": (lambda: ef.ops.combine(a, b, w), weighted, 4.0 * n * t * d * d),
        "project": (lambda: ef.ops.project(a, b, basis), lambda: (torch.bmm(b.mT, a).flatten(1) @ basis.flatten(1).T).float(),
                    2.0 * n * t * d * d + 2.0 * n * d * d * k),
    }[op]  # fmt: skip
    return Job(ours, {"torch": peer}, (op,), tolerance=3e-2, flops=flops)


def jobs(long: bool = False) -> dict:
    """Title → function that makes the job, the "must show" ones first."""
    out = {
        "step P=1e9, 2 directions, bf16, fp32 momentum": lambda: step(10**9),
        "gram rows n=1024, 50 layers of 4096²": lambda: rows(1024, 50, 4096),
        "linear_sample_loss V=128k, 8×2048, d=4096": lambda: linear_loss(131072, 8, 2048, 4096),
        "gram tiles n=64 t=197 768×3072": lambda: tiles(64, 197, 768, 3072),
        "gram tiles n=128 t=197 768×3072": lambda: tiles(128, 197, 768, 3072),
        "w2 sorted n=1e6": lambda: sorted_(10**6),
        "w2 moments n=1e6": lambda: moments(10**6),
        "project_random n=128 t=196 768² k=512": lambda: project_random(128, 196, 768, 512),
        "sample_loss 8192×50257": lambda: loss(8192, 50257),
        "gram pairs n=256 t=16 768²": lambda: contraction("gram", 256, 16, 768),
        "sqnorm n=128 t=197 768²": lambda: contraction("sqnorm", 128, 197, 768),
        "combine n=128 t=197 768²": lambda: contraction("combine", 128, 197, 768),
        "project n=128 t=197 768² k=16": lambda: contraction("project", 128, 197, 768),
        "lookahead and undo P=1e8": lambda: lookahead(10**8),
    }
    if long:
        out |= {f"step P={p:.0e}": lambda p=p: step(int(p)) for p in (1e8, 3e8)}
        out |= {f"gram rows n={n}, 50 layers of 4096²": lambda n=n: rows(n, 50, 4096) for n in (128, 256, 512, 2048)}
        out |= {f"gram tiles n={n} t=1024 1024²": lambda n=n: tiles(n, 1024, 1024, 1024) for n in (32, 64, 256)}
        out |= {f"gram pairs n=256 t={t} 768²": lambda t=t: contraction("gram", 256, t, 768) for t in (2, 4, 8, 32)}
        out |= {f"w2 {name} n=1e{math.log10(n):.0f}": lambda make=make, n=n: make(n)
                for name, make in (("sorted", sorted_), ("moments", moments)) for n in (10**4, 10**7)}  # fmt: skip
        out |= {f"sample_loss {n}×1000": lambda n=n: loss(n, 1000) for n in (256, 65536)}
    return out


def small() -> dict:
    """Every kind of job at a size for the CPU."""
    return {
        "step": step(1000, 500), "lookahead": lookahead(1000, 500), "rows": rows(6, 3, 8), "tiles": tiles(4, 5, 6, 7),
        "linear loss": linear_loss(11, 3, 4, 5), "loss": loss(6, 7), "moments": moments(50), "sorted": sorted_(50),
        "project_random": project_random(4, 5, 6, 3),
        **{op: contraction(op, 4, 5, 6, 2) for op in ("gram", "sqnorm", "combine", "project")},
    }  # fmt: skip
