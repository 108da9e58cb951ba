import pytest
import torch

from entangle_fast import reference

# (n, t, d_in, d_out, k): against the factors, by tiles, both sides swapped in tiles, directions in more than one round
SHAPES = [(7, 1, 5, 3, 2), (33, 1, 70, 130, 40), (9, 3, 1, 1, 1), (5, 16, 37, 150, 33), (6, 40, 150, 33, 64), (40, 9, 12, 257, 35),
          (3, 8, 6, 5, 1030), (2, 1, 3, 300_000, 2), (0, 2, 3, 4, 2), (4, 2, 3, 4, 0), (4, 0, 3, 4, 2)]  # fmt: skip


@pytest.mark.parametrize("n,t,d_in,d_out,k", SHAPES)
def test_onto_given_directions(cpp, assert_as_good, dtype, n, t, d_in, d_out, k):
    a, b, basis = (torch.randn(*s).to(dtype) for s in ((n, t, d_in), (n, t, d_out), (k, d_out, d_in)))
    assert_as_good(cpp.project(a, b, basis), reference.project(a, b, basis), reference.project(a.double(), b.double(), basis.double()))


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
def test_onto_drawn_directions(cpp, assert_as_good, dtype, kind, n, t, d_in, d_out, k):
    a, b = torch.randn(n, t, d_in).to(dtype), torch.randn(n, t, d_out).to(dtype)
    rest = (k, 2**33 + 7, 5, kind)
    ours, plain, truth = cpp.project_random(a, b, *rest), reference.project_random(a, b, *rest), None
    truth = reference.project_random(a.double(), b.double(), *rest)
    if kind == "gaussian":  # drawn in float32 on every backend: logarithm and sine differ by units in the last place
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-4 * float(truth.abs().max()) if truth.numel() else 0)
    else:
        assert_as_good(ours, plain, truth)


def test_threads_do_not_matter_beyond_rounding(cpp):
    a, b, basis, before = torch.randn(50, 12, 64), torch.randn(50, 12, 200), torch.randn(64, 200, 64), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append((cpp.project(a, b, basis), cpp.project_random(a, b, 64, 3)))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*found):
        assert (one - other).norm() <= 1e-6 * one.norm()
