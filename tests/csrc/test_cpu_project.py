import one_hot
import pytest
import torch

from entangle_fast import reference

# (n, t, d_in, d_out, k): against the factors, by tiles, both sides swapped in tiles, directions in more than one round
SHAPES = [(7, 1, 5, 3, 2), (33, 1, 70, 130, 40), (9, 3, 1, 1, 1), (5, 16, 37, 150, 33), (6, 40, 150, 33, 64), (40, 9, 12, 257, 35),
          (3, 8, 6, 5, 1030), (2, 1, 3, 300_000, 2), (0, 2, 3, 4, 2), (4, 2, 3, 4, 0), (4, 0, 3, 4, 2)]  # fmt: skip


# x, g, kernel, stride, padding, dilation, groups, k: odd widths, more columns and rows than a piece holds, groups, directions in two rounds
CONVS = [
    ((5, 3, 9, 8), (5, 7, 5, 8), [3, 3], [2, 1], [1, 1], [1, 1], 1, 5),
    ((3, 36, 6, 5), (3, 70, 6, 5), [3, 3], [1, 1], [1, 1], [1, 1], 1, 40),
    ((9, 6, 11), (9, 8, 5), [3], [2], [1], [2], 2, 3),
    ((2, 4, 3, 5, 4), (2, 4, 3, 5, 4), [1, 3, 3], [1, 1, 1], [0, 1, 1], [1, 1, 1], 4, 2),
    ((17, 40, 4), (17, 33, 4), [1], [1], [0], [1], 1, 1030),
    ((0, 2, 5), (0, 4, 3), [3], [1], [0], [1], 1, 2),
    ((2, 2, 5), (2, 4, 3), [3], [1], [0], [1], 1, 0),
]

# n, t, d, table, k: few ids, one a sample, rows wider than what is drawn at a time, directions of two panels
LOOKUPS = [(7, 5, 3, 11, 2), (4, 3, 600, 5, 300), (40, 3, 16, 2, 70), (3, 1, 1030, 50, 33), (1, 9, 37, 4, 1), (0, 3, 4, 5, 2),
           (4, 0, 3, 5, 2), (4, 2, 3, 5, 0)]  # fmt: skip


@pytest.fixture
def close_to_drawn(cpp, assert_as_good):
    """The operation obeys the error rule against the reference."""

    def check(op, *args):
        plain = getattr(reference, op)
        truth = plain(*(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args))
        ours = getattr(cpp, op)(*args)
        if "gaussian" in args:  # drawn in float32 on every backend: logarithm and sine differ by units in the last place
            assert ours.shape == truth.shape
            torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-4 * float(truth.abs().max()) if truth.numel() else 0)
        else:
            assert_as_good(ours, plain(*args), truth)

    return check


@pytest.mark.parametrize("n,t,d_in,d_out,k", SHAPES)
def test_onto_given_directions(cpp, assert_as_good, dtype, n, t, d_in, d_out, k):
    a, b, basis = (torch.randn(*s).to(dtype) for s in ((n, t, d_in), (n, t, d_out), (k, d_out, d_in)))
    assert_as_good(cpp.project(a, b, basis), reference.project(a, b, basis), reference.project(a.double(), b.double(), basis.double()))


