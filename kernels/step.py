"""step: the Gram of directions and the projected momentum step, for many tensors at once; specification in reference/step.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, multi, philox
from .launch import cdiv
from .multi import BLOCK, CHUNK, Group, advance, elements, find, groups, places_of, projected, stream
from .table import pointer


@triton.jit
def _gram(
    rows, partial, count, chunks, per, k,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, COLUMNS: tl.constexpr, KB: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial[program, p, q] = Σ d_p d_q over the program's chunks, products and sums in float64.

    Grid axis 1 runs over pairs of KB directions each; the lower triangle is left to ``finish``.
    Bytes: k directions once (KB-fold less reuse beyond KB directions).  FLOPs: k² P in float64.
    Limit: bandwidth.  Fraction reached: not yet run on a GPU.
    """
    blocks = tl.cdiv(k, KB)
    p0, q0 = (tl.program_id(1) // blocks) * KB, (tl.program_id(1) % blocks) * KB
    if q0 < p0:
        return
    p, q = p0 + tl.arange(0, KB), q0 + tl.arange(0, KB)
    start = tl.program_id(0).to(tl.int64) * per
    i = find(rows, count, start, COLUMNS)
    acc = tl.zeros((KB, KB, BLOCK), tl.float64)
    for chunk in range(start, tl.minimum(start + per, chunks)):
        i = advance(rows, i, chunk, COLUMNS)
        row = rows + i.to(tl.int64) * COLUMNS
        first = (chunk - tl.load(row)) * CHUNK
        size = elements(row, ALIGNED)
        up, uq = tl.load(row + 3 + p, mask=p < k, other=0), tl.load(row + 3 + q, mask=q < k, other=0)
        xp, xq = pointer(up, DTYPE, ALIGNED), pointer(uq, DTYPE, ALIGNED)
        for block in range(0, CHUNK, BLOCK):
            e = first + block + tl.arange(0, BLOCK)
            u = tl.load(xp[:, None] + e[None, :], mask=(p < k)[:, None] & (e < size)[None, :], other=0.0).to(tl.float64)
            v = tl.load(xq[:, None] + e[None, :], mask=(q < k)[:, None] & (e < size)[None, :], other=0.0).to(tl.float64)
            acc += u[:, None, :] * v[None, :, :]
    total = tl.sum(acc, 2)
    at = partial + tl.program_id(0).to(tl.int64) * k * k + p[:, None] * k + q[None, :]
    tl.store(at, total, mask=(p < k)[:, None] & (q < k)[None, :])


@triton.jit
def _update(
    rows, coef, counter, count, chunks, per, lr: tl.float64, beta: tl.float64, decay: tl.float64, noise: tl.float64,
    k0: tl.int64, k1: tl.int64, o0: tl.int64, o1: tl.int64,
    P: tl.constexpr, M: tl.constexpr, G: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr,
    K: tl.constexpr, MOMENTUM: tl.constexpr, NOISE: tl.constexpr, COUNTED: tl.constexpr, ALIGNED: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """v ← β v + g − Σ_k coef_k d_k;  θ ← decay·θ − lr v + noise ξ, in registers, written back once.

    With noise the blocks begin where the tensor's place in the Philox stream is a multiple of 4, so one Philox call
    gives four neighbours.  coef is read by the device only.
    Bytes: θ and v read and written, g and K directions read.  FLOPs: 2K + 6 a parameter, and about 40 with noise.
    Limit: bandwidth.  Fraction reached: not yet run on a GPU.
    """
    o0, o1 = stream(counter, o0, o1, COUNTED)
    start = tl.program_id(0).to(tl.int64) * per
    i = find(rows, count, start, COLUMNS)
    for chunk in range(start, tl.minimum(start + per, chunks)):
        i = advance(rows, i, chunk, COLUMNS)
        row = rows + i.to(tl.int64) * COLUMNS
        size, place = elements(row, ALIGNED), tl.load(row + 2)
        first = (chunk - tl.load(row)) * CHUNK
        if NOISE:
            if not ALIGNED:  # ALIGNED promises a place that is a multiple of 4
                first -= place % 4
        theta, grad = pointer(tl.load(row + 3), P, ALIGNED), pointer(tl.load(row + 4), G, ALIGNED)
        for block in range(0, CHUNK, BLOCK):
            e = first + block + tl.arange(0, BLOCK)
            mask = (e >= 0) & (e < size)
            v = tl.load(grad + e, mask=mask, other=0.0).to(ACC)
            if MOMENTUM:
                held = pointer(tl.load(row + 5), M, ALIGNED)
                v += tl.load(held + e, mask=mask, other=0.0).to(ACC) * tl.cast(beta, ACC)
            v = projected(v, row, coef, e, mask, D, ACC, K, 6, ALIGNED)
            if MOMENTUM:
                tl.store(held + e, v.to(M), mask=mask)
            new = tl.load(theta + e, mask=mask, other=0.0).to(ACC) * tl.cast(decay, ACC) - tl.cast(lr, ACC) * v
            if NOISE:
                index = (place + first + block) // 4 + tl.arange(0, BLOCK // 4)
                new += tl.cast(noise, ACC) * philox.values(index, k0, k1, o0, o1, True).to(ACC)
            tl.store(theta + e, new.to(P), mask=mask)


def _alike(xs: list[Tensor]) -> list[Tensor]:
    """Contiguous, and of one dtype; read only: a copy is right, if slow."""
    dtypes = {x.dtype for x in xs}
    wide = launch.accumulate_dtype(*xs) if len(dtypes) > 1 else xs[0].dtype
    return [x.to(wide).contiguous() for x in xs]


@launch.on_device
def step_gram(tensors: list[Tensor], k: int) -> Tensor:
    p = len(tensors) // k if k else 0
    device = tensors[0].device if tensors else None
    total = torch.zeros(k, k, dtype=torch.float64, device=device)
    columns = [_alike(tensors[i::p]) for i in range(p)]
    for (dtypes, aligned), members in groups(columns).items():
        group = Group([columns[i] for i in members], [0] * len(members), [0] * len(members), aligned)
        kb = min(launch.power_of_2(k), 4)
        blocks = cdiv(k, kb)
        partial = torch.empty(group.programs, k, k, dtype=torch.float64, device=device)
        _gram[(group.programs, blocks * blocks)](
            group.rows, partial, *group.stretch(), k, DTYPE=launch.TL[dtypes[0]], ALIGNED=aligned,
            COLUMNS=group.columns, KB=kb, CHUNK=CHUNK, BLOCK=2048 // (kb * kb), num_warps=4,
        )  # fmt: skip
        upper = partial.triu() if blocks > 1 else partial  # programs below the diagonal wrote nothing
        upper = torch.where(torch.ones_like(upper[0], dtype=torch.bool).triu(), upper, 0).sum(0)
        total += upper + upper.triu(1).T
    return total


@launch.on_device
def step_update(
    params: list[Tensor], momentum: list[Tensor], grads: list[Tensor], directions: list[Tensor], coef: Tensor,
    lr: float, beta: float = 0.0, weight_decay: float = 0.0, noise: float = 0.0, seed: int = 0, offset: int = 0,
    counter: Tensor | None = None,
) -> None:  # fmt: skip
    p, k = len(params), len(coef)
    places = places_of(params)
    grads, directions = [g.contiguous() for g in grads], [d.contiguous() for d in directions]
    held = momentum or [None] * p
    columns = [[params[i], grads[i], held[i], *(directions[j * p + i] for j in range(k))] for i in range(p)]
    for ((dp, dg, dm, *dd), aligned), members in groups(columns, places if noise else None).items():
        group = Group(
            [columns[i] for i in members], [places[i] for i in members], [0] * len(members), aligned, bool(noise)
        )
        acc = torch.promote_types(dp, torch.float32)
        _update[(group.programs,)](
            group.rows, coef.contiguous(), coef if counter is None else counter, *group.stretch(), lr, beta, 1 - lr * weight_decay,
            noise, *philox.key(seed, offset),
            P=launch.TL[dp], M=launch.TL[dm or dp], G=launch.TL[dg], D=launch.TL[dd[0] if dd else dp],
            ACC=launch.TL[acc], K=k, MOMENTUM=dm is not None, NOISE=bool(noise), COUNTED=counter is not None,
            ALIGNED=aligned, COLUMNS=group.columns, CHUNK=CHUNK, BLOCK=BLOCK * 4 // acc.itemsize, num_warps=4,
        )  # fmt: skip


def refuse(op: str, *args) -> str | None:
    if op == "step_gram":
        return multi.refuse(args[0], ())
    params, momentum, grads, directions, coef, *rest = args
    return multi.refuse((params, momentum, grads, coef), (params, momentum), directions, len(coef), rest)
