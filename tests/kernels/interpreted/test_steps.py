"""step: tables of pointers, projection, noise, look-ahead and undo."""

import pytest
import torch
from entangle_fast.kernels import philox, step, table
from rule import agree, exact

from entangle_fast import reference

SHAPES = [(5, 7), (129,), (4099,), (1,), (0,), (64, 130)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def tensors(dtype, scale=1.0):
    return [(torch.randn(s) * scale).to(dtype) for s in SHAPES]


def copies(xs):
    return [x.clone() for x in xs]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 5])
def test_gram_of_directions(k, dtype):
    d = [x for _ in range(k) for x in tensors(dtype)]
    got = step.step_gram(d, k)
    assert got.dtype == torch.float64 and torch.equal(got, got.T)
    torch.testing.assert_close(got, reference.step_gram(exact(d), k), rtol=1e-13, atol=1e-10)


def test_gram_of_nothing():
    assert step.step_gram([], 0).shape == (0, 0)
    assert torch.equal(step.step_gram([torch.zeros(0)] * 2, 2), torch.zeros(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("k, held", [(0, True), (2, True), (2, False)])
def test_update(k, held, noise, dtype):
    params, grads = tensors(dtype), tensors(dtype)
    momentum = tensors(torch.float32) if held else []
    directions, coef = [x for _ in range(k) for x in tensors(dtype)], torch.randn(k)
    options = (0.125, 0.5, 0.25, noise, 7, 3)
    results = []
    for run, turn in ((step.step_update, copies), (reference.step_update, copies), (reference.step_update, exact)):
        p, m = turn(params), turn(momentum)
        run(p, m, turn(grads), turn(directions), turn([coef])[0], *options)
        results.append(p + m)
    agree(*results, eps=torch.finfo(torch.float32).eps if noise else 0)  # the noise is float32 for every dtype


def test_update_of_mixed_dtypes_and_strided_gradients():
    params = [torch.randn(8, 16).bfloat16(), torch.randn(33), torch.randn(16, 8).bfloat16()]
    grads = [torch.randn(16, 8).T, torch.randn(66)[::2], torch.randn(16, 8)]
    other = copies(params)
    step.step_update(params, [], grads, [], torch.zeros(0), 0.125, noise=0.5, seed=-3, offset=2**33)
    reference.step_update(other, [], grads, [], torch.zeros(0), 0.125, noise=0.5, seed=-3, offset=2**33)
    for x, y in zip(params, other):
        torch.testing.assert_close(x, y, rtol=torch.finfo(x.dtype).eps * 2, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lookahead_is_undone_to_the_bit(dtype):
    params, grads = tensors(dtype), tensors(dtype)
    params[0] *= 1e-4  # small weights under large steps: the plain undo is far off
    params[1][0], params[1][1] = 0.0, -0.0
    before, plain, wide = copies(params), copies(params), exact(params)
    residue = step.step_lookahead(params, grads, 0.125)
    reference.step_lookahead(plain, grads, 0.125)
    reference.step_lookahead(wide, exact(grads), 0.125)
    agree(params, plain, wide)
    ulps, index, value = residue
    assert all(u.dtype == torch.int8 for u in ulps) and len(index) == len(value)
    if dtype != torch.float64:
        assert len(index) > 0
    assert index.tolist() == sorted(index.tolist())
    step.step_lookahead_undo(params, grads, *residue, 0.125)
    for x, y in zip(params, before):
        assert torch.equal(x.reshape(-1, 1).view(torch.uint8), y.reshape(-1, 1).view(torch.uint8))


def test_a_table_written_by_kernel_arguments_is_the_table():
    values = [0, 1, -1, 2**40, 2**62, *range(30)]
    assert table.write_by_arguments(values, torch.device("cpu")).tolist() == values


def test_philox_words_are_those_of_the_reference():
    import triton
    import triton.language as tl

    from entangle_fast.reference import philox as want

    @triton.jit
    def draw(out, first, k0: tl.int64, k1: tl.int64, o0: tl.int64, o1: tl.int64, SIZE: tl.constexpr):
        block = first // 4 + tl.arange(0, SIZE // 4)
        w0, w1, w2, w3 = philox.blocks(block.to(tl.int64), k0, k1, o0, o1)
        tl.store(out + tl.arange(0, SIZE), philox.in_order(w0, w1, w2, w3).to(tl.int64))

    out = torch.empty(64, dtype=torch.int64)
    for seed, offset, first in ((0, 0, 0), (-5, 2**40 + 3, 8), (2**63 - 1, 1, 2**34)):
        draw[(1,)](out, first, *philox.key(seed, offset), SIZE=64)
        assert torch.equal(out, want.words(64, seed, offset, start=first))


def test_refusals_name_the_reason():
    x = torch.zeros(4, 6)
    assert "not contiguous" in step.refuse("step_update", [x.T], [], [x.T], [], torch.zeros(0), 0.1)
    assert "two dtypes" in step.refuse("step_gram", [x, x.bfloat16()], 2)
    assert "int32" in step.refuse("step_gram", [x.int()], 1)
