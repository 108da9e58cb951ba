"""Whole-model jobs: per-sample Grams and cross-Grams, norms, OrthoGrad's direction, a stage-2 step."""

from __future__ import annotations

import copy

import authors
import torch
from job import Job, tolerance
from models import build, parameters
from peers import GRADS, GRAM, SQNORMS, captured, gram_of, losses_of, plain

import entangle_fast as ef
from entangle_fast.methods.data import Data
from entangle_fast.methods.process import sample_cross_entropy
from entangle_fast.methods.training import in_mode

ALPHA, CLIP = 0.5, 1e9  # OrthoGrad's share of the retain gradient; no forget loss is clipped
STEP = dict(alpha=0.5, lr=1e-3, momentum=0.9)


def _gradients(n: int, P: int, dtype: torch.dtype, copies: float, *providers: str) -> dict[str, float]:
    """Bytes of those that hold all n per-sample gradients, ``copies`` times."""
    return {p: copies * n * P * dtype.itemsize for p in providers}


def _shape(name: str, n: int) -> dict:
    return {"model": name, "n": n}


def gram(name, n, dtype=torch.float32, providers=("ours", "plain", "capture_only", "vmap", "opacus", "torchjd"), slow=False):
    """K_ij = <g_i, g_j>, all parameters; FLOPs: n²P, half of 2n²P by symmetry."""

    def make(wanted):
        model, x, y = build(name, n, dtype)
        return {p: GRAM[p](model, x, y) for p in wanted}

    P = parameters(name)
    return Job("model_gram", _shape(name, n), dtype, make, providers, float(n) * n * P, tolerance=tolerance(dtype), slow=slow,
               memory=_gradients(n, P, dtype, 1.2, "vmap", "opacus", "backpack", "autograd_loop", "compile"))  # fmt: skip


def cross(name, n, m, dtype=torch.float32, providers=("ours", "plain", "vmap"), slow=False):
    """<g_i, g'_j> between n samples and m others; the floor is both halves' forward and backward."""

    def make(wanted):
        model, x, y = build(name, n + m, dtype)
        halves = [(model, x[:n], y[:n]), (model, x[n:], y[n:])]

        def of(provider):
            if provider == "ours":
                return lambda: captured(*halves[0]).gram(captured(*halves[1]))
            if provider == "plain":
                floors = [plain(*half) for half in halves]
                return lambda: [floor() for floor in floors] and None
            left, right = (GRADS[provider](*half) for half in halves)
            return lambda: gram_of(left(), right())

        return {p: of(p) for p in wanted}

    P = parameters(name)
    return Job("model_cross_gram", {**_shape(name, n), "m": m}, dtype, make, providers, 2.0 * n * m * P, tolerance=tolerance(dtype),
               slow=slow, memory=_gradients(n + m, P, dtype, 1.2, "vmap", "autograd_loop", "opacus"))  # fmt: skip


def norms(name, n, dtype=torch.float32, providers=("ours", "plain", "vmap", "opacus", "ghost"), slow=False):
    """‖g_i‖² over all parameters; FLOPs: 2nP, those of squaring gradients that are already formed."""

    def make(wanted):
        model, x, y = build(name, n, dtype)
        return {p: SQNORMS[p](model, x, y) for p in wanted}

    P = parameters(name)
    return Job("model_sqnorms", _shape(name, n), dtype, make, providers, 2.0 * n * P, tolerance=tolerance(dtype), slow=slow,
               memory=_gradients(n, P, dtype, 1.2, "vmap", "opacus", "autograd_loop"))  # fmt: skip


def orthograd(name, n, providers=("ours", "plain", "vmap_qr"), slow=False):
    """OrthoGrad's direction: the mean gradient of n forget samples away from the span of k = n per-sample retain gradients,
    and the mean retain gradient. Peers: all retain gradients, QR. FLOPs: the Gram and the two combinations, n²P + 4nP."""

    def make(wanted):
        model, x, y = build(name, 2 * n)
        retain, forget = (model, x[:n], y[:n]), (model, x[n:], y[n:])

        def mine():
            half = n // 2
            data = Data.of(forget[1:], (x[:half], y[:half]), (x[half:n], y[half:n]), "cpu", 0)
            process = ef.OrthoGrad(alpha=ALPHA, clip=CLIP, retain_batch=n, batch=n).start(model, data, sample_cross_entropy, 0)

            def call():
                with in_mode(model, False):
                    return process.direction(0, {})

            return call

        def qr(source):
            grads, params = source(*retain), list(model.parameters())

            def call():
                G = torch.cat([g.flatten(1) for g in grads()], 1)
                Q = torch.linalg.qr(G.T).Q
                v = flat(torch.autograd.grad(losses_of(*forget).mean(), params))
                return ALPHA * G.mean(0) - (1 - ALPHA) * (v - Q @ (Q.T @ v))

            return call

        def floor():
            both = [plain(*retain), plain(*forget)]
            return lambda: [one() for one in both] and None

        form = {"ours": mine, "plain": floor, "vmap_qr": lambda: qr(GRADS["vmap"]), "loop_qr": lambda: qr(GRADS["autograd_loop"])}
        return {p: form[p]() for p in wanted}

    P = parameters(name)
    return Job("orthograd_direction", _shape(name, n), torch.float32, make, providers, float(n) * n * P + 4.0 * n * P, slow=slow,
               memory=_gradients(n, P, torch.float32, 4, "vmap_qr", "loop_qr"))  # fmt: skip


