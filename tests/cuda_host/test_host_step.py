import bound
import pytest
import torch
from looking import check_every_capacity
from shapes import assert_as_good, bits, misaligned, some
from solving import check_a_ridge_below_all_counts_for_none, check_not_finite_is_not_dropped, check_solution, check_too_short_is_left_out

from entangle_fast import reference


@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_gram(cuda, dtype, k):
    flat = [x for _ in range(k) for x in some(dtype)]
    torch.testing.assert_close(cuda.step_gram(flat, k), reference.step_gram(flat, k), rtol=1e-12, atol=1e-9)


def test_gram_of_misaligned_mixed_and_strided_tensors(cuda):
    flat = misaligned(some(torch.float32)) + some(torch.float32)
    torch.testing.assert_close(cuda.step_gram(flat, 2), reference.step_gram(flat, 2), rtol=1e-12, atol=1e-9)
    flat = [torch.randn(7, 5).t(), torch.randn(9).bfloat16(), torch.randn(5, 7), torch.randn(9)]
    torch.testing.assert_close(cuda.step_gram(flat, 2), reference.step_gram(flat, 2), rtol=1e-12, atol=1e-9)
    assert torch.equal(cuda.step_gram([torch.zeros(0)] * 2, 2), torch.zeros(2, 2, dtype=torch.float64))


F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(
    "types, copies",
    [
        ((F32, BF16), False), ((F16, F32), False), ((BF16, F32, BF16), False), ((F16, BF16, F32), False), ((F32, F16, F32, BF16), False),
        ((F64, BF16), True), ((BF16, BF16, F32, F16, BF16), True),
    ],
    ids=str,
)  # fmt: skip
def test_gram_of_lists_of_their_own_types(cuda, types, copies, aligned):
    flat = [x for dtype in types for x in (some(dtype) if aligned else misaligned(some(dtype)))]
    with torch.profiler.profile() as seen:
        got = cuda.step_gram(flat, len(types))
    torch.testing.assert_close(got, reference.step_gram([x.double() for x in flat], len(types)), rtol=1e-12, atol=1e-9)
    assert ("aten::_to_copy" in {event.key for event in seen.key_averages()}) == copies


def test_gram_is_the_same_in_any_order_of_blocks_and_threads(cuda):
    flat = [x for _ in range(2) for x in some(torch.float32)]
    found = []
    for seed in (1, 2, 3):
        bound.begin(seed=seed)
        found.append(cuda.step_gram(flat, 2))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("k, momentum, noise", [(0, False, 0.0), (1, True, 0.0), (2, True, 0.1), (5, False, 0.1), (5, True, 0.0)])
