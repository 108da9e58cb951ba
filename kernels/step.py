"""step: the Gram of directions and the projected momentum step, for many tensors at once; specification in reference/step.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, multi, philox
from .launch import cdiv
from .multi import BLOCK, CHUNK, Group, advance, elements, find, groups, places_of, projected, stream
from .table import pointer

GROUP = 4  # directions that a program of the Gram reads at once: as many of its tables' pointers have a dtype of their own


@triton.jit
def _loaded(
    row, e, mask, first, k, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, D3: tl.constexpr,
    ALIGNED: tl.constexpr, KB: tl.constexpr,
):  # fmt: skip
    """Elements e of directions first .. first + KB − 1, a tuple; beyond the last direction the last again."""
    xs = ()
    for j in tl.static_range(KB):
        address = tl.load(row + 3 + tl.minimum(first + j, k - 1))
        if j == 0:
            x = tl.load(pointer(address, D0, ALIGNED) + e, mask=mask, other=0.0)
        elif j == 1:
            x = tl.load(pointer(address, D1, ALIGNED) + e, mask=mask, other=0.0)
        elif j == 2:
            x = tl.load(pointer(address, D2, ALIGNED) + e, mask=mask, other=0.0)
        else:
            x = tl.load(pointer(address, D3, ALIGNED) + e, mask=mask, other=0.0)
        xs = xs + (x,)
    return xs


@triton.jit
def _gram(
    rows, partial, count, chunks, per, k,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, D3: tl.constexpr,
    ALIGNED: tl.constexpr, COLUMNS: tl.constexpr, KB: tl.constexpr, ONE: tl.constexpr, VEC: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial[program, p, q] = Σ d_p d_q over the program's chunks, products and sums in float64.

    ONE: a single group of KB directions. Otherwise grid axis 1 runs over pairs of groups, of which those below the
    diagonal return at once. VEC: elements of a thread's 16 bytes, added up before they meet the program's sums.
    Bytes: k directions once (k > 4: about k/4 times).  FLOPs: k² P in float64, and a conversion each element read.
    Counted from SASS (sm_90, bfloat16, k 3): 96 bytes a thread asked for before the first use, 49 KB a multiprocessor; at
    copy bandwidth 41 % of the conversions and 31 % of the float64 operations that an H100 has.
    Limit: bandwidth.  Fraction reached: not yet run on a GPU.
    """
    p0, q0 = 0, 0
    if not ONE:
        groups = tl.cdiv(k, KB)
        p0, q0 = (tl.program_id(1) // groups) * KB, (tl.program_id(1) % groups) * KB
        if q0 < p0:
            return
    start = tl.program_id(0).to(tl.int64) * per
    i = find(rows, count, start, COLUMNS)
    acc = ()
    for _ in tl.static_range(KB * KB):
        acc = acc + (tl.zeros((BLOCK // VEC,), tl.float64),)
    for chunk in range(start, tl.minimum(start + per, chunks)):
        i = advance(rows, i, chunk, COLUMNS)
        row = rows + i.to(tl.int64) * COLUMNS
        first = (chunk - tl.load(row)) * CHUNK
        size = elements(row, ALIGNED)
        for block in range(0, CHUNK, BLOCK):
            e = first + block + tl.arange(0, BLOCK)
            xs = _loaded(row, e, e < size, p0, k, D0, D1, D2, D3, ALIGNED, KB)
            ys = xs if ONE else _loaded(row, e, e < size, q0, k, D0, D1, D2, D3, ALIGNED, KB)
            more = ()
            for p in tl.static_range(KB):
                for q in tl.static_range(KB):
                    total = acc[p * KB + q]
                    if (not ONE) or p <= q:
                        total += tl.sum(tl.reshape(xs[p].to(tl.float64) * ys[q].to(tl.float64), (BLOCK // VEC, VEC)), 1)
                    more = more + (total,)
            acc = more
    at = partial + tl.program_id(0).to(tl.int64) * k * k
    for p in tl.static_range(KB):
        for q in tl.static_range(KB):
            if (not ONE) or p <= q:
                tl.store(at + (p0 + p) * k + q0 + q, tl.sum(acc[p * KB + q], 0), mask=(p0 + p < k) & (q0 + q < k))


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
                new += tl.cast(noise, ACC) * philox.normals(index, k0, k1, o0, o1).to(ACC)
            tl.store(theta + e, new.to(P), mask=mask)


def _alike(xs: list[Tensor]) -> list[Tensor]:
    """Contiguous, and beyond ``GROUP`` directions of one dtype; read only: a copy is right, if slow."""
    dtypes = {x.dtype for x in xs}
    wide = launch.accumulate_dtype(*xs) if len(dtypes) > 1 and len(xs) > GROUP else None
    return [(x if wide is None else x.to(wide)).contiguous() for x in xs]


@launch.on_device
def step_gram(tensors: list[Tensor], k: int) -> Tensor:
    p = len(tensors) // k if k else 0
    device = tensors[0].device if tensors else None
    total = torch.zeros(k, k, dtype=torch.float64, device=device)
    columns = [_alike(tensors[i::p]) for i in range(p)]
    for (dtypes, aligned), members in groups(columns).items():
        group = Group([columns[i] for i in members], [0] * len(members), [0] * len(members), aligned, waves=4)  # its registers
        kb, pairs = min(k, GROUP), cdiv(k, GROUP) ** 2
        vec = 16 // min(d.itemsize for d in dtypes)
        partial = torch.empty(group.programs, k, k, dtype=torch.float64, device=device)
        named = [launch.TL[dtypes[min(j, k - 1)]] for j in range(GROUP)]
        _gram[(group.programs, pairs)](
            group.rows, partial, *group.stretch(), k, *named, ALIGNED=aligned, COLUMNS=group.columns, KB=kb, ONE=pairs == 1,
            VEC=vec, CHUNK=CHUNK, BLOCK=128 * vec * (2 if kb < 4 else 1), num_warps=4,
        )  # fmt: skip
        total += partial.sum(0)  # what is below the diagonal was not written, or not everywhere
    upper = total.triu()
    return upper + upper.triu(1).T


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
