"""csrc/cuda/project.cu on the CPU against the reference in float64: the same numbers drawn, error at most twice plain PyTorch's."""

import one_hot
import pytest
import torch
from calls import project_random
from plain import plain_precision
from rule import agree, exact

from entangle_fast import reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# n, t, d_in, d_out, k: d_in a multiple of 4 or not, more samples than a block holds
SHAPES = [(1, 1, 1, 1, 1), (2, 5, 7, 9, 3), (66, 17, 24, 40, 9), (3, 9, 16, 17, 33)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["sign", "gaussian"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_project_random(shape, kind, dtype):
    n, t, d_in, d_out, k = shape
    a, b = torch.randn(n, t, d_in).to(dtype), torch.randn(n, t, d_out).to(dtype)
    rest = (k, (1 << 40) + 7, (1 << 33) + 5, kind)
    with plain_precision():
        plain = reference.project_random(a, b, *rest)
    want = reference.project_random(*exact([a, b]), *rest)
    for seed, eager in ((1, False), (2, True)):
        got = project_random(a, b, *rest, seed_order=seed, eager=eager)
        agree(got, plain, want, eps=torch.finfo(dtype).eps / 16)


def test_more_directions_than_a_block_holds():
    a, b = torch.randn(2, 3, 12).bfloat16(), torch.randn(2, 3, 5).bfloat16()
    got = project_random(a, b, 372, 5)
    with plain_precision():
        plain = reference.project_random(a, b, 372, 5)
    agree(got, plain, reference.project_random(*exact([a, b]), 372, 5), eps=torch.finfo(a.dtype).eps / 16)


def test_same_bits_in_any_order():
    a, b = torch.randn(5, 6, 20).bfloat16(), torch.randn(5, 6, 40).bfloat16()
    first = project_random(a, b, 10, 3, kind="gaussian", seed_order=1)
    assert torch.equal(first, project_random(a, b, 10, 3, kind="gaussian", seed_order=5, eager=True))


def test_out_of_bounds_is_seen():
    a, b = torch.randn(5, 6, 8), torch.randn(5, 6, 16)
    with pytest.raises(RuntimeError, match="outside"):
        project_random(a, b, 4, 3, beyond=16)


@pytest.mark.parametrize("kind", ["sign", "gaussian"])
@pytest.mark.parametrize("k", one_hot.COUNTS)
def test_the_numbers_are_those_of_the_reference(k, kind):
    a, b = (x.unsqueeze(1) for x in one_hot.linear(3, 5))
    seed, offset = (x % 2**64 for x in one_hot.STREAM)
    one_hot.assert_drawn(project_random(a, b, k, seed, offset, kind), one_hot.directions(k, 15, kind), kind)
    if kind == "sign":  # of more than one tile, and in 16 bits
        a, b = (x.unsqueeze(1).bfloat16() for x in one_hot.linear(33, 17))
        some = torch.arange(0, len(a), 9)
        assert torch.equal(project_random(a[some], b[some], k, seed, offset), one_hot.directions(k, len(a), kind)[some])
