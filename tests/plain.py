"""Plain PyTorch's own error, for the rule that every backend is held to: at most twice that."""

import sys
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from entangle_fast import reference

ROOMS = ("combine", "gram", "project", "sample_loss", "sqnorm", "w2", "per_sample")


@contextmanager
def plain_precision():
    """The reference as plain PyTorch: computed in the dtype of its input, nothing accumulated wider."""
    rooms = [sys.modules[f"{reference.__name__}.{name}"] for name in ROOMS]
    kept = [room.accumulate_dtype for room in rooms]
    for room in rooms:
        room.accumulate_dtype = lambda *xs: xs[0].dtype
    try:
        yield
    finally:
        for room, old in zip(rooms, kept):
            room.accumulate_dtype = old


def far_logits(shape, dtype, level, smoothing):
    """Logits about a level, labels, and their cross-entropies: plain PyTorch's in float32 (float64 for float64), and in float64."""
    logits, target = (torch.randn(shape) * 3 + level).to(dtype), torch.randint(0, shape[-1], shape[:-1])
    wide = logits.float() if dtype != torch.float64 else logits

    def each(x):
        return F.cross_entropy(x, target, reduction="none", label_smoothing=smoothing)

    return logits, target, each(wide), each(logits.double())


def loss_gradients(logits, target, w, smoothing=0.0):
    """∂/∂logits of Σ w_i CE_i by autograd: plain PyTorch's in float32 (float64 for float64), and in float64."""
    wide = logits.float() if logits.dtype != torch.float64 else logits

    def of(x):
        x = x.detach().clone().requires_grad_()
        each = F.cross_entropy(x, target, reduction="none", label_smoothing=smoothing)
        return torch.autograd.grad(each, x, w.to(each.dtype))[0]

    return of(wide).to(logits.dtype), of(logits.double())


def infinite_loss():
    """Logits (2, 3) and labels of which the first costs an infinite CE, and the gradient by plain PyTorch."""
    logits, target = torch.tensor([[-torch.inf, 0.0, 1.0], [0.5, -1.0, 2.0]]), torch.tensor([0, 1])
    return logits, target, loss_gradients(logits, target, torch.ones(2))[0]