@pytest.mark.parametrize("case", CONVS)
@pytest.mark.parametrize("few", [0, 1])
def test_convolutions_onto_given_directions(cpp, assert_as_good, dtype, few, case):
    x, g = (torch.randn(shape).to(dtype) for shape in case[:2])
    kernel, stride, padding, dilation, groups, k = case[2:]
    basis = torch.randn(few or k, g.shape[1], x.shape[1] // groups, *kernel).to(dtype)
    shape = (stride, padding, dilation, groups)
    truth = reference.project_conv(x.double(), g.double(), basis.double(), *shape)
    assert_as_good(cpp.project_conv(x, g, basis, *shape), reference.project_conv(x, g, basis, *shape), truth)


def test_a_convolution_reads_no_more_than_its_windows(cpp):
    x, g, basis = torch.randn(3, 2, 6), torch.randn(3, 4, 2), torch.randn(3, 4, 2, 1)
    x[:, :, 2:4] = x[:, :, 5:] = torch.nan
    for k in (1, 3):
        assert cpp.project_conv(x, g, basis[:k], [4], [0], [1], 1).isfinite().all()


@pytest.mark.parametrize("n,t,d,table,k", LOOKUPS)
def test_lookups_onto_given_directions(cpp, assert_as_good, dtype, n, t, d, table, k):
    ids, b, basis = torch.randint(0, table, (n, t)), torch.randn(n, t, d).to(dtype), torch.randn(k, table, d).to(dtype)
    for padding_idx in (-1, 1):
        assert_as_good(cpp.project_embedding(ids, b, basis, padding_idx), reference.project_embedding(ids, b, basis, padding_idx),
                       reference.project_embedding(ids, b.double(), basis.double(), padding_idx))  # fmt: skip
    b[ids == 1] = torch.nan
    assert cpp.project_embedding(ids, b, basis, 1).isfinite().all()  # a row of padding is not read
    torch.testing.assert_close(cpp.project_embedding(ids.int(), b, basis, 1), cpp.project_embedding(ids, b, basis, 1), rtol=0, atol=0)
    if ids.numel() and k:
        with pytest.raises(RuntimeError, match=f"id {table} in a table of {table}"):
            cpp.project_embedding(torch.full_like(ids, table), b, basis, -1)


def test_one_position_may_go_unsaid(cpp):
    a, b, basis = torch.randn(6, 5), torch.randn(6, 4), torch.randn(3, 4, 5)
    torch.testing.assert_close(cpp.project(a, b, basis), cpp.project(a[:, None], b[:, None], basis), rtol=0, atol=0)
    torch.testing.assert_close(cpp.project_random(a, b, 9, 1), cpp.project_random(a[:, None], b[:, None], 9, 1), rtol=0, atol=0)


def test_strides(cpp):
    a, b, basis = torch.randn(12, 8, 6).mT, torch.randn(6, 12, 5).transpose(0, 1), torch.randn(6, 5, 40).permute(2, 1, 0)
    a = torch.randn(12, 6, 6).mT
    want = cpp.project(a.contiguous(), b.contiguous(), basis.contiguous())
    torch.testing.assert_close(cpp.project(a, b, basis), want, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["sign", "gaussian"])
@pytest.mark.parametrize("n,t,d_in,d_out,k", [s for s in SHAPES if s[3] < 300_000])
def test_onto_drawn_directions(close_to_drawn, dtype, kind, n, t, d_in, d_out, k):
    close_to_drawn("project_random", torch.randn(n, t, d_in).to(dtype), torch.randn(n, t, d_out).to(dtype), k, 2**33 + 7, 5, kind)


def test_threads_do_not_matter_beyond_rounding(cpp):
    a, b, basis, before = torch.randn(50, 12, 64), torch.randn(50, 12, 200), torch.randn(64, 200, 64), torch.get_num_threads()
    images, shape = (torch.randn(20, 6, 8), torch.randn(20, 70, 8)), ([3], [1], [1], [1], 1)
    ids, tables, weights = torch.randint(0, 30, (50, 12)), torch.randn(5, 30, 200), torch.randn(40, 70, 6, 3)
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            drawn = cpp.project_random_conv(*images, 9, *shape, 3), cpp.project_random_embedding(ids, b, 70, 30, 3)
            given = [cpp.project_conv(*images, weights[:k], *shape[1:]) for k in (3, 40)]
            given.append(cpp.project_embedding(ids, b, tables, -1))
            found.append((cpp.project(a, b, basis), cpp.project_random(a, b, 64, 3), *drawn, *given))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*found):
        assert (one - other).norm() <= 1e-6 * one.norm()


@pytest.mark.parametrize("kind", ["sign", "gaussian"])
@pytest.mark.parametrize("case", CONVS)
def test_convolutions_onto_drawn_directions(close_to_drawn, dtype, kind, case):
    x, g = (torch.randn(shape).to(dtype) for shape in case[:2])
    *shape, k = case[2:]
    close_to_drawn("project_random_conv", x, g, k, *shape, 2**33 + 7, 5, kind)


@pytest.mark.parametrize("kind", ["sign", "gaussian"])
@pytest.mark.parametrize("n,t,d,table,k", LOOKUPS)
def test_lookups_onto_drawn_directions(cpp, close_to_drawn, dtype, kind, n, t, d, table, k):
    ids, b = torch.randint(0, table, (n, t)), torch.randn(n, t, d).to(dtype)
    for padding_idx in (-1, 1):
        close_to_drawn("project_random_embedding", ids, b, k, table, 2**33 + 7, 5, kind, padding_idx)
    b[ids == 1] = torch.nan
    assert cpp.project_random_embedding(ids, b, k, table, 1, 0, kind, 1).isfinite().all()  # a row of padding is not read
    for wrong in (-2, table) if ids.numel() and k else ():
        with pytest.raises(RuntimeError, match=f"id {wrong} in a table of {table}"):
            cpp.project_random_embedding(torch.full_like(ids, wrong), b, k, table, 1)
    torch.testing.assert_close(cpp.project_random_embedding(ids.int(), b, k, table, 1), cpp.project_random_embedding(ids, b, k, table, 1),
                               rtol=0, atol=0, equal_nan=True)  # fmt: skip


@pytest.mark.parametrize("kind", ["sign", "gaussian"])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("k", one_hot.COUNTS)
def test_the_numbers_are_those_of_the_reference(cpp, wide, kind, k):
    rest = (*one_hot.STREAM, kind)
    for d_out, d_in in ((3, 5), (1, 40), (34, 2)):  # panels hold either side
        a, b = (x.to(wide) for x in one_hot.linear(d_out, d_in))
        one_hot.assert_drawn(cpp.project_random(a, b, k, *rest), one_hot.directions(k, d_out * d_in, kind), kind)
    ids, b = one_hot.lookup(4, 6)
    one_hot.assert_drawn(cpp.project_random_embedding(ids, b.to(wide), k, 4, *rest), one_hot.directions(k, 24, kind), kind)
    for groups in (1, 2):
        x, g = (x.to(wide) for x in one_hot.conv(4, 6, [2, 2], groups))
        want = one_hot.directions(k, groups * len(x), kind).reshape(groups, len(x), k).sum(0)
        found = cpp.project_random_conv(x, g, k, [2, 2], [1, 1], [0, 0], [1, 1], groups, *rest)
        one_hot.assert_drawn(found, want, kind)
