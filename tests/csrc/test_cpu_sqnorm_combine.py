import pytest
import torch
import torch.nn.functional as F

from entangle_fast import reference


@pytest.mark.parametrize("n,t,d_in,d_out", [(0, 2, 3, 4), (1, 1, 3, 5), (129, 1, 151, 372), (7, 2, 40, 33), (3, 0, 4, 5),
                                            (5, 129, 33, 20), (4, 70, 9, 151), (3, 33, 300, 301)])  # fmt: skip
def test_sqnorm(cpp, assert_as_good, dtype, n, t, d_in, d_out):
    a, b = torch.randn(n, t, d_in).to(dtype), torch.randn(n, t, d_out).to(dtype)
    plain = torch.einsum("nto,nti->noi", b, a).square().sum((1, 2))
    assert_as_good(cpp.sqnorm(a, b), plain, reference.sqnorm(a.double(), b.double()))
    if t == 1:
        assert_as_good(cpp.sqnorm(a[:, 0], b[:, 0]), plain, reference.sqnorm(a.double(), b.double()))


def test_sqnorm_of_a_wide_row_does_not_drift(cpp):
    a, b = torch.randn(2, 1 << 20), torch.randn(2, 3)
    truth = reference.sqnorm(a.double(), b.double())
    torch.testing.assert_close(cpp.sqnorm(a, b).double(), truth, rtol=5e-7, atol=0)


