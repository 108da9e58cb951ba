"""A layer's factors as kernels see them: one address rule for linear layers and for 1-D to 3-D convolutions.

Per-sample gradients are G_i[o, c] = Σ_t b[i,t,o] a[i,t,c]. In a linear layer a[i,t,c] lies at i·sample + t·position + c.
For a convolution the input is padded once, channels last, and a[i,t,c] lies at i·sample + rows[t] + columns[c] with two
small tables: the unfolded input (kernel volume × larger) is never written, and one kernel serves every geometry.
Columns run kernel-position-major, channels fastest, so that loads are contiguous; ``weight_order`` undoes that.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cache import cached
from .launch import vector


@dataclass
class Side:
    """The factors of n samples, with their strides between samples and positions in elements; unit stride inside."""

    a: Tensor
    b: Tensor
    n: int
    t: int
    a_sample: int
    a_position: int
    b_sample: int
    b_position: int


@dataclass
class Layer:
    """What both sides of a Gram share. rows, columns: int64 offset tables of a convolution, else None."""

    d_in: int
    d_out: int
    groups: int = 1
    a_group: int = 0
    b_group: int = 0
    rows: Tensor | None = None
    columns: Tensor | None = None
    vec: int = 1

    @property
    def tabled(self) -> bool:
        return self.rows is not None

    def aligned(self, s: Side) -> bool:
        """Whether the factors' elements come 16 bytes at a time."""
        counts = self.d_in, self.d_out, s.a_sample, s.a_position, s.b_sample, s.b_position, s.a.data_ptr(), s.b.data_ptr()
        return vector(*counts) == 16 and (self.vec == 16 or not self.tabled)

    def tables(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The two tables, or any pointer for kernels that will not read them."""
        return (self.rows, self.columns) if self.tabled else (like, like)


def _unit(x: Tensor) -> Tensor:
    """(n, d) → (n, 1, d), the last dimension contiguous; other strides stay (expanded, transposed: no copy)."""
    x = x.unsqueeze(1) if x.dim() == 2 else x
    return x if x.stride(2) == 1 or x.shape[2] == 1 and x.is_contiguous() else x.contiguous()


def side(a: Tensor, b: Tensor) -> Side:
    a, b = _unit(a), _unit(b)
    return Side(a, b, a.shape[0], a.shape[1], a.stride(0), a.stride(1), b.stride(0), b.stride(1))


def linear(a: Tensor, b: Tensor) -> tuple[Layer, Side]:
    return Layer(a.shape[-1], b.shape[-1]), side(a, b)


def _grid(counts, steps, device) -> Tensor:
    """Σ_d index_d · steps_d over the grid ``counts``, last dimension fastest, flattened."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    for d, (count, step) in enumerate(zip(counts, steps)):
        shape = [1] * len(counts)
        shape[d] = count
        total = total + (torch.arange(count, device=device) * step).view(shape)
    return total.expand(*counts).reshape(-1).contiguous()


def conv_side(x: Tensor, g: Tensor, padding) -> Side:
    """Padded channels-last copy of x, and g as (n, T, C_out). Both are no copy where they already lie so."""
    n = x.shape[0]
    moved = x.movedim(1, -1)
    if any(padding):
        size = [s + 2 * p for s, p in zip(x.shape[2:], padding)]
        padded = x.new_zeros(n, *size, x.shape[1])
        inner = (slice(None), *(slice(p, p + s) for p, s in zip(padding, x.shape[2:])))
        padded[inner] = moved
        moved = padded
    moved = moved.contiguous()
    b = g.movedim(1, -1).contiguous()
    t = math.prod(g.shape[2:])
    each = math.prod(moved.shape[1:])
    return Side(moved, b, n, t, each, 0, t * g.shape[1], g.shape[1])


def conv(x: Tensor, g: Tensor, kernel, stride, padding, dilation, groups: int) -> tuple[Layer, Side]:
    channels, device = x.shape[1], x.device
    size = [s + 2 * p for s, p in zip(x.shape[2:], padding)]
    pitch = [math.prod(size[d + 1 :]) * channels for d in range(len(size))]
    each = channels // groups
    key = ("conv", tuple(size), channels, groups, tuple(kernel), tuple(stride), tuple(dilation), tuple(g.shape[2:]))

    def make():
        rows = _grid(g.shape[2:], [p * s for p, s in zip(pitch, stride)], device)
        columns = _grid([*kernel, each], [*(p * d for p, d in zip(pitch, dilation)), 1], device)
        return rows, columns

    rows, columns = cached(key, device, make)
    layer = Layer(len(columns), g.shape[1] // groups, groups, each, g.shape[1] // groups, rows, columns, vector(each))
    return layer, conv_side(x, g, padding)


def weight_order(out: Tensor, channels: int, kernel) -> Tensor:
    """(…, C_out, volume·channels) with channels fastest → (…, C_out, channels, *kernel)."""
    return out.unflatten(-1, (math.prod(kernel), channels)).mT.reshape(*out.shape[:-1], channels, *kernel)


def column_order(weight: Tensor, nd: int) -> Tensor:
    """(…, C_out, channels, *kernel) → (…, C_out, volume·channels) with channels fastest, contiguous."""
    return weight.flatten(-nd).mT.flatten(-2).contiguous()


@triton.jit
def row_offsets(rows, t, mask, position, TABLED: tl.constexpr, VEC: tl.constexpr):
    """Element offsets (int64) of positions t inside one sample of a."""
    if TABLED:
        return tl.multiple_of(tl.load(rows + t, mask=mask, other=0), VEC)
    else:
        return t.to(tl.int64) * position


@triton.jit
def column_offsets(columns, c, mask, TABLED: tl.constexpr, VEC: tl.constexpr):
    """Element offsets of columns c of a; in runs of VEC together and aligned."""
    if TABLED:
        return tl.max_contiguous(tl.multiple_of(tl.load(columns + c, mask=mask, other=0), VEC), VEC)
    else:
        return c