def stage2(name, n, providers=("ours", "plain", "authors"), slow=False):
    """One step of stage 2 on n adjacent, n forget and n remote samples; the result is the projected momentum.

    The reference losses are those of the model before a change of its parameters, so that W2 has a gradient.
    No FLOPs are claimed: the floor is plain forward and backward of the same samples.
    """

    def make(wanted):
        model, x, y = build(name, 3 * n)
        model.eval()
        frozen = copy.deepcopy(model)
        sets = list(zip(x.chunk(3), y.chunk(3)))
        ridge = 1e-8

        def mine():
            own = copy.deepcopy(frozen)
            config = ef.Entangled(alpha=STEP["alpha"], lr2=STEP["lr"], momentum=STEP["momentum"], batch_limit=1, adjacent_batch2=n,
                                  forget_batch2=n, remote_batch2=n, ridge=ridge * len(list(own.parameters())))  # fmt: skip
            adjacent, forget, remote = sets
            process = config.start(own, Data.of(forget, adjacent, remote, "cpu", 0), sample_cross_entropy, 0)
            process.enter("stage2")
            change(own)

            def call():
                process.take_step("stage2", 0)
                return process.sgd.buffers

            return call

        def theirs():
            own = change(copy.deepcopy(frozen))
            buffers = [torch.zeros_like(p) for p in own.parameters()]
            adjacent, forget, remote = sets

            def call():
                authors.stage2_step(own, frozen, buffers, adjacent, [forget], [remote], ridge=ridge, **STEP)
                return buffers

            return call

        def floor():
            own = change(copy.deepcopy(frozen))
            parts = [plain(own, *s) for s in sets]
            return lambda: [part() for part in parts] and None

        form = {"ours": mine, "plain": floor, "authors": theirs}
        return {p: form[p]() for p in wanted}

    return Job("stage2_step", _shape(name, n), torch.float32, make, providers, slow=slow)


def change(model):
    with torch.no_grad():
        torch._foreach_mul_(list(model.parameters()), 1.05)
    return model


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def all_model_jobs() -> list[Job]:
    bf16 = torch.bfloat16
    usual, few = ("mlp", "cnn", "encoder"), ("mlp", "cnn")
    wide = ("ours", "plain", "capture_only", "vmap", "opacus", "torchjd")
    jobs = [gram("mlp", n, providers=(*wide, "backpack", "compile"), slow=n > 256) for n in (64, 256, 1024)]
    jobs += [gram(name, n, slow=n > 256) for name in ("cnn", "encoder") for n in (64, 256, 1024)]
    jobs += [gram("resnet18", n, providers=("ours", "plain", "capture_only", "vmap", "backpack"), slow=n > 64) for n in (64, 256)]
    jobs += [gram("encoder", 256, bf16, ("ours", "plain", "capture_only", "vmap", "torchjd")),
             gram("vit_tiny", 64, providers=("ours", "plain", "vmap", "torchjd"), slow=True),
             gram("gpt2_small", 64, providers=("ours", "plain", "torchjd"), slow=True)]  # fmt: skip
    for n in (64, 256, 1024):
        loop, slow = ("autograd_loop",) if n == 64 else (), n > 256
        jobs += [cross(name, n, n, providers=("ours", "plain", "vmap", *loop), slow=slow) for name in usual]
        jobs += [norms("mlp", n, providers=("ours", "plain", "vmap", "opacus", "ghost", "backpack"), slow=slow)]
        jobs += [norms(name, n, slow=slow) for name in ("cnn", "encoder")]
        jobs += [orthograd(name, n, ("ours", "plain", "vmap_qr", *(("loop_qr",) if loop else ())), slow) for name in few]
        jobs += [stage2(name, n) for name in few]
    jobs += [norms("resnet18", 64, providers=("ours", "plain", "vmap", "backpack")), orthograd("encoder", 64),
             norms("vit_tiny", 64, providers=("ours", "plain", "ghost", "vmap"), slow=True),
             norms("gpt2_small", 64, providers=("ours", "plain", "ghost"), slow=True)]  # fmt: skip
    return jobs


def mini_model_jobs() -> list[Job]:
    """Every job and provider above at a size for tests."""
    everything = tuple(GRAM)
    jobs = [gram("mini_mlp", 4, providers=everything), gram("mini_cnn", 4), gram("mini_encoder", 4),
            gram("mini_resnet", 3, providers=("ours", "plain", "vmap", "backpack")),
            gram("mini_vit", 3), gram("mini_gpt2", 3, providers=("ours", "plain", "torchjd", "vmap"))]  # fmt: skip
    jobs += [cross("mini_cnn", 4, 3, providers=("ours", "plain", "vmap", "autograd_loop")),
             norms("mini_mlp", 4, providers=tuple(SQNORMS)), norms("mini_cnn", 4), norms("mini_encoder", 4),
             norms("mini_resnet", 3, providers=("ours", "plain", "vmap", "backpack"))]  # fmt: skip
    return jobs + [orthograd("mini_mlp", 4, ("ours", "plain", "vmap_qr", "loop_qr")), orthograd("mini_cnn", 4), stage2("mini_mlp", 4),
                   stage2("mini_cnn", 4)]  # fmt: skip
