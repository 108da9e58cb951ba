"""What the models of the zoo are made of."""


import torch
import torch.nn.functional as F
from oracle import Case
from torch import nn

ZOO = {}


def zoo(fn):
    ZOO[fn.__name__] = fn
    return fn


def lively(module: nn.Module) -> nn.Module:
    """float64, eval, and no parameter or statistic at a value that hides an error (0 or 1)."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
        for m in module.modules():
            if getattr(m, "running_mean", None) is not None:
                m.running_mean.normal_(generator=generator)
                m.running_var.uniform_(0.5, 2, generator=generator)
    return module.double().eval()


def squares(y: torch.Tensor) -> torch.Tensor:
    """Some loss per sample."""
    y = y.flatten(1)
    return (y * torch.linspace(-1, 1, y.shape[1], dtype=y.dtype)).sum(1).sin() + y.square().mean(1)


def simple(model: nn.Module, *shape: int, **options) -> Case:
    """A model of one float tensor (n, *shape)."""
    return Case(
        lively(model), lambda n: {"x": torch.randn(n, *shape, dtype=torch.float64)},
        lambda net, b: squares(net(b["x"])), **options,
    )  # fmt: skip


def tokens(model: nn.Module, t: int = 5, vocab: int = 11, **options) -> Case:
    """A language model: ids (n, t) → logits (n, t, vocab)."""
    def losses(net, b):
        logits = net(b["ids"])
        each = F.cross_entropy(logits[:, :-1].flatten(0, 1), b["ids"][:, 1:].flatten(), reduction="none")
        return each.view(len(b["ids"]), -1).mean(1)

    return Case(lively(model), lambda n: {"ids": torch.randint(0, vocab, (n, t))}, losses, **options)


class Via(nn.Module):
    """A module from a function of (self, x) and submodules or parameters."""

    def __init__(self, fn, **members):
        super().__init__()
        self.fn = fn
        for name, value in members.items():
            setattr(self, name, value)

    def forward(self, *args, **kwargs):
        return self.fn(self, *args, **kwargs)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(0.5 * torch.randn(shape))
