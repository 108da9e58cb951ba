"""Many tensors in one launch: a table of pointers on the device, its chunks shared out in equal stretches.

A launch serves any number of tensors of one dtype combination: the table has a row a tensor, and a program owns a stretch
of equal chunks of the tensors laid end to end.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import launch, table
from .launch import cdiv
from .table import pointer

CHUNK = 4096  # elements a program reads at once from each tensor, over its inner blocks
BLOCK = 1024
HEAD = 3  # columns of a table row before its pointers: first chunk, elements, place in the Philox stream
WAVES = 8  # programs a multiprocessor
DTYPES = tuple(launch.TL)


@triton.jit
def find(rows, count, chunk, COLUMNS: tl.constexpr):
    """The tensor that holds ``chunk``: rows of the table whose first chunk is not beyond it, less one."""
    below = tl.cast(0, tl.int32)
    for k in range(0, count, 128):
        e = k + tl.arange(0, 128)
        first = tl.load(rows + e.to(tl.int64) * COLUMNS, mask=e < count, other=0x7FFFFFFFFFFFFFFF)
        below += tl.sum((first <= chunk).to(tl.int32), 0)
    return below - 1


@triton.jit
def advance(rows, i, chunk, COLUMNS: tl.constexpr):
    """The tensor that holds ``chunk``, walking on from tensor i; the table ends with a row beyond the last chunk."""
    while tl.load(rows + (i + 1) * COLUMNS) <= chunk:
        i += 1
    return i


@triton.jit
def elements(row, ALIGNED: tl.constexpr):
    size = tl.load(row + 1)
    return tl.multiple_of(size, 16) if ALIGNED else size


@triton.jit
def projected(x, row, coef, e, mask, D: tl.constexpr, ACC: tl.constexpr, K: tl.constexpr, FIRST: tl.constexpr, ALIGNED: tl.constexpr):
    """x − Σ_k coef_k d_k at elements e, the K directions' pointers in the row's columns from FIRST on."""
    for j in tl.static_range(K):
        d = tl.load(pointer(tl.load(row + FIRST + j), D, ALIGNED) + e, mask=mask, other=0.0).to(ACC)
        x -= tl.load(coef + j).to(ACC) * d
    return x


@triton.jit
def stream(counter, o0, o1, COUNTED: tl.constexpr):
    """The words of offset + counter: a counter on the device moves the noise on when a CUDA graph is replayed."""
    if COUNTED:
        offset = (tl.cast(o1, tl.int64) << 32 | o0) + tl.load(counter)
        o0, o1 = offset & 0xFFFFFFFF, (offset >> 32) & 0xFFFFFFFF
    return o0, o1


class Group:
    """Tensors of one kind: their table on the device and how programs share its chunks."""

    def __init__(self, columns: list[list], places: list[int], extra: list[int], aligned: bool, shifted: bool = False, waves: int = WAVES):
        """columns: p rows of pointer columns (tensors, or None); places: element each begins at, end to end; extra: one
        integer a row, after the pointers; shifted: blocks follow the Philox stream, up to 3 elements early; waves: programs a
        multiprocessor."""
        values, chunks = [], 0
        for row, place, last in zip(columns, places, extra):
            values += [chunks, row[0].numel(), place, *(0 if x is None else x.data_ptr() for x in row), last]
            chunks += cdiv(row[0].numel() + (place % 4 if shifted else 0), CHUNK)
        self.columns = HEAD + len(columns[0]) + 1
        values += [chunks, *([0] * (self.columns - 1))]
        self.rows = table.table(values, columns[0][0].device)
        self.count, self.chunks, self.aligned = len(columns), chunks, aligned
        self.per = cdiv(chunks, min(chunks, waves * launch.processors(columns[0][0])))
        self.programs = cdiv(chunks, self.per)

    def stretch(self) -> tuple[int, int, int]:
        return self.count, self.chunks, self.per


def groups(columns: list[list], places: list[int] | None = None) -> dict:
    """(dtypes, whether 16-byte loads are allowed) → indices of the tensors; empty ones are left out.

    One odd tensor must not slow the others: loads of several elements need aligned pointers and whole vectors.
    """
    out: dict = {}
    for i, row in enumerate(columns):
        there = [x for x in row if x is not None]
        aligned = all(x.data_ptr() % 16 == 0 for x in there) and there[0].numel() % 16 == 0
        aligned = aligned and (places is None or places[i] % 4 == 0)
        if there[0].numel():
            out.setdefault((tuple(None if x is None else x.dtype for x in row), aligned), []).append(i)
    return out


def places_of(xs: list[Tensor]) -> list[int]:
    """Where each tensor begins, all laid end to end."""
    places, total = [], 0
    for x in xs:
        places.append(total)
        total += x.numel()
    return places


def refuse(read, written, directions=(), k: int = 0, others=()) -> str | None:
    """The common reasons against a call. directions: k·p tensors, those of one place of one dtype; others: of any dtype."""
    xs = launch.tensors([read, directions])
    if len(devices := {str(x.device) for x in (*xs, *launch.tensors([others]))}) > 1:
        return f"tensors are on {', '.join(sorted(devices))}; all must be on one device"
    for x in xs:
        if x.dtype not in DTYPES:
            return f"dtype {x.dtype} is not one of {', '.join(map(str, DTYPES))}"
    for x in launch.tensors([written]):
        if not x.is_contiguous():
            return f"a tensor of shape {tuple(x.shape)} is updated in place but not contiguous"
    p = len(directions) // k if k else 0
    for i in range(p):
        if len({directions[j * p + i].dtype for j in range(k)}) > 1:
            return f"directions of two dtypes for tensor {i}"
    return None
