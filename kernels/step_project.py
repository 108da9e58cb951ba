"""step_project: the Gram of directions, momentum and gradient, then the k×k solve in one program; reference/solve.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, multi
from .step import step_gram

MOST = 32  # directions: the matrix and its eigenvectors stand in one program's registers
LEAST = tl.constexpr(1e-60)  # square of a direction, and ridge: reference/solve.py


@triton.jit
def _solve(
    gram, coef, k, lists, beta: tl.float64, ridge: tl.float64, rcond: tl.float64,
    MOMENTUM: tl.constexpr, RIDGE: tl.constexpr, K: tl.constexpr, SWEEPS: tl.constexpr,
):  # fmt: skip
    """coef = (K + ridge·I)⁻¹ (β <d, v> + <d, g>), or of least norm in the unit-diagonal Gram: one program, float64.

    Cyclic Jacobi, K / 2 rotations at once: round m takes the pairs (i, i xor m), and K − 1 rounds are a sweep. The number
    of sweeps is fixed (kernels/step_project.py: sweeps), nothing is read by the host.
    Bytes: (k + 2)².  FLOPs: 12 K³ SWEEPS.  Limit: latency.  Fraction reached: not yet run on a GPU.
    """
    i = tl.arange(0, K)
    row, column = i[:, None], i[None, :]
    inner = tl.load(gram + i * lists + lists - 1, mask=i < k, other=0.0)
    if MOMENTUM:
        inner += beta * tl.load(gram + i * lists + k, mask=i < k, other=0.0)
    square = tl.load(gram + i * lists + i, mask=i < k, other=0.0)
    long = square > LEAST
    unit = tl.where(long, 1.0, tl.zeros((K,), tl.float64))
    if not RIDGE:
        unit = unit / tl.sqrt(tl.where(long, square, 1.0))
    a = tl.load(gram + row * lists + column, mask=(row < k) & (column < k), other=0.0) * unit[:, None] * unit[None, :]
    zero = tl.sum(tl.sum(0 * a, 1) + 0 * inner, 0)  # NaN where anything is not finite
    v = tl.where(row == column, tl.zeros((K, K), tl.float64) + 1.0, 0.0)
    for _ in range(SWEEPS):
        for m in range(1, K):
            other = i ^ m
            across = tl.broadcast_to(other[None, :], (K, K))
            own = tl.sum(tl.where(row == column, a, 0.0), 1)
            off = tl.sum(tl.where(column == other[:, None], a, 0.0), 1)
            tau = (tl.gather(own, other, 0) - own) / (2 * tl.where(off == 0, 1.0, off))
            t = tl.where(tau < 0, -1.0, 1.0) / (tl.abs(tau) + tl.sqrt(1 + tau * tau))
            t = tl.where((i < other) & (off != 0), t, 0.0)
            t -= tl.gather(t, other, 0)  # the pair's second: the very same angle, turned back
            c = 1 / tl.sqrt(1 + t * t)
            s = -t * c
            a = c[:, None] * a + s[:, None] * tl.gather(a, tl.broadcast_to(other[:, None], (K, K)), 0)
            a = c[None, :] * a + s[None, :] * tl.gather(a, across, 1)
            a = tl.where(column == other[:, None], 0.0, a)
            v = c[None, :] * v + s[None, :] * tl.gather(v, across, 1)
    value = tl.sum(tl.where(row == column, a, 0.0), 0)
    y = tl.sum(v * (unit * inner)[:, None], 0)
    if RIDGE:
        y = y / (tl.maximum(value, 0.0) + ridge)
    else:
        kept = value > rcond * tl.maximum(tl.max(value, 0), 0.0)
        y = tl.where(kept, y / tl.where(kept, value, 1.0), 0.0)
    tl.store(coef + i, unit * tl.sum(v * y[None, :], 1) + zero, mask=i < k)


def sweeps(size: int) -> int:
    """Of rotations until a (size, size) matrix is diagonal to rounding: 2, 5, 8, 11, 14 for 2 to 32: enough in simulation."""
    return 3 * (size.bit_length() - 1) - 1


@launch.on_device
def step_project(
    directions: list[Tensor], momentum: list[Tensor], grads: list[Tensor], beta: float, ridge: float, rcond: float
) -> tuple[Tensor, Tensor]:
    k = len(directions) // len(grads)
    lists = k + (2 if momentum else 1)
    gram = step_gram([*directions, *momentum, *grads], lists)
    coef = torch.empty(k, dtype=torch.float64, device=gram.device)
    if k:
        size = launch.power_of_2(k, low=2)
        _solve[(1,)](
            gram, coef, k, lists, beta, ridge, rcond, MOMENTUM=bool(momentum), RIDGE=ridge >= LEAST.value, K=size, SWEEPS=sweeps(size),
            num_warps=max(1, size * size // 128),
        )  # fmt: skip
    return gram, coef


def refuse(op: str, directions, momentum, grads, *_) -> str | None:
    if (k := len(directions) // max(1, len(grads))) > MOST:
        return f"{k} directions; its solve takes up to {MOST}"
    return multi.refuse((directions, momentum, grads), ())
