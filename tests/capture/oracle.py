"""Per-sample gradients by plain autograd, one sample's loss at a time, and the comparison of a tape with them."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import entangle_fast as ef


@dataclass
class Case:
    """A model, how to draw a batch for it, and how it turns one into losses (n,)."""

    model: nn.Module | dict
    batch: Callable[[int], dict]
    losses: Callable[[nn.Module | dict, dict], Tensor]
    n: int = 4
    m: int = 3
    options: dict = field(default_factory=dict)


def trainable(model) -> dict[str, Tensor]:
    named = model.named_parameters() if isinstance(model, nn.Module) else model.items()
    return {name: p for name, p in named if p.requires_grad}


def per_sample(case: Case, batch: dict) -> dict[str, Tensor]:
    """Name → (n, *shape)."""
    params = trainable(case.model)
    losses = case.losses(case.model, batch)
    rows = [torch.autograd.grad(loss, list(params.values()), retain_graph=True, allow_unused=True) for loss in losses]
    return {name: torch.stack([torch.zeros_like(p) if r[i] is None else r[i] for r in rows])
            for i, (name, p) in enumerate(params.items())}  # fmt: skip


def flat(grads: dict[str, Tensor]) -> Tensor:
    """(n, P) in float64."""
    return torch.cat([g.reshape(len(g), g[0].numel()).double() for g in grads.values()], 1)


def tape_of(case: Case, batch: dict, **how):
    with ef.capture(case.model, **case.options) as tape:
        tape.backward(case.losses(case.model, batch), **how)
    return tape


def close(got: Tensor, want: Tensor, rtol: float, what: str) -> None:
    scale = want.abs().max().item() if want.numel() else 0.0
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, needs {tuple(want.shape)}"
    gap = (got.double() - want).abs().max().item() if want.numel() else 0.0
    assert gap <= rtol * scale + 1e-300, f"{what}: off by {gap:.3g} at scale {scale:.3g}"


def agree(case: Case, rtol: float = 1e-10) -> None:
    """Every question a tape answers, against autograd."""
    one, two = case.batch(case.n), case.batch(case.m)
    grads = per_sample(case, one)
    g, h = flat(grads), flat(per_sample(case, two))
    assert g.abs().max() > 0
    tape, other = tape_of(case, one), tape_of(case, two)
    assert tape.names == list(grads)
    found = tape.per_sample()
    for name, want in grads.items():
        assert found[name].shape == want.shape
        gap = (found[name].double() - want.double()).abs().max().item() if want.numel() else 0.0
        assert gap <= rtol * max(g.abs().max().item(), 1e-300), f"per-sample gradient of {name}: off by {gap:.3g}"
    close(tape.gram(), g @ g.T, rtol, "gram")
    close(tape.gram(other), g @ h.T, rtol, "cross-gram")
    close(other.gram(tape), h @ g.T, rtol, "cross-gram, other way")
    close(tape.sqnorms(), g.square().sum(1), rtol, "sqnorms")
    generator = torch.Generator().manual_seed(5)
    directions = [[torch.randn(p.shape, generator=generator).to(p.dtype) for p in tape.params] for _ in range(2)]
    rows = torch.stack([torch.cat([d.flatten().double() for d in ds]) for ds in directions])
    close(tape.project(directions), g @ rows.T, max(rtol, rtol * 10), "project")
    w = torch.randn(3, case.n, generator=generator, dtype=torch.float64).to(g.dtype)
    answers = tape.combine(w)
    for k in range(3):
        close(torch.cat([x.flatten() for x in answers[k]]), w[k] @ g, rtol, "combine (m, n)")
    close(torch.cat([x.flatten() for x in tape.combine(w[0])]), w[0] @ g, rtol, "combine (n,)")
    stream = tape_of(case, one, stream=("gram", "sqnorms", "combine"), weights=w[1])
    close(stream.gram(), g @ g.T, rtol, "streamed gram")
    close(stream.sqnorms(), g.square().sum(1), rtol, "streamed sqnorms")
    close(torch.cat([x.flatten() for x in stream.combine()]), w[1] @ g, rtol, "streamed combine")
