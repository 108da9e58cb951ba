"""Random directions as an operation draws them: its projections of per-sample gradients that hold a single 1."""

import torch

from entangle_fast.reference import philox

COUNTS = (1, 3, 31, 33, 127, 128, 129, 300)  # within a word, a block, beyond
STREAM = (-(2**62) - 5, 2**40 + 3)  # seed, offset


def linear(d_out, d_in):
    """a, b: sample e has gradient 1 at element e of the weight."""
    return torch.eye(d_in).repeat(d_out, 1), torch.eye(d_out).repeat_interleave(d_in, 0)


def conv(c_out, c_in, kernel, groups=1):
    """x, g: sample e has gradient 1 at element e of every group's part of the weight."""
    a, b = linear(c_out // groups, c_in // groups * torch.Size(kernel).numel())
    x = torch.cat([a.view(len(a), c_in // groups, *kernel)] * groups, 1)
    return x, torch.cat([b] * groups, 1).view(len(b), c_out, *[1] * len(kernel))


def lookup(table, d):
    return torch.arange(table).repeat_interleave(d).unsqueeze(1), torch.eye(d).repeat(table, 1).unsqueeze(1)


def directions(k, numel, kind):
    """(numel, k): what a linear layer or a table is to find."""
    return philox.directions(k, numel, *STREAM, kind).T


def assert_drawn(found, want, kind):
    """Signs to the bit; logarithm, sine and cosine differ by the last places of float32."""
    close = dict(rtol=0, atol=0) if kind == "sign" else dict(rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(found.float(), want, **close)
