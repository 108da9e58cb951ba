import pytest
import torch
import torch.nn.functional as F

from entangle_fast import reference

# n, m, t, s, d_in, d_out
SHAPES = [
    (1, 2, 1, 1, 3, 5), (0, 2, 1, 1, 3, 5), (3, 0, 2, 2, 3, 5), (3, 4, 0, 0, 3, 5), (7, 9, 1, 1, 33, 129),
    (33, 65, 1, 1, 151, 372), (34, 20, 5, 5, 129, 40), (18, 40, 70, 70, 20, 151), (3, 4, 129, 129, 33, 8),
    (3, 2, 200, 33, 16, 33), (37, 2, 4, 4, 1, 1), (64, 1, 64, 64, 64, 256),
]  # fmt: skip
# n, m, c_in, c_out, size, kernel, stride, padding, dilation, groups
CONVS = [
    (5, 3, 4, 6, (20,), (3,), (1,), (1,), (1,), 2),
    (17, 4, 3, 40, (9, 11), (3, 3), (2, 2), (1, 1), (1, 1), 1),
    (33, 4, 8, 16, (8, 8), (3, 2), (1, 2), (1, 0), (2, 1), 4),
    (4, 5, 35, 7, (12, 12), (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (6, 5, 35, 64, (8, 8), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (3, 2, 4, 6, (5, 6, 7), (2, 3, 2), (1, 2, 3), (1, 0, 1), (1, 1, 2), 2),
    (3, 3, 3, 8, (16, 16), (4, 4), (4, 4), (0, 0), (1, 1), 1),
    (3, 3, 3, 8, (17, 16), (1, 1), (2, 2), (0, 0), (1, 1), 1),
    (3, 3, 6, 6, (7, 7), (3, 3), (1, 1), (1, 1), (1, 1), 6),
    (0, 3, 6, 6, (7, 7), (3, 3), (1, 1), (1, 1), (1, 1), 1),
]


def double(args):
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]


def plain_gram(a, b, a2=None, b2=None):
    """Per-sample gradients and their products in the input's own dtype, as one would write it in PyTorch."""
    G = torch.einsum("nto,nti->noi", b, a).flatten(1)
    return G @ (G if a2 is None else torch.einsum("nto,nti->noi", b2, a2).flatten(1)).mT


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_gram_is_as_good_as_plain_torch(cpp, assert_as_good, dtype, shape, symmetric):
    n, m, t, s, d_in, d_out = shape
    args = [torch.randn(n, t, d_in), torch.randn(n, t, d_out)]
    args += [] if symmetric else [torch.randn(m, s, d_in), torch.randn(m, s, d_out)]
    args = [x.to(dtype) for x in args]
    truth, plain = reference.gram(*double(args)), plain_gram(*args)
    for route in ("tiles", "pairs") + (("rows",) if t == s == 1 else ()):
        assert_as_good(cpp.gram(*args, *([None, None] if symmetric else []), route), plain, truth)


@pytest.mark.parametrize("n, m", [(1, 2), (0, 2), (7, 9), (33, 65), (64, 1)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gram_of_layers_is_as_good_as_plain_torch(cpp, assert_as_good, dtype, n, m, symmetric):
    widths = (3, 33, 151, 0, 8), (5, 129, 372, 2, 1)
    args = [[torch.randn(k, d).to(dtype) for d in each] for k in (n, m) for each in widths]
    args = args[:2] + [[], []] if symmetric else args
    sides = args[:2] * 2 if symmetric else args
    plain = sum(plain_gram(*(x[:, None] for x in layer)) for layer in zip(*sides))
    assert_as_good(cpp.gram_layers(*args), plain, reference.gram_layers(*map(double, args)))


def test_gram_of_strided_factors(cpp):
    x = torch.randn(9, 40, 12)
    b = torch.randn(12, 9, 20)
    a, b = x.transpose(1, 2)[:, :, ::2], b.transpose(0, 1)
    e = torch.randn(1, 1, 20).expand(9, 12, 20)
    for route in ("tiles", "pairs"):
        torch.testing.assert_close(cpp.gram(a, b, None, None, route), plain_gram(a, b), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(cpp.gram(e, b, None, None, route), plain_gram(e, b), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shape", CONVS, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_gram_conv_is_as_good_as_plain_torch(cpp, assert_as_good, dtype, shape, symmetric):
    n, m, c_in, c_out, size, kernel, *rest = shape
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(size) - 1]
    out = convolve(torch.zeros(1, c_in, *size), torch.zeros(c_out, c_in // rest[-1], *kernel), None, *rest).shape[1:]
    sides = [torch.randn(k, *s).to(dtype) for k in (n, m) for s in ((c_in, *size), out)]
    x, g, x2, g2 = sides if not symmetric else (*sides[:2], None, None)

    def each(x, g):
        x, g = (x, g) if dtype != torch.bfloat16 else (x.float(), g.float())
        return reference.per_sample.conv(x, g, kernel, *rest).to(dtype).flatten(1)

    left = each(x, g)
    plain = left @ (left if symmetric else each(x2, g2)).mT
    truth = reference.gram_conv(*double([x, g, kernel, *rest, x2, g2]))
    for route in ("tiles", "pairs"):
        assert_as_good(cpp.gram_conv(x, g, kernel, *rest, x2, g2, route), plain, truth)


@pytest.mark.parametrize("n,m,t,s,d,vocabulary", [(1, 2, 3, 4, 5, 2), (40, 33, 7, 9, 20, 10), (129, 3, 5, 70, 33, 1000),
                                                   (64, 64, 16, 16, 64, 3), (0, 3, 2, 2, 4, 5), (3, 3, 0, 2, 4, 5)])  # fmt: skip
def test_gram_embedding(cpp, assert_as_good, dtype, n, m, t, s, d, vocabulary):
    ids, ids2 = torch.randint(0, vocabulary, (n, t)), torch.randint(0, vocabulary, (m, s))
    b, b2 = torch.randn(n, t, d).to(dtype), torch.randn(m, s, d).to(dtype)
    for padding in (-1, 1):
        for args in ([ids, b, None, None, padding], [ids, b, ids2, b2, padding]):
            assert_as_good(cpp.gram_embedding(*args), reference.gram_embedding(*args), reference.gram_embedding(*double(args)))


def test_results_do_not_depend_on_the_number_of_threads(cpp):
    a, b = torch.randn(130, 6, 150), torch.randn(130, 6, 260)
    x, g, ids = torch.randn(40, 20, 9, 9), torch.randn(40, 33, 9, 9), torch.randint(0, 9, (130, 6))
    conv = [[3, 3], [1, 1], [1, 1], [1, 1], 1]
    calls = [lambda: cpp.gram(a, b, None, None, "tiles"), lambda: cpp.gram(a, b, None, None, "pairs"),
             lambda: cpp.gram_layers([a[:, 0], a[:, 1]], [b[:, 0], b[:, 1]], [], []),
             lambda: cpp.gram_conv(x, g, *conv, None, None, "tiles"), lambda: cpp.gram_embedding(ids, b),
             lambda: cpp.sqnorm(a, b), lambda: cpp.step_gram([a, a + 1], 2)]  # fmt: skip
    before = torch.get_num_threads()
    try:
        for call in calls:
            found = []
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                found.append(call())
                assert torch.equal(found[-1], call())  # the same threads, the same bits
            for other in found[1:]:
                assert (other - found[0]).norm() <= 1e-6 * found[0].norm()
    finally:
        torch.set_num_threads(before)


def test_opcheck(cpp):
    a, b, w = torch.randn(5, 3, 7), torch.randn(5, 3, 4), torch.randn(2, 5)
    x, g, ids = torch.randn(3, 4, 6, 6), torch.randn(3, 8, 6, 6), torch.randint(0, 5, (5, 3))
    conv = [[3, 3], [1, 1], [1, 1], [1, 1], 2]
    for op, args in [
        (cpp.gram, (a, b, None, None, "tiles")), (cpp.gram, (a, b, a, b, "pairs")), (cpp.gram_conv, (x, g, *conv)),
        (cpp.gram_embedding, (ids, b)), (cpp.sqnorm, (a, b)), (cpp.sqnorm_conv, (x, g, *conv)), (cpp.combine, (a, b, w)),
    ]:  # fmt: skip
        torch.library.opcheck(op.default, args)
        torch.library.opcheck(op.default, [y.clone().requires_grad_() if isinstance(y, torch.Tensor) and y.is_floating_point()
                                           else y for y in args], test_utils=("test_schema", "test_faketensor"))  # fmt: skip


def test_arguments_are_checked(cpp):
    a, b = torch.randn(5, 3, 7), torch.randn(5, 3, 4)
    for args in [(a, b[:4], None, None, "tiles"), (a, b, None, None, "rows"), (a, b, None, None, "diagonal"),
                 (a, b, a[:, :, :2], b, "tiles")]:  # fmt: skip
        with pytest.raises(RuntimeError, match="gram"):
            cpp.gram(*args)
    x, g, ids = torch.randn(5, 1, 6), torch.randn(5, 1, 4), torch.zeros(5, 3, dtype=torch.long)
    for op, *args in [(cpp.gram, a, b, a, None), (cpp.gram_conv, x, g, [3], [1], [0], [1], 1, x), (cpp.gram_embedding, ids, b, ids)]:
        with pytest.raises(RuntimeError, match="both given, or none"):
            op(*args)
    for args in [(x, g[:2], [3], [1], [0], [1]), (x, g, [], [1], [0], [1]), (x, g, [3], [0], [0], [1]), (x, g, [3], [1], [-1], [1])]:
        with pytest.raises(RuntimeError, match="convolution"):
            cpp.sqnorm_conv(*args, 1)
    a, b = a[:, 0], b[:, 0]
    for args in [([], [], [], []), ([a], [], [], []), ([a, a], [b, b], [a], [b]), ([a], [b], [a], []), ([a, a[:4]], [b, b[:4]], [], []),
                 ([a[:, None]], [b[:, None]], [], []), ([a], [b], [a[:, :2]], [b]), ([a], [b[:4]], [], [])]:  # fmt: skip
        with pytest.raises(RuntimeError, match="gram"):
            cpp.gram_layers(*args)


@pytest.mark.parametrize("level", ["plain", "avx2", "avx512"])
def test_every_isa_gives_the_same(level):
    """A process that is told to use a lower ISA computes what this one does."""
    import os
    import subprocess
    import sys

    code = (
        "import torch, entangle_fast as ef; torch.manual_seed(3); c = torch.ops.entangle_fast\n"
        "a, b = torch.randn(35, 6, 50), torch.randn(35, 6, 41); x, g = torch.randn(18, 5, 9, 9), torch.randn(18, 7, 9, 9)\n"
        "p = [torch.randn(5000)]; c.step_update(p, [], [torch.ones(5000)], [], torch.zeros(0), .1, 0., 0., .5, 9, 1)\n"
        "k = [c.gram(a, b, None, None, r) for r in ('tiles', 'pairs')]\n"
        "k += [c.gram(a.bfloat16(), b.bfloat16(), None, None, 'pairs'), c.gram(a.double(), b.double(), None, None, 'tiles')]\n"
        "k += [c.gram_conv(x, g, [3, 3], [1, 1], [1, 1], [1, 1], 1), c.sqnorm(a, b), p[0]]\n"
        "k += list(c.sample_loss(a[0], torch.arange(6), 9.))\n"
        "print(*[repr(float(y.double().norm())) for y in k])"
    )
    found = [
        [float(x) for x in subprocess.run([sys.executable, "-c", code], env=os.environ | {"ENTANGLE_FAST_ISA": isa},
                                          check=True, capture_output=True, text=True).stdout.split()]
        for isa in ("", level)
    ]  # fmt: skip
    assert found[0] == pytest.approx(found[1], rel=1e-5) and len(found[0]) == 10
