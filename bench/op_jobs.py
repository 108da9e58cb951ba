"""Jobs on layer factors: Grams, squared norms, projections, combinations; FLOPs and bytes by formula."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from job import Job, tolerance

from entangle_fast import reference
from entangle_fast.reference import philox

ours = torch.ops.entangle_fast
F32 = torch.float32


def _gradients(a, b):
    return torch.einsum("nto,nti->noi", b, a)


def gram(n, t, d_in, d_out, dtype=F32, route="tiles"):
    def make(_):
        a, b = torch.randn(n, t, d_in).to(dtype), torch.randn(n, t, d_out).to(dtype)

        def formed():
            G = _gradients(a, b).flatten(1)
            return G @ G.T

        return {"ours": lambda: ours.gram(a, b, None, None, route),
                "reference": lambda: reference.gram(a, b, route=route), "torch": formed}  # fmt: skip

    work = 2.0 * n * t * d_in * d_out + float(n) * n * d_in * d_out if route == "tiles" else float(n * t) ** 2 * (d_in + d_out)
    moved = n * t * (d_in + d_out) * dtype.itemsize
    return Job("gram_" + route, dict(n=n, t=t, i=d_in, o=d_out), dtype, make, ("ours", "reference", "torch"), work, moved,
               tolerance(dtype))  # fmt: skip


def gram_layers(layers, n, d_in, d_out, dtype=F32):
    """The layers of one position in one call; loop: one call a layer."""

    def make(_):
        a, b = ([torch.randn(n, d).to(dtype) for _ in range(layers)] for d in (d_in, d_out))
        return {"ours": lambda: ours.gram_layers(a, b, [], []), "reference": lambda: reference.gram_layers(a, b, [], []),
                "loop": lambda: sum(ours.gram(x, y, None, None, "rows") for x, y in zip(a, b))}  # fmt: skip

    width = layers * (d_in + d_out)
    return Job("gram_layers", dict(l=layers, n=n, i=d_in, o=d_out), dtype, make, ("ours", "reference", "loop"), float(n) ** 2 * width,
               n * width * dtype.itemsize, tolerance(dtype))  # fmt: skip


def gram_conv(n, c_in, c_out, size, dtype=F32, kernel=3):
    rest = ((kernel, kernel), (1, 1), (kernel // 2, kernel // 2), (1, 1), 1)

    def make(_):
        x, g = _images(n, c_in, c_out, size, dtype)

        def unfold():
            G = torch.bmm(g.flatten(2), F.unfold(x, kernel, padding=kernel // 2).mT).flatten(1)
            return G @ G.T

        return {"ours": lambda: ours.gram_conv(x, g, *rest, None, None, "tiles"),
                "reference": lambda: reference.gram_conv(x, g, *rest), "torch": unfold}  # fmt: skip

    width = c_in * kernel**2 * c_out
    return Job("gram_conv", dict(n=n, i=c_in, o=c_out, s=size), dtype, make, ("ours", "reference", "torch"),
               2.0 * n * size**2 * width + float(n) * n * width, n * size**2 * (c_in + c_out) * dtype.itemsize,
               tolerance(dtype))  # fmt: skip


def _images(n, c_in, c_out, size, dtype=F32):
    return torch.randn(n, c_in, size, size).to(dtype), torch.randn(n, c_out, size, size).to(dtype)


def _tokens(n, t, d, vocabulary):
    return (torch.rand(n, t) ** 4 * vocabulary).long(), torch.randn(n, t, d)  # common ids are common


def gram_embedding(n, t, d, vocabulary):
    def make(_):
        ids, b = _tokens(n, t, d, vocabulary)
        return {"ours": lambda: ours.gram_embedding(ids, b), "reference": lambda: reference.gram_embedding(ids, b)}

    return Job("gram_embedding", dict(n=n, t=t, d=d, v=vocabulary), F32, make, ("ours", "reference"), 0, n * t * d * 4)


def sqnorm(n, t, d_in, d_out, dtype=F32):
    def make(_):
        a, b = torch.randn(n, t, d_in).to(dtype), torch.randn(n, t, d_out).to(dtype)
        return {"ours": lambda: ours.sqnorm(a, b), "reference": lambda: reference.sqnorm(a, b),
                "torch": lambda: _gradients(a, b).square().sum((1, 2))}  # fmt: skip

    work = 2.0 * n * t * min(t * (d_in + d_out), d_in * d_out)
    return Job("sqnorm", dict(n=n, t=t, i=d_in, o=d_out), dtype, make, ("ours", "reference", "torch"), work,
               n * t * (d_in + d_out) * dtype.itemsize, 2e-2)  # fmt: skip


def _onto(a, b, basis):
    """The peers of a projection: gradients formed and one product; or each direction against the factors, batched."""

    def factors():
        k, flat = len(basis), a.flatten(0, 1)
        moved = torch.bmm(flat.expand(k, *flat.shape), basis.mT)  # (k, n·t, d_out)
        return (moved * b.flatten(0, 1)).sum(2).view(k, *b.shape[:2]).sum(2).T

    return {"torch": lambda: _gradients(a, b).flatten(1) @ basis.flatten(1).T, "bmm": factors}


def _project_job(op, shape, make):
    n, t, d_in, d_out, k = shape.values()
    work = 2.0 * n * d_in * d_out * min(t * k, t + k)  # each direction against the factors, or gradients formed first
    return Job(op, shape, F32, make, ("ours", "torch", "bmm"), work, 4 * (n * t * (d_in + d_out) + k * d_in * d_out))


def project(n, t, d_in, d_out, k):
    """Per-sample gradients onto k given directions."""

    def make(_):
        a, b, basis = torch.randn(n, t, d_in), torch.randn(n, t, d_out), torch.randn(k, d_out, d_in)
        return {"ours": lambda: ours.project(a, b, basis), **_onto(a, b, basis)}

    return _project_job("project", dict(n=n, t=t, i=d_in, o=d_out, k=k), make)


def project_random(n, t, d_in, d_out, k):
    """Onto k random sign directions, which ours draws on the fly; the peers are given the same ones, stored beforehand."""

    def make(_):
        a, b = torch.randn(n, t, d_in), torch.randn(n, t, d_out)
        basis = philox.directions(k, d_in * d_out, 7).view(k, d_out, d_in)
        return {"ours": lambda: ours.project_random(a, b, k, 7), **_onto(a, b, basis)}

    return _project_job("project_random", dict(n=n, t=t, i=d_in, o=d_out, k=k), make)


def project_conv(n, c_in, c_out, size, k, kernel=3):
    """A convolution's per-sample gradients onto k given directions; torch: a convolution with each direction, against g."""

    def make(_):
        (x, g), basis = _images(n, c_in, c_out, size), torch.randn(k, c_out, c_in, kernel, kernel)

        def convolve():
            return torch.stack([(F.conv2d(x, d, padding=kernel // 2) * g).flatten(1).sum(1) for d in basis], 1)

        def together():  # the directions as so many more channels
            y = F.conv2d(x, basis.flatten(0, 1), padding=kernel // 2).unflatten(1, (k, c_out))
            return (y * g.unsqueeze(1)).flatten(2).sum(2)

        shape = ([1, 1], [kernel // 2] * 2, [1, 1], 1)
        return {"ours": lambda: ours.project_conv(x, g, basis, *shape), "torch": convolve, "together": together}

    return Job("project_conv", dict(n=n, i=c_in, o=c_out, s=size, k=k), F32, make, ("ours", "torch", "together"),
               2.0 * n * c_in * c_out * kernel**2 * min(size**2 * k, size**2 + k), 4 * n * size**2 * (c_in + c_out))  # fmt: skip


def project_embedding(n, t, d, vocabulary, k):
    """A table's per-sample gradients onto k given directions. Bytes: b and the rows of each direction."""

    def make(_):
        (ids, b), basis = _tokens(n, t, d, vocabulary), torch.randn(k, vocabulary, d)
        return {"ours": lambda: ours.project_embedding(ids, b, basis),
                "torch": lambda: torch.stack([(b * F.embedding(ids, table)).sum((1, 2)) for table in basis], 1),
                "einsum": lambda: torch.einsum("ntd,kntd->nk", b, basis[:, ids])}  # fmt: skip

    return Job("project_embedding", dict(n=n, t=t, d=d, v=vocabulary, k=k), F32, make, ("ours", "torch", "einsum"),
               2.0 * n * t * k * d, 4 * n * t * d * (1 + k))  # fmt: skip


def sqnorm_embedding(n, t, d, vocabulary):
    """Norms of a table's per-sample gradients; torch: t×t products of the positions that share an id."""

    def make(_):
        ids, b = _tokens(n, t, d, vocabulary)

        def formed():
            rows = b.new_zeros(n * vocabulary, d).index_add_(0, (ids + vocabulary * torch.arange(n)[:, None]).flatten(), b.flatten(0, 1))
            return rows.view(n, -1).square().sum(1)

        return {"ours": lambda: ours.sqnorm_embedding(ids, b), "formed": formed,
                "torch": lambda: ((b @ b.mT) * (ids.unsqueeze(2) == ids.unsqueeze(1))).sum((1, 2))}  # fmt: skip

    return Job("sqnorm_embedding", dict(n=n, t=t, d=d, v=vocabulary), F32, make, ("ours", "torch", "formed"), 2.0 * n * t * d,
               4 * n * t * d)  # fmt: skip


def combine(n, t, d_in, d_out, m, disjoint=False):
    """Σ_i w_i g_i for m rows of weights; disjoint: rows on contiguous segments, as in stage 2's three means."""

    def make(_):
        a, b, w = torch.randn(n, t, d_in), torch.randn(n, t, d_out), torch.zeros(m, n) if disjoint else torch.randn(m, n)
        for row, segment in zip(w, torch.arange(n).chunk(m) if disjoint else ()):
            row[segment] = 1 / len(segment)
        return {"ours": lambda: ours.combine(a, b, w), "einsum": lambda: torch.einsum("mn,nto,nti->moi", w, b, a),
                "torch": lambda: torch.stack([(b * v[:, None, None]).flatten(0, 1).T @ a.flatten(0, 1) for v in w])}  # fmt: skip

    rows = 1 if disjoint else m
    return Job("combine_disjoint" if disjoint else "combine", dict(n=n, t=t, i=d_in, o=d_out, m=m), F32, make,
               ("ours", "torch", "einsum"), 2.0 * rows * n * t * d_in * d_out, 4 * n * t * (d_in + d_out))  # fmt: skip


def combine_conv(n, c_in, c_out, size, m, kernel=3):
    rest = ((kernel, kernel), (1, 1), (kernel // 2, kernel // 2), (1, 1), 1)

    def make(_):
        (x, g), w = _images(n, c_in, c_out, size), torch.randn(m, n)

        def backward():
            shape = (c_out, c_in, kernel, kernel)
            weighted = (g * v[:, None, None, None] for v in w)
            return torch.stack([torch.nn.grad.conv2d_weight(x, shape, gv, padding=kernel // 2) for gv in weighted])

        def unfold():
            cols = F.unfold(x, kernel, padding=kernel // 2)
            return torch.einsum("mn,nop,nip->moi", w, g.flatten(2), cols).view(m, c_out, c_in, kernel, kernel)

        return {"ours": lambda: ours.combine_conv(x, g, w, *rest), "torch": backward, "einsum": unfold}

    return Job("combine_conv", dict(n=n, i=c_in, o=c_out, s=size, m=m), F32, make, ("ours", "torch", "einsum"),
               2.0 * m * n * size**2 * c_in * c_out * kernel**2, 4 * n * size**2 * (c_in + c_out))  # fmt: skip


def combine_embedding(n, t, d, vocabulary, m):
    """Bytes: b read and the m tables written."""

    def make(_):
        (ids, b), w = _tokens(n, t, d, vocabulary), torch.randn(m, n)

        def backward():
            rows = (b * v[:, None, None] for v in w)
            return torch.stack([torch.ops.aten.embedding_dense_backward(g, ids, vocabulary, -1, False) for g in rows])

        def index_add():
            out = b.new_zeros(m, vocabulary, d)
            for table, v in zip(out, w):
                table.index_add_(0, ids.flatten(), (b * v[:, None, None]).flatten(0, 1))
            return out

        return {"ours": lambda: ours.combine_embedding(ids, b, w, vocabulary), "torch": backward, "index_add": index_add}

    return Job("combine_embedding", dict(n=n, t=t, d=d, v=vocabulary, m=m), F32, make, ("ours", "torch", "index_add"), 0,
               4 * d * (n * t + m * vocabulary))  # fmt: skip


def all_op_jobs() -> list[Job]:
    jobs = []
    for dtype in (F32, torch.bfloat16):
        jobs += [gram(256, 1, 1024, 1024, dtype, "pairs"), gram(256, 4, 512, 512, dtype, "pairs"),
                 gram(256, 64, 256, 256, dtype), gram(256, 64, 256, 1024, dtype), gram(64, 64, 256, 1024, dtype),
                 gram_conv(256, 32, 32, 32, dtype), gram_conv(256, 128, 128, 8, dtype),
                 sqnorm(256, 1, 1024, 1024, dtype), sqnorm(256, 64, 256, 1024, dtype), sqnorm(256, 16, 512, 512, dtype)]  # fmt: skip
    jobs += [gram_layers(50, 64, 256, 256), gram_embedding(64, 128, 256, 5000)]
    jobs += [project(256, t, 512, 512, k) for t in (1, 16) for k in (2, 64)] + [project_random(256, t, 512, 512, 64) for t in (1, 16)]
    jobs += [project_conv(256, 32, 32, 32, k) for k in (2, 64)] + [project_conv(256, 128, 128, 8, 2)]
    jobs += [project_embedding(64, 128, 256, 5000, k) for k in (2, 64)] + [sqnorm_embedding(64, 128, 256, 5000)]
    return jobs + [combine(256, 16, 512, 512, 3, disjoint=True), combine(256, 1, 1024, 1024, 4), combine(256, 64, 256, 1024, 2),
                   combine(256, 16, 512, 512, 16), combine_conv(256, 32, 32, 32, 3), combine_conv(256, 128, 128, 8, 3),
                   combine_embedding(64, 128, 256, 5000, 3)]  # fmt: skip


def mini_op_jobs() -> list[Job]:
    jobs = [gram(5, 1, 6, 7, route="pairs"), gram(5, 3, 6, 7, torch.bfloat16, "pairs"), gram(5, 3, 6, 7),
            gram_layers(3, 5, 6, 7), gram_conv(4, 2, 3, 5), gram_embedding(4, 6, 5, 11), sqnorm(5, 3, 6, 7)]  # fmt: skip
    jobs += [project(5, t, 6, 7, 3) for t in (1, 4)] + [project_random(5, t, 6, 7, 3) for t in (1, 4)]
    jobs += [project_conv(4, 2, 3, 5, 3), project_embedding(4, 6, 5, 11, 3), sqnorm_embedding(4, 6, 5, 11)]
    return jobs + [combine(6, 4, 5, 7, 3, disjoint=True), combine(5, 3, 6, 7, 2), combine_conv(4, 2, 3, 5, 2),
                   combine_embedding(4, 6, 5, 11, 2)]  # fmt: skip
