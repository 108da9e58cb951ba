"""step: tables of pointers, projection, noise, look-ahead and undo."""

import pytest
import torch
from entangle_fast.kernels import philox, step, step_adamw, step_lookahead, step_project, table
from looking import check_every_capacity
from rule import agree, exact
from solving import check_a_ridge_below_all_counts_for_none, check_not_finite_is_not_dropped, check_solution, check_too_short_is_left_out

from entangle_fast import reference

SHAPES = [(5, 7), (129,), (4099,), (1,), (0,), (64, 130)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def tensors(dtype, shapes=SHAPES):
    return [torch.randn(s).to(dtype) for s in shapes]


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k, noise", [(0, 0.0), (2, 0.5), (5, 0.0)])
def test_adamw(k, noise, dtype):
    wide = torch.promote_types(dtype, torch.float32)
    params, grads, m, u = tensors(dtype), tensors(dtype), tensors(wide), [x.square() for x in tensors(wide)]
    directions, coef = [x for _ in range(k) for x in tensors(dtype)], torch.randn(k, dtype=torch.float64)
    # the interpreter takes numbers as float32: such that it holds. An eps of one where the step would be m / |g|
    beta2, eps = (0.0, 1.0) if k == 5 else (63 / 64, 2**-20)
    options = (torch.tensor(3), 0.125, 0.75, beta2, eps, 0.25, noise, 7, 2**33, torch.tensor(5))
    results = []
    for run, turn in ((step_adamw.step_adamw, copies), (reference.step_adamw, copies), (reference.step_adamw, exact)):
        held = [turn(xs) for xs in (params, m, u)]
        run(*held, turn(grads), turn(directions), coef, *options)
        results.append([x for xs in held for x in xs])
    agree(*results, eps=torch.finfo(torch.float32).eps if noise else 0)  # the noise is float32 for every dtype


def test_the_counter_moves_the_noise():
    def drawn(offset, counter):
        theta, zero = [torch.zeros(5003)], [torch.zeros(5003)]
        step.step_update(theta, [], zero, [], torch.zeros(0), 0.0, 0.0, 0.0, 1.0, -7, offset, counter)
        return theta[0]

    assert torch.equal(drawn(2**33 - 2, torch.tensor(5)), drawn(2**33 + 3, None))  # a carry into the high word
    assert not torch.equal(drawn(2**33 - 2, torch.tensor(6)), drawn(2**33 + 3, None))


def spanning(case, k, dtype, shapes):
    lists = [tensors(dtype, shapes) for _ in range(k)]
    if case == "singular":  # two in the span of others, one of nothing
        lists[1], lists[3] = [x.clone() for x in lists[0]], [x * 0 for x in lists[3]]
        lists[-1] = [-2 * x for x in lists[2]]
    if case == "short":  # the mean of a fitted set beside samples at a high loss
        lists[1] = [x * 1e-5 for x in lists[1]]
    return [x for xs in lists for x in xs]


CASES = [*(("", k) for k in (1, 2, 3, 8)), ("singular", 6), ("short", 2), ("short", 4), ("ridge", 5)]


@pytest.mark.parametrize("case, k, held", [(*case, held) for case in CASES for held in (True, False)] + [("", 32, True)])
def test_project(case, k, held):
    dtype, shapes = torch.float64 if case == "singular" else torch.float32, SHAPES[:2] if k == 32 else SHAPES
    directions, grads = spanning(case, k, dtype, shapes), tensors(dtype, shapes)
    momentum = tensors(dtype, shapes) if held else []
    args = (directions, momentum, grads, 0.9, 2e4 if case == "ridge" else 0.0, k * 2.3e-16)
    check_solution(step_project.step_project, args, case, rtol=1e-13, atol=1e-10)


@pytest.mark.parametrize("k, held, ridge", [(1, False, 0.0), (2, True, 0.0), (2, False, 50.0), (3, True, 0.0), (6, True, 50.0)])
def test_project_leaves_out_what_is_too_short(held, ridge, k):
    check_too_short_is_left_out(step_project.step_project, k, ridge, held)


@pytest.mark.parametrize("k, ridge, bad", [(1, 0.0, "nan"), (2, 50.0, "nan"), (3, 0.0, "inf"), (6, 0.0, "nan"), (6, 50.0, "inf")])
def test_project_does_not_drop_what_is_not_finite(k, ridge, bad):
    check_not_finite_is_not_dropped(step_project.step_project, k, ridge, float(bad))


@pytest.mark.parametrize("ridge", [1e-310, 1e-61])
def test_project_takes_a_ridge_below_all_that_counts_for_none(ridge):
    check_a_ridge_below_all_counts_for_none(step_project.step_project, ridge)


def test_project_of_mixed_dtypes_and_of_nothing():
    x = torch.randn(300)
    args = ([x.bfloat16()], [x.double() + 1], [x + 2], 0.5, 0.0, 1e-15)
    for got, want in zip(step_project.step_project(*args), reference.step_project(*args)):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    gram, coef = step_project.step_project([], [], [x], 0.0, 0.0, 1e-15)
    assert gram.shape == (1, 1) and coef.shape == (0,)
    gram, coef = step_project.step_project([x * 0] * 3, [], [x], 0.0, 0.0, 1e-15)
    assert torch.equal(coef, torch.zeros(3, dtype=torch.float64))


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
    residue = step_lookahead.step_lookahead(params, grads, 0.125)
    reference.step_lookahead(plain, grads, 0.125)
    reference.step_lookahead(wide, exact(grads), 0.125)
    agree(params, plain, wide)
    ulps, index, value = residue
    assert all(u.dtype == torch.int8 for u in ulps) and len(index) == len(value)
    if dtype != torch.float64:
        assert len(index) > 0
    assert index.tolist() == sorted(index.tolist())
    step_lookahead.step_lookahead_undo(params, grads, *residue, 0.125)
    for x, y in zip(params, before):
        assert torch.equal(x.reshape(-1, 1).view(torch.uint8), y.reshape(-1, 1).view(torch.uint8))


@pytest.mark.parametrize("dtypes", [*((d, d) for d in DTYPES), (torch.bfloat16, torch.float64)])
def test_lookahead_with_every_capacity(dtypes):
    check_every_capacity(step_lookahead.step_lookahead, step_lookahead.step_lookahead_undo, dtypes, 2 * 4096 + 16)  # of two programs


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
    assert "two dtypes" in step.refuse("step_update", [x], [], [x], [x, x.bfloat16()], torch.zeros(2), 0.1)
    assert "int32" in step.refuse("step_gram", [x.int()], 1)
    assert step.refuse("step_gram", [x], 1) is None
    assert "33 directions" in step_project.refuse("step_project", [x] * 33, [], [x], 0.9, 0.0, 1e-15)
    assert "int64" in step_project.refuse("step_project", [x.long()], [], [x], 0.9, 0.0, 1e-15)
    adamw = lambda m, p=x: ("step_adamw", [p], [m], [m], [p], [], torch.zeros(0), torch.tensor(1), 0.1)  # noqa: E731
    assert "moments 0: torch.bfloat16" in step_adamw.refuse(*adamw(x.bfloat16(), x.bfloat16()))
    assert "not contiguous" in step_adamw.refuse(*adamw(x.T, x.T))
    assert step_adamw.refuse(*adamw(x)) is None
    assert step_lookahead.refuse("step_lookahead_undo", [x], [x], [x.char()], x.long(), x.double(), 0.1) is None
