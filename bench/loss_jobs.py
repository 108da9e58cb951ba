"""Jobs on losses: per-sample cross-entropy with weights in its backward, its chunked linear form, W2's weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from job import Job, tolerance
from peers import compiled

ours = torch.ops.entangle_fast
F32 = torch.float32
UNBOUNDED = float("inf")


def sample_loss(n, classes, dtype=F32):
    """Forward, and backward with a weight for each sample; the result is the gradient. Bytes: logits read twice, one write."""

    def make(wanted):
        x, y, w = torch.randn(n, classes).to(dtype), torch.randint(0, classes, (n,)), torch.rand(n)

        def mine():
            _, ce, lse = ours.sample_loss(x, y, UNBOUNDED)
            return ours.sample_loss_backward(w, x, y, ce, lse, UNBOUNDED)

        def autograd(loss):
            def call():
                z = x.detach().requires_grad_()
                return torch.autograd.grad((loss(z, y) * w).sum(), z)[0]

            return call

        form = {"ours": lambda: mine, "torch": lambda: autograd(_cross_entropy),
                "compile": lambda: autograd(compiled(_cross_entropy))}  # fmt: skip
        return {p: form[p]() for p in wanted}

    return Job("sample_loss", dict(n=n, C=classes), dtype, make, ("ours", "torch", "compile"), 0, 3 * n * classes * dtype.itemsize,
               tolerance(dtype))  # fmt: skip


def _cross_entropy(z, y):
    return F.cross_entropy(z, y, reduction="none")


def linear_sample_loss(n, d, classes, slow=False):
    """Loss of logits h Wᵀ and its gradients for h and W; ours holds a chunk of the logits, the peers all of them.
    FLOPs: 6 n d C, the three products of a form that keeps the logits."""

    def make(wanted):
        h, W, y, w = torch.randn(n, d), torch.randn(classes, d) / d**0.5, torch.randint(0, classes, (n,)), torch.rand(n)

        def of(loss):
            def call():
                a, b = h.detach().requires_grad_(), W.detach().requires_grad_()
                found = torch.autograd.grad((loss(a, b, y) * w).sum(), (a, b))
                return torch.cat([g.flatten() for g in found])

            return call

        def mine(a, b, y):
            return ours.linear_sample_loss(a, b, None, y, UNBOUNDED)[0]

        form = {"ours": lambda: of(mine), "torch": lambda: of(_linear_cross_entropy),
                "compile": lambda: of(compiled(_linear_cross_entropy))}  # fmt: skip
        return {p: form[p]() for p in wanted}

    return Job("linear_sample_loss", dict(n=n, d=d, C=classes), F32, make, ("ours", "torch", "compile"), 6.0 * n * d * classes,
               4 * (2 * n * d + 3 * classes * d), slow=slow,
               memory={"": 16.0 * classes * d, "torch": 12.0 * n * classes, "compile": 12.0 * n * classes})  # fmt: skip


def _linear_cross_entropy(h, W, y):
    return F.cross_entropy(F.linear(h, W), y, reduction="none")


def w2(n, providers=("ours", "torch", "pot", "compile")):
    """Exact 1-D W2² of n losses to n reference losses; the result is its weights ∂W2²/∂losses.

    geomloss regularises by entropy: blur well below the spacing of the losses, and scaling 0.99, the slow and accurate end of
    its annealing (its docs: above 0.9), bring it to 2 % of the exact weights at n = 256, in seconds; its cost is n² a sweep.
    """

    def make(wanted):
        x, y = torch.rand(n), torch.rand(n)

        def of(distance):
            def call():
                z = x.detach().requires_grad_()
                return torch.autograd.grad(distance(z, y), z)[0]

            return call

        def pot():
            import ot

            return of(lambda z, y: ot.wasserstein_1d(z, y, p=2))

        def geomloss():
            from geomloss import SamplesLoss

            sinkhorn = SamplesLoss("sinkhorn", p=2, blur=1e-3, scaling=0.99)  # its cost is half the square
            return of(lambda z, y: 2 * sinkhorn(z[:, None], y[:, None]))

        form = {"ours": lambda: lambda: ours.w2_sorted(x, y)[1], "torch": lambda: of(_sorted_w2), "pot": pot,
                "geomloss": geomloss, "compile": lambda: of(compiled(_sorted_w2))}  # fmt: skip
        return {p: form[p]() for p in wanted}

    return Job("w2_sorted", dict(n=n), F32, make, providers, 0, 12 * n, 3e-2)


def _sorted_w2(x, y):
    return (x.sort().values - y.sort().values).square().mean()


def w2_features(n, d):
    """W2² between Gaussians fitted to features; the result is its value. Ours and torch's give its gradient too, POT, by matrix
    square roots, the value alone: theirs has none where a covariance is singular."""

    def make(wanted):
        x, y = torch.randn(n, d), torch.randn(n, d) * 1.2 + 0.3

        def pot():
            import ot

            return lambda: ot.gaussian.empirical_bures_wasserstein_distance(x, y, reg=0.0).squeeze() ** 2

        def with_gradient():
            def call():
                z = x.detach().requires_grad_()
                value = _bures(z, y)
                torch.autograd.grad(value, z)
                return value.detach()

            return call

        form = {"ours": lambda: lambda: ours.w2_features(x, y)[0], "torch": with_gradient, "pot": pot}
        return {p: form[p]() for p in wanted}

    return Job("w2_features", dict(n=n, d=d), F32, make, ("ours", "torch", "pot"), 0, 12 * n * d)


def _bures(x, y):
    """‖μ−μ̄‖² + tr Σ + tr Σ̄ − 2‖X_cY_cᵀ‖_*/n, the nuclear norm by singular values."""
    a, b = x - x.mean(0), y - y.mean(0)
    n = len(x)
    squares = (x.mean(0) - y.mean(0)).square().sum() + (a.square().sum() + b.square().sum()) / n
    return squares - 2 * torch.linalg.svdvals(a @ b.T).sum() / n


def all_loss_jobs() -> list[Job]:
    jobs = [sample_loss(n, C, dtype) for dtype in (F32, torch.bfloat16) for n, C in ((4096, 10), (512, 1000), (64, 50257))]
    jobs += [linear_sample_loss(512, 768, 50257), linear_sample_loss(4096, 768, 50257, slow=True), linear_sample_loss(4096, 512, 1000)]
    jobs += [w2(64), w2(256, ("ours", "torch", "pot", "geomloss", "compile")), w2(1024), w2(4096)]
    return jobs + [w2_features(256, 512)]


def mini_loss_jobs() -> list[Job]:
    return [sample_loss(6, 5), sample_loss(6, 5, torch.bfloat16), linear_sample_loss(6, 4, 9),
            w2(16, ("ours", "torch", "pot", "geomloss", "compile")), w2_features(6, 9)]  # fmt: skip
