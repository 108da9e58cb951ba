"""Where every dimension has as many entries as there are samples, only following them tells which one counts them."""

import pytest
import torch
import torch.nn.functional as F
from oracle import close
from torch import nn
from zoo import lively

import entangle_fast as ef

N = 3
ONES, THREE = torch.ones(N, dtype=torch.bool), torch.tensor([0.2, 0.5, 0.8]).double()
MASK = torch.tensor([[True, True, True], [False] * 3, [False] * 3])
ORDER, ONE = torch.tensor([2, 0, 1]), torch.tensor(1)
WIDE = torch.randn(N, 1, N, generator=torch.Generator().manual_seed(2)).double()
CLASSES = torch.tensor([[[0, 1, 2], [2, 2, 1], [0, 0, 1]]] * N)
FIRST, LAST = (nn.MultiheadAttention(N, 1, batch_first=first).double().eval().requires_grad_(False) for first in (True, False))


def attended(layer, h):
    return layer(h, h, h)[0]


# h (n, n, n, n) or what is made of it; the dimension of the result that counts the samples, None: refused wherever they are sought
FUNCTIONS = {
    "flip": (0, lambda h: h.flip(2, 1)),
    "flip, samples too": (None, lambda h: h.flip(1, 0)),
    "diag_embed": (1, lambda h: torch.diag_embed(h[:, 0, 0], dim1=0, dim2=2)),
    "diag_embed, first": (2, lambda h: torch.diag_embed(h[:, 0], dim1=0, dim2=1)),
    "quantile": (1, lambda h: torch.quantile(h[:, 0, 0], THREE, 1)),
    "nanquantile, kept": (1, lambda h: torch.nanquantile(h[:, 0], THREE, dim=1, keepdim=True)),
    "cosine_similarity": (0, lambda h: F.cosine_similarity(h.transpose(0, 1), h.transpose(0, 1).exp(), dim=0)),
    "cosine_similarity, broadcast": (None, lambda h: F.cosine_similarity(h[:, 0, 0], WIDE, dim=-1)),
    "pairwise_distance, broadcast": (None, lambda h: F.pairwise_distance(h[:, 0, 0], WIDE)),
    "vecdot": (0, lambda h: torch.linalg.vecdot(h.transpose(0, 1), h.transpose(0, 1).exp(), dim=0)),
    "vecdot, broadcast": (None, lambda h: torch.linalg.vecdot(h[:, 0, 0], WIDE)),
    "solve, broadcast": (None, lambda h: torch.linalg.solve(torch.eye(N).double().expand(N, 1, N, N), h[:, 0])),
    "mask of two dimensions": (1, lambda h: h.permute(1, 2, 0, 3)[MASK]),
    "mask and an integer": (0, lambda h: h[:, 0, :, ONES]),
    "mask and a new dimension": (2, lambda h: h.transpose(0, 1)[None, ONES]),
    "integer and a list": (0, lambda h: h[:, 0, :, ORDER]),
    "0-d index and a list": (0, lambda h: h[:, ONE, :, ORDER]),
    "two lists": (1, lambda h: h[:, ORDER, :, ORDER]),
    "truth value": (None, lambda h: h[True]),
    "mm by names": (None, lambda h: torch.mm(mat2=h[:, 0, 0], input=WIDE[:, 0])),
    "addmm, added and multiplied": (None, lambda h: torch.addmm(z := h[:, 0, 0], WIDE[:, 0], z)),
    "addmm, first": (0, lambda h: torch.addmm(z := h[:, 0, 0], z, WIDE[:, 0])),
    "gather by names": (0, lambda h: torch.gather(input=h[:, 0, 0], dim=1, index=ORDER.expand(N, N))),
    "outer by names": (0, lambda h: torch.outer(input=h[:, 0, 0, 0], vec2=THREE)),
    "inner by names": (0, lambda h: torch.inner(input=h[:, 0, 0], other=WIDE[:, 0])),
    "cdist by names": (1, lambda h: torch.cdist(x2=h[:, 0, 0], x1=WIDE[:, 0])),
    "layer_norm": (None, lambda h: F.layer_norm(h, (N,), h[:, 0, 0, 0])),
    "rms_norm": (None, lambda h: F.rms_norm(h, (N,), h[:, 0, 0, 0])),
    "group_norm": (None, lambda h: F.group_norm(h, 1, h[:, 0, 0, 0])),
    "instance_norm": (None, lambda h: F.instance_norm(h, weight=h[:, 0, 0, 0])),
    "cross_entropy": (1, lambda h: F.cross_entropy(h.permute(1, 2, 0, 3), CLASSES, reduction="none")),
    "attention": (0, lambda h: attended(FIRST, h[:, 0])),
    "attention, samples taken for positions": (None, lambda h: attended(LAST, h[:, 0])),
    "attention, no batch": (None, lambda h: attended(FIRST, h[:, 0, 0])),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_exact_or_refused(name):
    axis, function = FUNCTIONS[name]
    model, x = lively(nn.Linear(N, N)), torch.randn(N, N, N, N).double()

    def losses(d):
        y = function(model(x).tanh())
        return y.square().movedim(d, 0).flatten(1).sum(1)

    for d in range(function(model(x)).dim()):
        if d != axis:
            with pytest.raises((ef.CaptureError, ValueError), match="sample"), ef.capture(model) as tape:
                tape.backward(losses(d))
            continue
        with ef.capture(model) as tape:
            tape.backward(losses(d))
        rows = [torch.cat([g.flatten() for g in torch.autograd.grad(each, list(model.parameters()), retain_graph=True)])
                for each in losses(d)]  # fmt: skip
        close(tape.gram(), torch.stack(rows) @ torch.stack(rows).T, 1e-10, "gram")
