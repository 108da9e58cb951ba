import pytest
import torch
from looking import check_every_capacity
from solving import check_a_ridge_below_all_counts_for_none, check_not_finite_is_not_dropped, check_too_short_is_left_out

from entangle_fast import reference

SIZES = [(3,), (5, 7), (129, 151), (70001,), (0,), (1,), (372, 40)]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def some(dtype):
    return [torch.randn(*s).to(dtype) for s in SIZES]


def bits(tensors):
    return [x.contiguous().view(INTEGERS[x.element_size()]) for x in tensors]


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_step_gram(cpp, dtype, k):
    flat = [x for _ in range(k) for x in some(dtype)]
    torch.testing.assert_close(cpp.step_gram(flat, k), reference.step_gram(flat, k), rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("k", [0, 1, 2, 5])
@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_step_update(cpp, assert_as_good, dtype, k, momentum, noise):
    params, grads, v = some(dtype), some(dtype), some(dtype) if momentum else []
    directions = [x for _ in range(k) for x in some(dtype)]
    coef = torch.randn(k, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    rest = (0.1, 0.9, 0.01, noise, 1234567, 7)

    def run(op, to):
        mine = [[x.to(to).clone() for x in xs] for xs in (params, v, grads, directions)]
        op(*mine, coef.to(to if to == torch.float64 else coef.dtype), *rest)
        return mine[0] + mine[1]

    for ours, plain, truth in zip(run(cpp.step_update, dtype), run(reference.step_update, dtype),
                                  run(reference.step_update, torch.float64)):  # fmt: skip
        if noise and dtype == torch.float64:  # the draws are float32, by definition
            torch.testing.assert_close(ours, truth, rtol=1e-6, atol=1e-6)
        else:
            assert_as_good(ours, plain, truth)


@pytest.mark.parametrize("k, case", [(0, ""), (1, ""), (2, ""), (5, ""), (40, ""), (4, "twice"), (4, "zero"), (4, "ridge"), (4, "short")])
@pytest.mark.parametrize("held", [True, False])
def test_step_project(cpp, dtype, held, k, case):
    lists = [some(dtype) for _ in range(k + 1 + held)]
    if case == "twice":
        lists[2] = [x.clone() for x in lists[0]]
    if case in ("zero", "short"):
        lists[1] = [x * (0 if case == "zero" else 1e-4) for x in lists[1]]
    flat = [x for xs in lists for x in xs]
    p, ridge = len(SIZES), 3e4 if case == "ridge" else 0.0
    args = (flat[: k * p], flat[k * p : -p], flat[-p:], 0.9, ridge, max(1, k) * 2.3e-16)
    gram, coef = cpp.step_project(*args)
    wanted, solved = reference.step_project(*args)
    torch.testing.assert_close(gram, wanted, rtol=1e-12, atol=1e-9)
    assert coef.isfinite().all()
    torch.testing.assert_close(coef, solved, rtol=1e-9, atol=1e-9 * (1e4 if case == "short" else 1))


@pytest.mark.parametrize("k", [1, 2, 3, 6])
@pytest.mark.parametrize("ridge", [0.0, 50.0])
@pytest.mark.parametrize("held", [True, False])
def test_step_project_leaves_out_what_is_too_short(cpp, dtype, held, ridge, k):
    check_too_short_is_left_out(cpp.step_project, k, ridge, held, dtype)


@pytest.mark.parametrize("k", [1, 2, 3, 6])
@pytest.mark.parametrize("ridge", [0.0, 50.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_step_project_does_not_drop_what_is_not_finite(cpp, dtype, bad, ridge, k):
    check_not_finite_is_not_dropped(cpp.step_project, k, ridge, bad, dtype)


@pytest.mark.parametrize("ridge", [1e-310, 1e-61])
def test_step_project_takes_a_ridge_below_all_that_counts_for_none(cpp, ridge):
    check_a_ridge_below_all_counts_for_none(cpp.step_project, ridge)


@pytest.mark.parametrize("k, noise", [(0, 0.0), (1, 0.1), (2, 0.0), (2, 0.1), (5, 0.1)])
def test_step_adamw(cpp, assert_as_good, dtype, k, noise):
    wide = torch.promote_types(dtype, torch.float32)
    params, grads, m, u = some(dtype), some(dtype), some(wide), [x.square() for x in some(wide)]
    directions = [x for _ in range(k) for x in some(dtype)]
    coef = torch.randn(k, dtype=wide)
    rest = (torch.tensor(3), 0.1, 0.9, 0.99, 1e-8, 0.01, noise, 1234567, 5, torch.tensor(2))

    def run(op, to):
        mine = [[x.to(to if xs[0].dtype == dtype else torch.promote_types(to, torch.float32)).clone() for x in xs]
                for xs in (params, m, u, grads, directions) if xs]  # fmt: skip
        op(*mine[:4], mine[4] if k else [], coef.to(torch.promote_types(to, torch.float32)), *rest)
        return mine[0] + mine[1] + mine[2]

    for ours, plain, truth in zip(run(cpp.step_adamw, dtype), run(reference.step_adamw, dtype), run(reference.step_adamw, torch.float64)):
        if noise and dtype == torch.float64:  # the draws are float32, by definition
            torch.testing.assert_close(ours, truth, rtol=1e-6, atol=1e-6)
        else:
            assert_as_good(ours, plain, truth)


def test_gram_of_mixed_dtypes_loses_nothing(cpp):
    flat = [torch.randn(300).bfloat16(), torch.randn(300), torch.randn(300).double()]
    torch.testing.assert_close(cpp.step_gram(flat, 3), reference.step_gram(flat, 3), rtol=1e-13, atol=1e-12)


def test_the_counter_moves_the_noise(cpp):
    def drawn(offset, counter):
        theta, zero = [torch.zeros(5003)], [torch.zeros(5003)]
        cpp.step_update(theta, [], zero, [], torch.zeros(0), 0.0, 0.0, 0.0, 1.0, 7, offset, counter)
        return theta[0]

    assert torch.equal(drawn(2**33, torch.tensor(5)), drawn(2**33 + 5, None))
    assert not torch.equal(drawn(2**33, torch.tensor(6)), drawn(2**33 + 5, None))


def test_noise_is_the_reference_stream(cpp):
    theta, zero = [torch.zeros(s) for s in (3, 100003, 8)], [torch.zeros(s) for s in (3, 100003, 8)]
    cpp.step_update(theta, [], zero, [], torch.zeros(0), 0.0, 0.0, 0.0, 1.0, 2**40 + 5, 2**33)
    expected = reference.philox.normal(100014, 2**40 + 5, 2**33)
    torch.testing.assert_close(torch.cat(theta), expected, rtol=2e-6, atol=2e-6)


def test_update_of_strided_and_mixed_tensors(cpp):
    theta = [torch.randn(7, 5).t(), torch.randn(9).to(torch.bfloat16)]
    mine, plain = [x.clone() for x in theta], [x.clone() for x in theta]
    mine[0] = mine[0].t().contiguous().t()
    grads, v = [torch.randn(5, 7), torch.randn(9).to(torch.bfloat16)], [torch.zeros(5, 7), torch.zeros(9)]
    v2 = [x.clone() for x in v]
    cpp.step_update(mine, v, grads, [], torch.zeros(0), 0.1, 0.9)
    reference.step_update(plain, v2, grads, [], torch.zeros(0), 0.1, 0.9)
    for x, y in zip(mine + v, plain + v2):
        torch.testing.assert_close(x, y)


def test_bfloat16_goes_with_float64(cpp):
    high, low = torch.rand(2503, dtype=torch.float64), torch.rand(2503).bfloat16()
    coef, step = torch.ones(1, dtype=torch.float64), torch.tensor(3)

    def run(ops):
        p, v, q = ([high.clone(), low.clone()] for _ in range(3))
        m, u = ([high.clone(), low.float()] for _ in range(2))
        ops.step_update(p, v, [low, high], [low, high.float()], coef, 0.1, 0.9)
        ops.step_adamw(q, m, u, [low, high], [high.float(), low], coef, step, 0.1)
        return p + v + q + m + u

    for x, y in zip(run(cpp), run(reference)):
        torch.testing.assert_close(x, y)


def test_float16_is_stepped_in_float32(cpp):
    half = torch.randn(300).half()
    mine, plain = [half.clone()], [half.clone()]
    for op, p in ((cpp.step_update, mine), (reference.step_update, plain)):
        op(p, [], [half.flip(0)], [half], torch.ones(1), 0.1)
    torch.testing.assert_close(mine, plain)
    torch.testing.assert_close(cpp.step_gram([half, half], 2), reference.step_gram([half, half], 2))
    with pytest.raises(RuntimeError, match="look-ahead takes"):
        cpp.step_lookahead(mine, [half], 0.1)


def test_lookahead_far_beyond_the_parameter_is_undone(cpp):
    params, grads = [torch.tensor([2.0, -2.0], dtype=torch.float64).repeat(64)], [torch.linspace(9e16, 1.4e17, 128, dtype=torch.float64)]
    before = params[0].clone()
    cpp.step_lookahead_undo(params, grads, *cpp.step_lookahead(params, grads, 1.1), 1.1)
    assert torch.equal(params[0], before)


def test_lookahead_is_undone_to_the_bit(cpp, dtype):
    params, grads = some(dtype), some(dtype)
    params[2][:3] *= 1e-30  # far smaller than their step: the plain undo loses them
    params[3][:5] = torch.tensor([0.0, -0.0, 1e-40, float("inf"), 3e38]).to(dtype)
    before = [x.clone() for x in params]
    ulps, index, value = cpp.step_lookahead(params, grads, 0.3)
    for x, old, g in zip(params, before, grads):
        rtol, atol = (1e-2, 2e-2) if dtype == torch.bfloat16 else (1e-5, 1e-6)
        torch.testing.assert_close(x, old - (0.3 * g.double()).to(dtype), rtol=rtol, atol=atol)
    assert all(u.dtype == torch.int8 and u.shape == x.shape for u, x in zip(ulps, params)) and len(index) == len(value) > 0
    cpp.step_lookahead_undo(params, grads, ulps, index, value, 0.3)
    assert all(torch.equal(x, y) for x, y in zip(bits(params), bits(before)))


@pytest.mark.parametrize("size", [300, 70001])  # within a block, over three
def test_lookahead_with_every_capacity(cpp, dtype, size):
    check_every_capacity(cpp.step_lookahead, cpp.step_lookahead_undo, (dtype, dtype), size)
    check_every_capacity(cpp.step_lookahead, cpp.step_lookahead_undo, (dtype, torch.float64), size)


def test_a_lookahead_that_is_refused_moves_nothing(cpp):
    params, grads = [torch.randn(5)], [torch.randn(5)]
    before = params[0].clone()
    with pytest.raises(RuntimeError):
        cpp.step_lookahead(params, grads, 0.1, 1 << 50)  # memory for so many there is not
    assert torch.equal(params[0], before)
    ulps, value = [torch.zeros(5, dtype=torch.int8)], torch.ones(1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="index is out of range"):
        cpp.step_lookahead_undo(params, grads, ulps, torch.tensor([[0, 5]]), value, 0.1)
    assert torch.equal(params[0], before)


def test_opcheck(cpp):
    p, g = [torch.randn(5), torch.randn(3, 2)], [torch.randn(5), torch.randn(3, 2)]
    schema = ("test_schema", "test_faketensor")
    torch.library.opcheck(cpp.step_gram.default, (p + g, 2))
    torch.library.opcheck(cpp.step_update.default, (p, [], g, [], torch.zeros(0), 0.1), test_utils=schema)
    torch.library.opcheck(cpp.step_lookahead_undo.default,
                          (p, g, [torch.zeros(5, dtype=torch.int8), torch.zeros(3, 2, dtype=torch.int8)],
                           torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, dtype=torch.double), 0.1), test_utils=schema)  # fmt: skip


def test_arguments_are_checked(cpp):
    p = [torch.randn(5)]
    with pytest.raises(RuntimeError, match="step"):
        cpp.step_update(p, [], [torch.randn(4)], [], torch.zeros(0), 0.1)
    with pytest.raises(RuntimeError, match="step"):
        cpp.step_gram(p + [torch.randn(4)], 2)
    with pytest.raises(RuntimeError, match="exp_avg differ in size"):
        cpp.step_adamw(p, [torch.randn(4)], p, p, [], torch.zeros(0), torch.tensor(1), 0.1)
    with pytest.raises(RuntimeError, match="grads differ in size"):
        cpp.step_lookahead(p, [torch.randn(4)], 0.1)
    with pytest.raises(RuntimeError, match="counter"):
        cpp.step_update(p, [], p, [], torch.zeros(0), 0.1, 0.0, 0.0, 0.1, 0, 0, torch.tensor(1, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="capacity"):
        cpp.step_lookahead(p, p, 0.1, -1)
    ulps, none = [torch.zeros(5, dtype=torch.int8)], torch.zeros(0, 2, dtype=torch.long)
    with pytest.raises(RuntimeError, match="out of range"):
        cpp.step_lookahead_undo(p, [torch.zeros(5)], ulps, torch.tensor([[0, -1]]), torch.zeros(1).double(), 0.1)
    for index, value in ((none.int(), torch.zeros(0).double()), (none, torch.zeros(0)), (none, torch.zeros(1).double())):
        with pytest.raises(RuntimeError, match="undo needs"):
            cpp.step_lookahead_undo(p, [torch.zeros(5)], ulps, index, value, 0.1)
    with pytest.raises(RuntimeError, match="step_project"):
        cpp.step_project(p, p, [], 0.9, 0.0, 1e-15)
