"""The launchers of gram.cu and project.cu on CPU tensors, outputs and scratch poisoned with NaN."""

import ctypes

import pytest
import torch
from bound import COMPILED, control
from build import Factors, run

TYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
MMA, WGMMA = 0, 1
_int = ctypes.c_int64


def _count(function, *args) -> int:
    function.restype = _int
    return function(*(ctypes.byref(x) if isinstance(x, Factors) else None if x is None else _int(x) for x in args))


def _empty(*shape):
    return torch.full(shape, float("nan"))


def _skip_unless_there(form) -> None:
    if form == WGMMA and COMPILED not in (None, "sm_90a"):
        pytest.skip(f"{COMPILED} has no wgmma")


def gram_refuses(form, a, b, a2=None, b2=None) -> bool:
    _skip_unless_there(form)
    right = None if a2 is None else Factors(a2, b2)
    return bool(_count(control().ef_cuda_gram_refuses, form, TYPES[a.dtype], Factors(a, b), right, a.shape[2], b.shape[2]))


def gram(form, a, b, a2=None, b2=None, partials=None, **options):
    """a (n, t, d_in), b (n, t, d_out), unit stride inside → (n, m). options: those of build.run."""
    _skip_unless_there(form)
    library, left, right = control(), Factors(a, b), None if a2 is None else Factors(a2, b2)
    shape = (form, TYPES[a.dtype], left, right, a.shape[2], b.shape[2])
    count = partials or _count(library.ef_cuda_gram_partials, *shape)
    n, m = a.shape[0], (a if a2 is None else a2).shape[0]
    partial, out = _empty(count, n, m), _empty(n, m)
    scratch = _empty(_count(library.ef_cuda_gram_scratch, form, *shape[2:]) // 4)
    run(library.ef_cuda_gram, *shape, partial, count, scratch, out, library=library, **options)
    return out


def project_random(a, b, k, seed, offset=0, kind="sign", partials=None, seed_order=1, **options):
    library, x = control(), Factors(a, b)
    type, d_in, d_out = TYPES[a.dtype], a.shape[2], b.shape[2]
    count = partials or _count(library.ef_cuda_project_random_partials, type, x, d_in, d_out, k)
    partial, out = _empty(count, a.shape[0], k), _empty(a.shape[0], k)
    run(
        library.ef_cuda_project_random, type, x, d_in, d_out, k, seed, offset, int(kind == "gaussian"), partial, count, out,
        library=library, seed=seed_order, **options,
    )  # fmt: skip
    return out
