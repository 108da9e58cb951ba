"""sample_loss: cross-entropy per sample, forward and weighted backward, and the chunked linear+loss form.

Specification in reference/sample_loss.py. A label outside [0, C) that is not ignore_index gives NaN: the kernels cannot
raise without a host synchronisation.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .launch import accumulate_dtype, cdiv

LOGIT_BYTES = 128 << 20  # logits of one chunk of the linear form; large enough for full GEMM rate at vocabulary 128k


@triton.jit(do_not_specialize=["rest_of"])  # the second half of lse: aligned or not
def _forward(
    logits, target, top_of, rest_of, position, classes, row_stride, ignore_index: tl.int64, smoothing: tl.float64,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The row's maximum, the log of its sum of exp(x − maximum), and its cross-entropy: one pass, with a running maximum.

    Bytes: the logits once.  FLOPs: about 5 an element.  Limit: bandwidth.  Fraction reached: not yet run on a GPU.
    """
    r = tl.program_id(0).to(tl.int64)
    logits += r * row_stride
    e = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), ACC)
    mass, below = tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC)
    for c in range(0, classes, BLOCK):
        mask = c + e < classes
        x = tl.load(logits + c + e, mask=mask, other=float("-inf")).to(ACC)
        new = tl.maximum(top, x)
        was, base = tl.where(top == float("-inf"), 0.0, top), tl.where(new == float("-inf"), 0.0, new)
        mass = mass * tl.exp(top - base) + tl.exp(x - base)
        below += (c // BLOCK) * (was - base) + tl.where(mask, x - base, 0.0)  # of x - base
        top = new
    peak = tl.max(top, 0)
    highest = tl.where(peak == float("-inf"), 0.0, peak)
    log_mass = tl.log(tl.sum(mass * tl.exp(top - highest), 0))
    label = tl.load(target + r)
    kept = label != ignore_index
    inside = (label >= 0) & (label < classes)
    picked = tl.load(logits + label, mask=kept & inside, other=float("nan")).to(ACC)
    s = tl.cast(smoothing, ACC)
    # differences with the maximum, not with the log-sum-exp: exact where logits are large and the loss is small
    loss = log_mass + (1.0 - s) * (highest - picked)
    if smoothing > 0.0:
        base = tl.where(top == float("-inf"), 0.0, top)
        mine = (classes - e + BLOCK - 1) // BLOCK  # classes of each lane
        loss -= s * tl.sum(tl.where(mine > 0, below + mine * (base - highest), 0.0), 0) / classes
    tl.store(top_of + r, peak)
    tl.store(rest_of + r, log_mass)
    tl.store(position + r, tl.where(kept, loss, 0.0))


@triton.jit
def _samples(
    position, target, loss, ce, t, ignore_index: tl.int64, penalty: tl.float64,
    MEAN: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ce[i] = sum or mean over kept positions; loss = ce − penalty / (ce + 1e-3).  Bytes: 12·n·t.  Limit: latency.

    Fraction reached: not yet run on a GPU.
    """
    i = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK)
    total, count = tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), tl.int32)
    for p in range(0, t, BLOCK):
        mask = p + e < t
        total += tl.load(position + i * t + p + e, mask=mask, other=0.0)
        kept = tl.load(target + i * t + p + e, mask=mask, other=ignore_index) != ignore_index
        count += (mask & kept).to(tl.int32)
    value = tl.sum(total, 0)
    if MEAN:
        value = value / tl.maximum(tl.sum(count, 0), 1).to(ACC)
    tl.store(ce + i, value)
    tl.store(loss + i, value - tl.cast(penalty, ACC) / (value + 0.001))


@triton.jit
def _scales(
    grad, target, ce, scale, t, ignore_index: tl.int64, clip: tl.float64, penalty: tl.float64,
    MEAN: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """scale[i] = ∂/∂(position loss) of grad_i loss_i: clip, penalty and the mean over positions in one factor.

    Bytes: 8·n·t.  Limit: latency.  Fraction reached: not yet run on a GPU.
    """
    i = tl.program_id(0).to(tl.int64)
    c = tl.load(ce + i)
    value = tl.where((c < tl.cast(clip, ACC)) | (clip == float("inf")), tl.load(grad + i).to(ACC), 0.0)
    value = value * (1.0 + tl.cast(penalty, ACC) / ((c + 0.001) * (c + 0.001)))
    if MEAN:
        e = tl.arange(0, BLOCK)
        count = tl.zeros((BLOCK,), tl.int32)
        for p in range(0, t, BLOCK):
            kept = tl.load(target + i * t + p + e, mask=p + e < t, other=ignore_index) != ignore_index
            count += kept.to(tl.int32)
        value = value / tl.maximum(tl.sum(count, 0), 1).to(ACC)
    tl.store(scale + i, value)


@triton.jit(do_not_specialize=["rest_of"])
def _backward(
    logits, target, top_of, rest_of, scale, out, classes, t, first, row_stride, ignore_index: tl.int64, smoothing: tl.float64,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[r, c] = scale · (softmax − smoothing/C − (1 − smoothing)[c = target]); out may be logits itself.

    first: the global row of this chunk's row 0; target, top_of, rest_of (of _forward) and scale are indexed by
    global row.
    Bytes: logits read once, out written once.  FLOPs: about 6 an element.  Limit: bandwidth.
    Fraction reached: not yet run on a GPU.
    """
    r = tl.program_id(0).to(tl.int64)
    row = r + first
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = c < classes
    label = tl.load(target + row)
    s = tl.where(label != ignore_index, tl.load(scale + row // t), 0.0)
    eps = tl.cast(smoothing, ACC)
    x = tl.load(logits + r * row_stride + c, mask=mask, other=0.0).to(ACC)
    d = tl.exp(x - tl.load(top_of + row) - tl.load(rest_of + row)) - eps / classes - tl.where(c == label, 1.0 - eps, 0.0)
    tl.store(out + r * classes + c, (s * d).to(out.dtype.element_ty), mask=mask)


def _flat(x: Tensor) -> Tensor:
    """(…, C) as rows with unit stride inside."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _launch_forward(rows: Tensor, target: Tensor, lse: Tensor, position: Tensor, ignore_index: int, smoothing: float):
    """One row of logits a program; target, lse (2, rows) and position are this chunk's."""
    if len(rows):
        block = launch.power_of_2(rows.shape[1], 128, 1024 if lse.dtype == torch.float64 else 2048)  # wider float64 spills
        _forward[(len(rows),)](
            rows, target, lse[0], lse[1], position, rows.shape[1], rows.stride(0), ignore_index, smoothing,
            ACC=launch.TL[lse.dtype], BLOCK=block, num_warps=4,
        )  # fmt: skip


def _launch_samples(position: Tensor, target: Tensor, penalty: float, ignore_index: int, reduction: str):
    n, t = target.shape[0], target.shape[1] if target.dim() == 2 else 1
    loss, ce = position.new_empty(n), position.new_empty(n)
    if n:
        _samples[(n,)](
            position, target, loss, ce, t, ignore_index, penalty, MEAN=target.dim() == 2 and reduction == "mean",
            ACC=launch.TL[position.dtype], BLOCK=launch.power_of_2(t, 32, 1024), num_warps=1 if t <= 32 else 4,
        )  # fmt: skip
    return loss, ce


def _launch_scales(grad, target, ce, clip, penalty, ignore_index, reduction) -> Tensor:
    n, t = target.shape[0], target.shape[1] if target.dim() == 2 else 1
    scale = torch.empty_like(ce)
    if n:
        _scales[(n,)](
            grad.contiguous(), target, ce.contiguous(), scale, t, ignore_index, clip, penalty,
            MEAN=target.dim() == 2 and reduction == "mean", ACC=launch.TL[ce.dtype],
            BLOCK=launch.power_of_2(t, 32, 1024), num_warps=1 if t <= 32 else 4,
        )  # fmt: skip
    return scale


def _launch_backward(rows, target, lse, scale, out, t: int, first: int, ignore_index: int, smoothing: float) -> None:
    classes = rows.shape[1]
    block = launch.power_of_2(classes, 128, 2048)
    if rows.numel():
        _backward[(len(rows), cdiv(classes, block))](
            rows, target, lse[0], lse[1], scale, out, classes, max(t, 1), first, rows.stride(0), ignore_index, smoothing,
            ACC=launch.TL[lse.dtype], BLOCK=block, num_warps=4,
        )  # fmt: skip


@launch.on_device
def sample_loss(
    logits: Tensor, target: Tensor, clip: float, penalty: float = 0.0, ignore_index: int = -100,
    label_smoothing: float = 0.0, reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows, target = _flat(logits), target.contiguous()
    lse = logits.new_empty((2, *target.shape), dtype=accumulate_dtype(logits))
    position = torch.empty_like(lse[0])
    _launch_forward(rows, target, lse, position, ignore_index, label_smoothing)
    return *_launch_samples(position, target, penalty, ignore_index, reduction), lse


@launch.on_device
def sample_loss_backward(
    grad: Tensor, logits: Tensor, target: Tensor, ce: Tensor, lse: Tensor, clip: float, penalty: float = 0.0,
    ignore_index: int = -100, label_smoothing: float = 0.0, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    rows, target = _flat(logits), target.contiguous()
    scale = _launch_scales(grad, target, ce, clip, penalty, ignore_index, reduction)
    out = logits.new_empty(rows.shape)
    t = target.shape[1] if target.dim() == 2 else 1
    _launch_backward(rows, target, lse.contiguous(), scale, out, t, 0, ignore_index, label_smoothing)
    return out.view(logits.shape)


def _row_chunks(rows: Tensor, classes: int):
    size = max(1, LOGIT_BYTES // max(1, classes * rows.element_size()))
    for lo in range(0, len(rows), size):
        yield lo, min(lo + size, len(rows))


@launch.on_device
def linear_sample_loss(
    h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, clip: float, penalty: float = 0.0,
    ignore_index: int = -100, label_smoothing: float = 0.0, reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """A chunk of logits at a time: the library's GEMM, then ``_forward`` on what it left in cache.

    Bytes held: LOGIT_BYTES, whatever n·t.  FLOPs: 2·n·t·d·C, and twice that and one recomputation in the backward.
    """
    rows, target = h.reshape(-1, h.shape[-1]), target.contiguous()
    lse = h.new_empty((2, *target.shape), dtype=accumulate_dtype(h))
    position = torch.empty_like(lse[0])
    ids, z, each = target.view(-1), lse.view(2, target.numel()), position.view(-1)
    for lo, hi in _row_chunks(rows, len(weight)):
        logits = torch.nn.functional.linear(rows[lo:hi], weight, bias)
        _launch_forward(logits, ids[lo:hi], z[:, lo:hi], each[lo:hi], ignore_index, label_smoothing)
    return *_launch_samples(position, target, penalty, ignore_index, reduction), lse


@launch.on_device
def linear_sample_loss_backward(
    grad: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ce: Tensor, lse: Tensor,
    clip: float, penalty: float = 0.0, ignore_index: int = -100, label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Each chunk's logits again, turned into their gradient in place, then the two GEMMs that use it."""
    dtype = accumulate_dtype(h)
    rows, target = h.reshape(-1, h.shape[-1]), target.contiguous()
    scale = _launch_scales(grad, target, ce, clip, penalty, ignore_index, reduction)
    t = target.shape[1] if target.dim() == 2 else 1
    ids, z = target.view(-1), lse.contiguous().view(2, target.numel())
    dh = torch.empty_like(rows)
    dweight = torch.zeros_like(weight, dtype=dtype)
    dbias = weight.new_zeros(0 if bias is None else len(weight), dtype=dtype)
    for lo, hi in _row_chunks(rows, len(weight)):
        d = torch.nn.functional.linear(rows[lo:hi], weight, bias)
        _launch_backward(d, ids, z, scale, d, t, lo, ignore_index, label_smoothing)
        torch.mm(d, weight, out=dh[lo:hi])
        dweight += d.T @ rows[lo:hi]
        if bias is not None:
            dbias += d.sum(0, dtype=dtype)
    return dh.view(h.shape), dweight.to(weight.dtype), dbias.to(weight.dtype)


def refuse(op: str, *args) -> str | None:
    factors = {"sample_loss": args[:1], "sample_loss_backward": args[1:2],
               "linear_sample_loss": args[:3], "linear_sample_loss_backward": args[1:4]}[op]  # fmt: skip
    logits = factors[0]
    if logits.shape[-1] == 0:
        return "there are no classes"
    return launch.refuse_factors(*factors, dtypes=launch.FLOATS)