@pytest.mark.parametrize("n,c_in,c_out,size,kernel,stride,padding,dilation,groups", [
    (17, 3, 40, (9, 11), (3, 3), (2, 2), (1, 1), (1, 1), 1), (3, 4, 6, (20,), (3,), (1,), (1,), (1,), 2),
    (3, 4, 6, (5, 6, 7), (2, 3, 2), (1, 2, 3), (1, 0, 1), (1, 1, 2), 2),
])  # fmt: skip
def test_sqnorm_conv(cpp, assert_as_good, dtype, n, c_in, c_out, size, kernel, stride, padding, dilation, groups):
    rest = (stride, padding, dilation, groups)
    x = torch.randn(n, c_in, *size).to(dtype)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(size) - 1]
    g = torch.randn_like(convolve(x.float(), torch.zeros(c_out, c_in // groups, *kernel), None, *rest)).to(dtype)
    truth = reference.per_sample.conv(x.double(), g.double(), kernel, *rest)
    plain = truth.to(dtype).square().flatten(1).sum(1)
    assert_as_good(cpp.sqnorm_conv(x, g, kernel, *rest), plain, truth.square().flatten(1).sum(1))


def test_a_stride_that_is_never_taken_costs_nothing(cpp):
    x, g = torch.randn(3, 2, 5, 5), torch.randn(3, 4, 1, 1)
    found = [cpp.sqnorm_conv(x, g, [5, 5], [s, s], [0, 0], [1, 1], 1) for s in (1, 2**31 - 1)]
    assert torch.equal(*found)


def test_a_border_around_nothing(cpp):  # under make sanitize: no copy from a null pointer
    assert cpp.sqnorm_conv(torch.empty(2, 1, 0), torch.randn(2, 3, 2), [1], [1], [1], [1], 1).tolist() == [0, 0]


def test_sizes_whose_products_overflow_are_refused(cpp):
    with pytest.raises(RuntimeError, match="below 2\\^31"):
        cpp.sqnorm_conv(torch.randn(3, 2, 5), torch.randn(3, 4, 15), [3], [2**62], [3], [1], 1)


@pytest.mark.parametrize("size,kernel,stride,padding,dilation", [
    ((9,), (1,), (3,), (0,), (1,)), ((11,), (2,), (4,), (1,), (1,)), ((5, 7), (1, 1), (2, 2), (0, 0), (1, 1)),
    ((4, 3), (2, 1), (1, 1), (0, 0), (3, 1)), ((5, 3, 3), (1, 3, 3), (2, 1, 1), (0, 0, 0), (1, 1, 1)), ((6,), (3,), (2,), (0,), (1,)),
])  # fmt: skip
def test_elements_that_no_window_reads_do_not_count(cpp, dtype, size, kernel, stride, padding, dilation):
    rest, convolve = (stride, padding, dilation, 1), (F.conv1d, F.conv2d, F.conv3d)[len(size) - 1]
    x = torch.randn(3, 2, *size, requires_grad=True)
    out = convolve(x, torch.ones(4, 2, *kernel), None, *rest)
    read = torch.autograd.grad(out.sum(), x)[0] != 0
    assert not read.all()
    x, g = x.detach().to(dtype), torch.randn_like(out).to(dtype)
    poisoned, clean = torch.where(read, x, torch.nan), torch.where(read, x, 0)
    torch.testing.assert_close(cpp.sqnorm_conv(poisoned, g, kernel, *rest), cpp.sqnorm_conv(clean, g, kernel, *rest), rtol=0, atol=0)
    for route in ("tiles", "pairs"):
        torch.testing.assert_close(*(cpp.gram_conv(v, g, kernel, *rest, None, None, route) for v in (poisoned, clean)), rtol=0, atol=0)


@pytest.mark.parametrize("n,t,d,table", [(7, 5, 3, 4), (3, 200, 33, 50), (1, 9, 70, 1), (4, 1, 16, 9), (0, 3, 4, 5), (4, 0, 3, 5),
                                         (4, 2, 0, 5)])  # fmt: skip
def test_tables(cpp, assert_as_good, dtype, n, t, d, table):
    ids, b = torch.randint(0, table, (n, t)), torch.randn(n, t, d).to(dtype)
    for padding_idx in (-1, 1):
        plain, truth = (reference.per_sample.embedding(ids, x, table, padding_idx).square().sum((1, 2)) for x in (b, b.double()))
        assert_as_good(cpp.sqnorm_embedding(ids, b, padding_idx), plain, truth)
    b[ids == 1] = torch.nan
    assert cpp.sqnorm_embedding(ids, b, 1).isfinite().all()  # a row of padding is not read


def test_combine_skips_samples_without_weight(dtype, assert_as_good):
    """Rows supported on disjoint segments, as the entangled method's three means are."""
    a, b = torch.randn(12, 3, 7).to(dtype), torch.randn(12, 3, 5).to(dtype)
    x, g, ids = torch.randn(12, 4, 6, 6).to(dtype), torch.randn(12, 6, 6, 6).to(dtype), torch.randint(0, 9, (12, 3))
    w = torch.zeros(4, 12, dtype=dtype)
    w[0, :4], w[1, 4:7], w[2, 7:] = 1.5, -1, 2  # and a row of zeros
    conv = ((3, 3), (1, 1), (1, 1), (1, 1), 2)
    for op, args, each in [
        (reference.combine, (a, b, w), reference.per_sample.linear(a.double(), b.double())),
        (reference.combine_conv, (x, g, w, *conv), reference.per_sample.conv(x.double(), g.double(), *conv)),
        (reference.combine_embedding, (ids, b, w, 9), reference.per_sample.embedding(ids, b.double(), 9)),
    ]:  # fmt: skip
        truth = torch.einsum("mn,n...->m...", w.double(), each)
        assert_as_good(op(*args), torch.einsum("mn,n...->m...", w, each.to(dtype)), truth)


def test_combine_keeps_the_derivative_of_zero_weights():
    a, b, w = torch.randn(4, 2, 3), torch.randn(4, 2, 5), torch.tensor([[0.0, 1.0, 0.0, 2.0]], requires_grad=True)
    torch.ops.entangle_fast.combine(a, b, w).sum().backward()
    torch.testing.assert_close(w.grad[0], reference.per_sample.linear(a, b).sum((1, 2)))
