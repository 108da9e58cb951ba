"""gram, sqnorm, project, combine."""

import one_hot
import pytest
import torch
from entangle_fast.kernels import combine, gram, project, project_random, sqnorm, tiles
from rule import agree, check, exact

from entangle_fast import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1, 2), (5, 1, 33, 151), (7, 3, 40, 24), (0, 3, 5, 4), (3, 0, 5, 4)]
LONG = [((2, 129, 20, 151), torch.bfloat16), ((129, 2, 8, 12), torch.float32)]
CONVS = [  # x, g, kernel, stride, padding, dilation, groups
    ((3, 4, 7, 7), (3, 6, 4, 4), [3, 3], [2, 2], [1, 1], [1, 1], 1),
    ((3, 4, 9), (3, 6, 5), [3], [1], [0], [2], 2),
    ((2, 2, 3, 5, 4), (2, 2, 3, 5, 4), [1, 3, 3], [1, 1, 1], [0, 1, 1], [1, 1, 1], 1),
    ((2, 32, 5, 5), (2, 32, 5, 5), [3, 3], [1, 1], [1, 1], [1, 1], 2),
]
DRAWN_CONVS = [  # a kernel of 1, no sample, rows in more than one chunk
    ((2, 3, 5), (2, 4, 5), [1], [1], [0], [1], 1),
    ((0, 2, 5), (0, 4, 3), [3], [1], [0], [1], 1),
    ((2, 2, 3), (2, 130, 3), [3], [1], [1], [1], 1),
]


def factors(n, t, d_in, d_out, dtype=torch.float32):
    a, b = torch.randn(n, t, d_in), torch.randn(n, t, d_out)
    return a.to(dtype), b.to(dtype)


@pytest.mark.parametrize("shape, dtype", [(shape, dtype) for shape in SHAPES for dtype in DTYPES] + LONG)
def test_linear(shape, dtype):
    n, t, d_in, d_out = shape
    a, b = factors(*shape, dtype)
    other = factors(3, t + 1, d_in, d_out, dtype)
    for route in ("pairs", "tiles", *(["rows"] if t == 1 else [])):
        check(gram, "gram", a, b, None, None, route)
        if route == "rows":
            other = factors(3, 1, d_in, d_out, dtype)
        check(gram, "gram", a, b, *other, route)
    check(sqnorm, "sqnorm", a, b)
    check(combine, "combine", a, b, torch.randn(2, n))
    for k in (0, 1, 3):
        check(project, "project", a, b, torch.randn(k, d_out, d_in).to(dtype))


@pytest.mark.parametrize("t", [1, 3])
def test_float32_factors_on_a_basis_of_16_bits_are_not_rounded(t):
    a, b = factors(5, t, 33, 17)
    for dtype in DTYPES[1:]:
        basis = torch.randn(3, 17, 33).to(dtype)
        want = reference.project(a.double(), b.double(), basis.double())
        assert (project.project(a, b, basis) - want).abs().max() < 1e-6 * want.abs().max()