@pytest.mark.parametrize("aligned", [True, False])
def test_update(cuda, dtype, k, momentum, noise, aligned):
    place = (lambda xs: xs) if aligned else misaligned
    params, grads, v = some(dtype), some(dtype), some(dtype) if momentum else []
    directions = [x for _ in range(k) for x in some(dtype)]
    coef = torch.randn(k, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    rest = (0.1, 0.9, 0.01, noise, 2**40 + 5, 2**33)

    def run(op, to):
        mine = [place([x.to(to).clone() for x in xs]) for xs in (params, v, grads, directions)]
        op(*mine, coef.to(to if to == torch.float64 else coef.dtype), *rest)
        return mine[0] + mine[1]

    runs = (run(op, to) for op, to in ((cuda.step_update, dtype), (reference.step_update, dtype), (reference.step_update, torch.float64)))
    for ours, plain, truth in zip(*runs):
        if noise and dtype == torch.float64:  # the draws are float32, by definition
            torch.testing.assert_close(ours, truth, rtol=1e-6, atol=1e-6)
        else:
            assert_as_good(ours, plain, truth)


@pytest.mark.parametrize("held, read", [(torch.float32, torch.bfloat16), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_update_of_low_precision_parameters_with_wide_momentum_or_gradients(cuda, held, read):
    theta, v = some(torch.bfloat16), some(held)
    grads, directions = some(read), some(read)
    mine, plain = ([[x.clone() for x in xs] for xs in (theta, v)] for _ in range(2))
    cuda.step_update(*mine, grads, directions, torch.tensor([0.3]), 0.1, 0.9)
    reference.step_update(*plain, grads, directions, torch.tensor([0.3]), 0.1, 0.9)
    for ours, theirs in zip(mine[0] + mine[1], plain[0] + plain[1]):
        torch.testing.assert_close(ours, theirs, rtol=8e-3 if ours.dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_noise_is_the_stream_of_the_reference(cuda):
    theta, zero = ([torch.zeros(s) for s in (3, 20003, 8)] for _ in range(2))
    cuda.step_update(theta, [], zero, [], torch.zeros(0), 0.0, 0.0, 0.0, 1.0, 2**40 + 5, 2**33)
    torch.testing.assert_close(torch.cat(theta), reference.philox.normal(20014, 2**40 + 5, 2**33), rtol=2e-6, atol=2e-6)


def test_gram_of_two_dtypes_is_their_sum(cuda):
    flat = [torch.randn(9001), torch.randn(70).double(), torch.randn(300).half()]
    torch.testing.assert_close(cuda.step_gram([*flat, *flat], 2), reference.step_gram([*flat, *flat], 2), rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("case, k", [*(("", k) for k in (1, 2, 3, 8, 32)), ("singular", 6), ("short", 2), ("short", 4), ("ridge", 5)])
@pytest.mark.parametrize("held", [True, False])
def test_project(cuda, held, case, k):
    sizes = [(3,), (5, 7), (4097,), (0,)]
    lists = [some(torch.float32, sizes) for _ in range(k + 1 + held)]
    if case == "singular":  # two in the span of others, one of nothing
        lists[1], lists[3], lists[5] = [x.clone() for x in lists[0]], [x * 0 for x in lists[3]], [-2 * x for x in lists[2]]
    if case == "short":  # the mean of a fitted set beside samples at a high loss
        lists[1] = [x * 1e-5 for x in lists[1]]
    p, flat = len(sizes), [x for xs in lists for x in xs]
    args = (flat[: k * p], flat[k * p : -p], flat[-p:], 0.9, 2e4 if case == "ridge" else 0.0, k * 2.3e-16)
    check_solution(cuda.step_project, args, case, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("held, ridge", [(False, 0.0), (True, 0.0), (True, 50.0)])
@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_project_leaves_out_what_is_too_short(cuda, held, ridge, k):
    check_too_short_is_left_out(cuda.step_project, k, ridge, held)


@pytest.mark.parametrize("k, ridge, bad", [(1, 0.0, "nan"), (2, 50.0, "nan"), (3, 0.0, "inf"), (6, 0.0, "nan"), (6, 50.0, "inf")])
def test_project_does_not_drop_what_is_not_finite(cuda, k, ridge, bad):
    check_not_finite_is_not_dropped(cuda.step_project, k, ridge, float(bad))


@pytest.mark.parametrize("ridge", [1e-310, 1e-61])
def test_project_takes_a_ridge_below_all_that_counts_for_none(cuda, ridge):
    check_a_ridge_below_all_counts_for_none(cuda.step_project, ridge)


def test_project_of_two_dtypes_of_none_and_of_nothing(cuda):
    x, y = torch.randn(300), torch.randn(70).double()
    args = ([x, y, x + 1, y - 1], [x + 2, 3 * y], [x - 3, y * y], 0.5, 0.0, 1e-15)  # the solve follows the last dtype's Gram
    for got, want in zip(cuda.step_project(*args), reference.step_project(*args)):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    gram, coef = cuda.step_project([], [], [x], 0.0, 0.0, 1e-15)
    assert gram.shape == (1, 1) and coef.shape == (0,)
    for zero in (x * 0, x[:0]):
        gram, coef = cuda.step_project([zero] * 3, [], [x[: len(zero)]], 0.0, 0.0, 1e-15)
        assert torch.equal(coef, torch.zeros(3, dtype=torch.float64)) and gram.shape == (4, 4)
    with pytest.raises(RuntimeError, match="more than 32 directions"):
        cuda.step_project([x] * 33, [], [x], 0.0, 0.0, 1e-15)


@pytest.mark.parametrize("k, noise", [(0, 0.0), (1, 0.1), (2, 0.0), (5, 0.1)])
@pytest.mark.parametrize("aligned", [True, False])
def test_adamw(cuda, dtype, k, noise, aligned):
    place = (lambda xs: xs) if aligned else misaligned
    wide = torch.promote_types(dtype, torch.float32)
    params, grads, m, u = some(dtype), some(dtype), some(wide), [x.square() for x in some(wide)]
    directions, coef = [x for _ in range(k) for x in some(dtype)], torch.randn(k, dtype=wide)
    step = torch.tensor(3, dtype=torch.int64 if aligned else torch.float64)
    rest = (step, 0.1, 0.9, 0.0 if k == 1 else 0.99, 1e-8, 0.01, noise, 2**40 + 5, 2**33, torch.tensor(5))

    def run(op, to):
        up = torch.promote_types(to, torch.float32)
        mine = [place([x.to(t).clone() for x in xs]) for t, xs in zip((to, up, up, to, to), (params, m, u, grads, directions))]
        op(*mine, coef.to(up), *rest)
        return mine[0] + mine[1] + mine[2]

    runs = (run(op, to) for op, to in ((cuda.step_adamw, dtype), (reference.step_adamw, dtype), (reference.step_adamw, torch.float64)))
    for ours, plain, truth in zip(*runs):
        if noise and dtype == torch.float64:  # the draws are float32, by definition
            torch.testing.assert_close(ours, truth, rtol=1e-6, atol=1e-6)
        else:
            assert_as_good(ours, plain, truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adamw_of_low_precision_parameters_with_wide_or_strided_gradients(cuda, dtype):
    theta, m, u = [torch.randn(40, 30).to(dtype).t()], [torch.randn(30, 40)], [torch.rand(30, 40)]
    grads, directions = [torch.randn(30, 40)], [torch.randn(30, 40).to(dtype)]
    mine, plain = ([[x.clone() for x in xs] for xs in (theta, m, u)] for _ in range(2))
    rest = (torch.tensor([0.3]), torch.tensor(1), 0.1)
    cuda.step_adamw(*mine, grads, directions, *rest)
    reference.step_adamw(*plain, grads, directions, *rest)
    for ours, theirs in zip(sum(mine, []), sum(plain, [])):
        torch.testing.assert_close(ours, theirs, rtol=torch.finfo(ours.dtype).eps * 2, atol=1e-5)


def test_the_counter_moves_the_noise(cuda):
    def drawn(offset, counter):
        theta, zero = [torch.zeros(5003)], [torch.zeros(5003)]
        cuda.step_update(theta, [], zero, [], torch.zeros(0), 0.0, 0.0, 0.0, 1.0, -7, offset, counter)
        return theta[0]

    assert torch.equal(drawn(2**33 - 2, torch.tensor(5)), drawn(2**33 + 3, None))
    assert not torch.equal(drawn(2**33 - 2, torch.tensor(6)), drawn(2**33 + 3, None))


@pytest.mark.parametrize("aligned", [True, False])
def test_lookahead_is_undone_to_the_bit(cuda, dtype, aligned):
    params, grads = some(dtype), some(dtype)
    params[2][:3] *= 1e-30  # far smaller than their step: the plain undo loses them
    params[3][:5] = torch.tensor([0.0, -0.0, 1e-40, float("inf"), 3e38]).to(dtype)
    params[3][8190:8200] = 1e-30
    if not aligned:
        params = misaligned(params)
    before = [x.clone() for x in params]
    ulps, index, value = cuda.step_lookahead(params, grads, 0.3)
    for x, old, g in zip(params, before, grads):  # one rounding, to the parameter's dtype
        torch.testing.assert_close(x, (old.double() - 0.3 * g.double()).to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert all(u.dtype == torch.int8 and u.shape == x.shape for u, x in zip(ulps, params))
    assert len(index) == len(value) > 0 and index.unique(dim=0).equal(index)  # in the order of the elements
    cuda.step_lookahead_undo(params, grads, ulps, index, value, 0.3)
    assert all(torch.equal(x, y) for x, y in zip(bits(params), bits(before)))


def test_lookahead_with_every_capacity(cuda, dtype):
    check_every_capacity(cuda.step_lookahead, cuda.step_lookahead_undo, (dtype, dtype), 3 * 4096 + 5)  # over four blocks
    check_every_capacity(cuda.step_lookahead, cuda.step_lookahead_undo, (dtype, torch.float64))


def test_bad_arguments_are_refused(cuda):
    p = [torch.randn(5)]
    with pytest.raises(RuntimeError, match="differ in size"):
        cuda.step_update(p, [], [torch.randn(4)], [], torch.zeros(0), 0.1)
    with pytest.raises(RuntimeError, match="differ in size"):
        cuda.step_gram(p + [torch.randn(4)], 2)
    with pytest.raises(RuntimeError, match="not float32"):
        cuda.step_gram([torch.arange(3)], 1)
    with pytest.raises(RuntimeError, match="differ in size"):
        cuda.step_adamw(p, [torch.randn(4)], p, p, [], torch.zeros(0), torch.tensor(1), 0.1)
    with pytest.raises(RuntimeError, match="capacity"):
        cuda.step_lookahead(p, p, 0.1, -1)
    with pytest.raises(RuntimeError, match="differ in number"):
        cuda.step_project(p, p, [], 0.9, 0.0, 1e-15)
