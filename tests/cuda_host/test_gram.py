"""csrc/cuda/gram.cu on the CPU against the reference in float64: error at most twice plain PyTorch's in the same dtype."""

import pytest
import torch
from bound import COMPILED, control
from calls import MMA, WGMMA, gram, gram_refuses
from plain import plain_precision
from rule import agree, exact

from entangle_fast import reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# n, m (0: symmetric), t, d_in, d_out
SHAPES = [(1, 0, 1, 1, 1), (2, 0, 5, 7, 9), (65, 0, 17, 24, 40), (129, 0, 9, 8, 16), (3, 66, 20, 16, 33)]
LARGE = [(151, 0, 40, 129, 151), (130, 70, 33, 64, 372)]


def factors(n, t, d_in, d_out, dtype):
    return torch.randn(n, t, d_in).to(dtype), torch.randn(n, t, d_out).to(dtype)


def check(form, args, **options):
    with plain_precision():
        plain = reference.gram(*args)
    agree(gram(form, *args, **options), plain, reference.gram(*exact(args)), eps=torch.finfo(args[0].dtype).eps / 16)


def arguments(shape, dtype):
    n, m, t, d_in, d_out = shape
    return [*factors(n, t, d_in, d_out, dtype), *(factors(m, t + 3, d_in, d_out, dtype) if m else ())]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mma(shape, dtype):
    args = arguments(shape, dtype)
    for seed, eager in ((1, False), (2, True)):
        check(MMA, args, seed=seed, eager=eager)


def wgmma(shape, eager, blocks):
    check(WGMMA, arguments(shape, torch.bfloat16), eager=eager, seed=3)
    assert control().cuda_host_largest_cluster() == blocks


TWO_CHUNKS = (256, 0, 9, 136, 400) if COMPILED else (5, 0, 34, 72, 400)


@pytest.mark.parametrize("shape, launches", [((3, 0, 9, 24, 40), b"-ee"), ((2, 3, 9, 24, 40), b"-eee"), (TWO_CHUNKS, b"-eeee")])
def test_all_launches_of_wgmma_but_the_first_may_start_early(shape, launches):
    """form, of each side; accumulate; the same for a second chunk; the partial sums."""
    check(WGMMA, arguments(shape, torch.bfloat16))
    assert control().cuda_host_launches() == launches
    gram(MMA, *arguments(shape, torch.bfloat16))
    assert control().cuda_host_launches() == b"--"


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(  # the last two: tiles of 256 and 128 columns, several chunks, several blocks of samples
    "shape",
    [(1, 0, 1, 8, 8), (34, 0, 70, 24, 72), (70, 0, 9, 16, 64), (5, 37, 66, 24, 40), (4, 0, 9, 200, 264), (2, 130, 9, 72, 8)],
    ids=str,
)
def test_wgmma(shape, eager):
    wgmma(shape, eager, 1)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(
    "shape, blocks",
    [
        ((1, 0, 40, 72, 136), 2), ((3, 0, 97, 72, 200), 2), ((2, 3, 34, 72, 136), 2),
        ((5, 0, 34, 72, 400), 2),  # two chunks
        ((2, 0, 40, 200, 400), 4),
        ((1, 0, 180, 200, 264), 4),  # a block beyond d_out
        ((199, 0, 9, 24, 40), 2),  # the rows, not the factors
    ],
    ids=str,
)  # fmt: skip
def test_clusters_of_wgmma(shape, blocks, eager):
    wgmma(shape, eager, blocks)


@pytest.mark.slow
@pytest.mark.parametrize("form", [MMA, WGMMA])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large(shape, form):
    n, m, t, d_in, d_out = shape
    if form == WGMMA:  # 16-byte rows
        shape = n, m, t, d_in // 8 * 8, d_out // 8 * 8
    for dtype in DTYPES if form == MMA else DTYPES[:1]:
        check(form, arguments(shape, dtype))


def test_strides():
    a, b = factors(6, 20, 32, 48, torch.bfloat16)
    views = [
        (a[:, 3:11, 8:24], b[:, 3:11, 16:40]),  # a part, 16-byte rows
        (a[:, :, 1:18], b[:, :, 3:]),  # rows that begin anywhere
        (a[:1].expand(6, -1, -1), b),  # stride 0
        (a.transpose(0, 1), b.transpose(0, 1)),
    ]
    for x, y in views:
        check(MMA, [x, y])
        if not gram_refuses(WGMMA, x, y):
            check(WGMMA, [x, y])
    assert not gram_refuses(WGMMA, *views[0]) and gram_refuses(WGMMA, *views[1]) and gram_refuses(WGMMA, *views[2])


def test_float16_gradients_do_not_underflow():
    a, b = factors(4, 8, 16, 16, torch.float16)
    b = (b * 2.0**-12).half()
    a = (a * 2.0**-10).half()
    want = reference.gram(a.double(), b.double())
    torch.testing.assert_close(gram(MMA, a, b).double() / want.max(), want / want.max(), rtol=5e-3, atol=5e-4)


def test_same_bits_in_any_order():
    for form in (MMA, WGMMA):
        args = factors(40, 18, 24, 72, torch.bfloat16)
        assert torch.equal(gram(form, *args, seed=1), gram(form, *args, seed=9, eager=True))


@pytest.mark.parametrize("form", [MMA, WGMMA])
def test_out_of_bounds_is_seen(form):
    args = [x.clone() for x in factors(5, 7, 8, 16, torch.bfloat16)]
    gram(form, *args)
    with pytest.raises(RuntimeError, match="outside|NaN"):
        gram(form, *args, beyond=16)