@pytest.mark.parametrize("case, dtype", [(case, torch.float32) for case in CONVS] + [(CONVS[2], torch.bfloat16)])
def test_convolutions(case, dtype):
    x, g = torch.randn(case[0]).to(dtype), torch.randn(case[1]).to(dtype)
    shape = case[2:]
    for route in ("pairs", "tiles"):
        check(gram, "gram_conv", x, g, *shape, None, None, route)
        check(gram, "gram_conv", x, g, *shape, x[:1].flip(2), g[:1], route)
    check(sqnorm, "sqnorm_conv", x, g, *shape)
    check(combine, "combine_conv", x, g, torch.randn(2, len(x)), *shape)
    basis = torch.randn(3, g.shape[1], x.shape[1] // shape[-1], *shape[0]).to(dtype)
    check(project, "project_conv", x, g, basis, *shape[1:])


@pytest.mark.parametrize("padding_idx", [-1, 2])
def test_lookups(padding_idx):
    ids, b = torch.randint(0, 9, (5, 19)), torch.randn(5, 19, 13)
    ids2, b2 = torch.randint(0, 9, (2, 129)), torch.randn(2, 129, 13)
    ids2[0] = 2
    check(gram, "gram_embedding", ids, b, None, None, padding_idx)
    check(gram, "gram_embedding", ids, b, ids2, b2, padding_idx)
    check(gram, "gram_embedding", ids[:, :0], b[:, :0], None, None, padding_idx)
    for x, y in ((ids, b), (ids2, b2.bfloat16()), (ids[:0], b[:0])):
        check(sqnorm, "sqnorm_embedding", x, y, padding_idx)
        check(combine, "combine_embedding", x, y, torch.randn(2, len(x)), 9, padding_idx)
        check(project, "project_embedding", x, y, torch.randn(3, 9, 13).to(y.dtype), padding_idx)


@pytest.mark.parametrize("padding_idx", [-1, 1, 2])
def test_lookups_of_negative_ids(padding_idx):
    ids, ids2 = torch.randint(-3, 3, (5, 19)), torch.randint(-3, 3, (2, 7))
    b, b2 = torch.randn(5, 19, 13), torch.randn(2, 7, 13)
    check(gram, "gram_embedding", ids, b, None, None, padding_idx)
    check(gram, "gram_embedding", ids, b, ids2, b2, padding_idx)
    check(sqnorm, "sqnorm_embedding", ids, b, padding_idx)


def test_layouts_that_are_not_contiguous():
    a, b = torch.randn(6, 40, 9).mT, torch.randn(6, 1, 5).expand(6, 9, 5)  # transposed; expanded over positions
    sliced = torch.randn(12, 9, 80)[::2, :, 3:43]
    for x in (a, sliced):
        check(gram, "gram", x, b, None, None, "pairs")
        check(gram, "gram", x, b, None, None, "tiles")
        check(combine, "combine", x, b, torch.randn(6, 2).T)
        check(project, "project", x, b, torch.randn(2, 40, 5).mT)
        check(sqnorm, "sqnorm", x, b)
    check(gram, "gram", sliced[:, 0], b[:, 0], None, None, "rows")


def test_rows_of_all_layers_in_one_launch():
    a, b, a2, b2 = ([torch.randn(k, w) for w in widths] for k in (9, 4) for widths in ((33, 64, 1, 0), (5, 64, 151, 3)))
    for dtype in DTYPES:
        left, right = ([[x.to(dtype) for x in side] for side in pair] for pair in ((a, b), (a2, b2)))
        check(gram, "gram_layers", *left, [], [])
        check(gram, "gram_layers", *left, *right)
    check(gram, "gram_layers", [a[0][:0]], [b[0][:0]], [], [])
    check(gram, "gram_layers", [a[0].mT.contiguous().mT], [b[0][:1].expand(9, 5)], [], [])


@pytest.mark.parametrize("multiprocessors", [1, 2, 40])
@pytest.mark.parametrize("n, m", [(9, None), (130, None), (300, None), (70, 140)])
def test_rows_of_many_tiles_and_splits(n, m, multiprocessors, monkeypatch):
    """As many splits as the device has room for; a symmetric result to the bit, the same in every run."""
    monkeypatch.setattr(gram.launch, "processors", lambda x: multiprocessors)
    widths = (33, 64, 1, 16), (5, 200, 151, 16)
    args = [[torch.randn(k, w).bfloat16() for w in each] if k else [] for k in (n, m) for each in widths]
    got = gram.gram_layers(*args)
    assert torch.equal(got, gram.gram_layers(*args)) and (m or torch.equal(got, got.T))
    agree(got, reference.gram_layers(*args), reference.gram_layers(*exact(args)))


def test_a_symmetric_gram_is_symmetric_to_the_bit_and_the_same_every_time():
    a, b = factors(33, 3, 20, 24, torch.bfloat16)
    for route in ("pairs", "tiles"):
        k = gram.gram(a, b, None, None, route)
        assert torch.equal(k, k.T)
        assert torch.equal(k, gram.gram(a, b, None, None, route))


def test_a_scratch_of_many_chunks(monkeypatch):
    monkeypatch.setattr(tiles, "SCRATCH_BYTES", 4 * 2 * 128 * 17)
    a, b = factors(2, 5, 300, 17)
    assert len(list(tiles.chunks(2, tiles.Layer(300, 17), 4))) > 2
    check(gram, "gram", a, b, None, None, "tiles")
    check(project, "project", a, b, torch.randn(2, 17, 300))


@pytest.mark.parametrize("kind", ["sign", "gaussian"])
@pytest.mark.parametrize("shape", [(5, 1, 33, 17), (7, 3, 40, 24)])
def test_random_directions_are_those_of_the_reference(shape, kind):
    a, b = factors(*shape)
    for k in (3, 40, 70):  # one, two and four words an element
        check(project_random, "project_random", a, b, k, -5, 2**40 + 3, kind)
    check(project_random, "project_random", a.bfloat16(), b.bfloat16(), 2, 7, 0, kind)


@pytest.mark.parametrize("kind", ["sign", "gaussian"])
@pytest.mark.parametrize("case", [*CONVS, *DRAWN_CONVS])
def test_random_directions_of_convolutions(case, kind, monkeypatch):
    x, g = torch.randn(case[0]), torch.randn(case[1])
    check(project_random, "project_random_conv", x, g, 3, *case[2:], -5, 2**40 + 3, kind)
    monkeypatch.setattr(tiles, "SCRATCH_BYTES", 4 * 64)  # many chunks
    check(project_random, "project_random_conv", x.bfloat16(), g.bfloat16(), 2, *case[2:], 7, 0, kind)


@pytest.mark.parametrize("kind", ["sign", "gaussian"])
@pytest.mark.parametrize("padding_idx", [-1, 2])
def test_random_directions_of_lookups(padding_idx, kind):
    ids = torch.randint(0, 9, (5, 19))
    for d in (13, 12, 132):
        check(project_random, "project_random_embedding", ids, torch.randn(5, 19, d), 3, 9, -5, 2**40 + 3, kind, padding_idx)
    check(project_random, "project_random_embedding", ids, torch.randn(5, 19, 8).bfloat16(), 2, 2**40, 7, 0, kind, padding_idx)
    check(project_random, "project_random_embedding", ids[:, :0], torch.randn(5, 0, 8), 2, 9, 7, 0, kind, padding_idx)


@pytest.mark.parametrize("kind", ["sign", "gaussian"])
@pytest.mark.parametrize("k", one_hot.COUNTS)
def test_the_numbers_are_those_of_the_reference(k, kind):
    rest, find = (*one_hot.STREAM, kind), project_random.project_random
    one_hot.assert_drawn(find(*one_hot.linear(3, 5), k, *rest), one_hot.directions(k, 15, kind), kind)
    found = project_random.project_random_embedding(*one_hot.lookup(4, 3), k, 4, *rest)
    one_hot.assert_drawn(found, one_hot.directions(k, 12, kind), kind)
    if k in (3, 129):
        found = project_random.project_random_conv(*one_hot.conv(2, 3, [2]), k, [2], [1], [0], [1], 1, *rest)
        one_hot.assert_drawn(found, one_hot.directions(k, 12, kind), kind)


def test_refusals_name_the_reason():
    a, b = factors(2, 2, 3, 4)
    assert "float64" in gram.refuse("gram", a.double(), b.double(), None, None, "pairs")
    assert "two dtypes" in sqnorm.refuse("sqnorm", a, b.bfloat16())
    assert "w: dtype" in combine.refuse("combine", a, b, torch.zeros(1, 2, dtype=torch.float64))
    assert "basis: dtype" in project.refuse("project", a, b, torch.zeros(1, 4, 3, dtype=torch.float64))
    assert "must be on one device" in gram.refuse("gram", a, b.to("meta"), None, None, "pairs")
