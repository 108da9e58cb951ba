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
    SMOOTH: tl.constexpr, ACC: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The row's maximum, the log of its sum of exp(x − maximum), and its cross-entropy: one pass, with a running maximum for each VEC
    elements together.

    VEC: elements of a thread's 16 bytes: 1 + 1/VEC exponentials an element, where one maximum for each would take two, and
    reading bfloat16 at an H100's bandwidth leaves 2.2 (counted: 16 a clock of a multiprocessor).
    Bytes: the logits once.  FLOPs: about 5 an element.  Limit: bandwidth.  Fraction reached: not yet run on a GPU.
    """
    r = tl.program_id(0).to(tl.int64)
    logits += r * row_stride
    e = tl.arange(0, BLOCK)
    top = tl.full((BLOCK // VEC,), float("-inf"), ACC)
    mass, below = tl.zeros((BLOCK // VEC,), ACC), tl.zeros((BLOCK // VEC,), ACC)
    for c in range(0, classes, BLOCK):
        mask = c + e < classes
        x = tl.reshape(tl.load(logits + c + e, mask=mask, other=float("-inf")).to(ACC), (BLOCK // VEC, VEC))
        new = tl.maximum(top, tl.max(x, 1))
        was, base = tl.where(top == float("-inf"), 0.0, top), tl.where(new == float("-inf"), 0.0, new)
        mass = mass * tl.exp(top - base) + tl.sum(tl.exp(x - base[:, None]), 1)
        if SMOOTH:
            apart = tl.where(tl.reshape(mask, (BLOCK // VEC, VEC)), x - base[:, None], 0.0)
            below += (c // BLOCK * VEC) * (was - base) + tl.sum(apart, 1)  # of x - base
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
    if SMOOTH:
        base = tl.where(top == float("-inf"), 0.0, top)
        rest = tl.minimum(tl.maximum(classes % BLOCK - tl.arange(0, BLOCK // VEC) * VEC, 0), VEC)
        mine = classes // BLOCK * VEC + rest  # classes that came to each
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
    logits, target, top_of, rest_of, scale, out, width, classes, t, first, begin, row_stride, ignore_index: tl.int64, smoothing: tl.float64,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[r, c] = scale · (softmax − smoothing/C − (1 − smoothing)[c = target]); out may be logits itself.

    first, begin: the global row and class of this chunk's row 0 and column 0, of ``width``; target, top_of, rest_of (of _forward)
    and scale are indexed by global row.
    Bytes: logits read once, out written once.  FLOPs: about 6 an element.  Limit: bandwidth.
    Fraction reached: not yet run on a GPU.
    """
    r = tl.program_id(0).to(tl.int64)
    row = r + first
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = c < width
    label = tl.load(target + row)
    s = tl.where(label != ignore_index, tl.load(scale + row // t), 0.0)
    x = tl.load(logits + r * row_stride + c, mask=mask, other=0.0).to(ACC)
    eps = tl.cast(smoothing, ACC)
    d = tl.exp(x - tl.load(top_of + row) - tl.load(rest_of + row)) - eps / classes - tl.where(c + begin == label, 1.0 - eps, 0.0)
    tl.store(out + r * width + c, (s * d).to(out.dtype.element_ty), mask=mask)


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
            SMOOTH=smoothing > 0, ACC=launch.TL[lse.dtype], VEC=16 // rows.element_size(), BLOCK=block, num_warps=4,
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


def _launch_backward(rows, target, lse, scale, out, t: int, ignore_index: int, smoothing: float, classes: int, first=0, begin=0):
    """rows: a part of the logits from row ``first`` and class ``begin`` on; target, lse, scale: of all."""
    width = rows.shape[1]
    block = launch.power_of_2(width, 128, 2048)
    if rows.numel():
        _backward[(len(rows), cdiv(width, block))](
            rows, target, lse[0], lse[1], scale, out, width, classes, max(t, 1), first, begin, rows.stride(0), ignore_index, smoothing,
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
    _launch_backward(rows, target, lse.contiguous(), scale, out, t, ignore_index, label_smoothing, rows.shape[1])
    return out.view(logits.shape)


def _chunks(count: int, each: int):
    """Stretches of ``count`` things of ``each`` bytes, of LOGIT_BYTES at most; whole 64s, which GEMMs want."""
    size = max(1, LOGIT_BYTES // max(1, each))
    size = size if size < 64 else size // 64 * 64
    for lo in range(0, count, size):
        yield lo, min(lo + size, count)


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
    for lo, hi in _chunks(len(rows), len(weight) * rows.element_size()):
        logits = torch.nn.functional.linear(rows[lo:hi], weight, bias)
        _launch_forward(logits, ids[lo:hi], z[:, lo:hi], each[lo:hi], ignore_index, label_smoothing)
    return *_launch_samples(position, target, penalty, ignore_index, reduction), lse


@launch.on_device
def linear_sample_loss_backward(
    grad: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ce: Tensor, lse: Tensor,
    clip: float, penalty: float = 0.0, ignore_index: int = -100, label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Each chunk's logits again, turned into their gradient in place, then the two GEMMs that use it.

    With fewer rows than classes a chunk is a stretch of classes for all rows: its part of the weight's gradient is whole,
    and what is added up is the smaller gradient, of h (float32, beside the logits' chunk). Else a chunk is a stretch of rows.
    """
    rows, target = h.reshape(-1, h.shape[-1]), target.contiguous()
    scale = _launch_scales(grad, target, ce, clip, penalty, ignore_index, reduction)
    t = target.shape[1] if target.dim() == 2 else 1
    ids, z, classes = target.view(-1), lse.contiguous().view(2, target.numel()), len(weight)
    options = t, ignore_index, label_smoothing, classes
    across = _across if len(rows) < classes else _along
    dh, dweight, dbias = across(rows, weight, bias, lambda d, first, begin: _launch_backward(d, ids, z, scale, d, *options, first, begin))
    return dh.view(h.shape), dweight, dbias


def _across(rows: Tensor, weight: Tensor, bias: Tensor | None, differentiate) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows, weight and bias by stretches of classes; differentiate: logits → their gradient, in place."""
    dtype = accumulate_dtype(rows)
    dh = torch.zeros_like(rows, dtype=dtype)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    dbias = weight.new_empty(0 if bias is None else len(weight))
    for lo, hi in _chunks(len(weight), len(rows) * rows.element_size()):
        d = torch.nn.functional.linear(rows, weight[lo:hi], None if bias is None else bias[lo:hi])
        differentiate(d, 0, lo)
        torch.mm(d.T, rows, out=dweight[lo:hi])
        if bias is not None:
            dbias[lo:hi] = d.sum(0, dtype=dtype)
        for first, last in _chunks(len(rows), 4 * rows.shape[1] * rows.element_size()):  # of a quarter: the sum's temporary
            dh[first:last] += d[first:last] @ weight[lo:hi]
    return dh.to(rows.dtype), dweight, dbias


def _along(rows: Tensor, weight: Tensor, bias: Tensor | None, differentiate) -> tuple[Tensor, Tensor, Tensor]:
    """The same by stretches of rows."""
    dtype = accumulate_dtype(rows)
    dh = torch.empty_like(rows)
    dweight = torch.zeros_like(weight, dtype=dtype)
    dbias = weight.new_zeros(0 if bias is None else len(weight), dtype=dtype)
    for lo, hi in _chunks(len(rows), len(weight) * rows.element_size()):
        d = torch.nn.functional.linear(rows[lo:hi], weight, bias)
        differentiate(d, lo, 0)
        torch.mm(d, weight, out=dh[lo:hi])
        dweight += d.T @ rows[lo:hi]
        if bias is not None:
            dbias += d.sum(0, dtype=dtype)
    return dh, dweight.to(weight.dtype), dbias.to(weight.dtype)


def refuse(op: str, *args) -> str | None:
    factors = {"sample_loss": args[:1], "sample_loss_backward": args[1:2],
               "linear_sample_loss": args[:3], "linear_sample_loss_backward": args[1:4]}[op]  # fmt: skip
    logits = factors[0]
    if logits.shape[-1] == 0:
        return "there are no classes"
    return launch.refuse_factors(*factors, dtypes=launch.FLOATS)
