"""Small models and sets that the tests of methods and of the job share."""

import torch
from torch import nn

from entangle_fast.methods.data import Data

CLASSES, D = 4, 6


def samples(n, seed, labels, dtype=torch.float32):
    """n points around a centre for each label, overlapping."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.tensor(labels)[torch.arange(n) % len(labels)]
    centres = 2 * torch.randn(CLASSES, D, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return (centres[y] + torch.randn(n, D, generator=generator, dtype=torch.float64)).to(dtype), y


def sets(dtype=torch.float32, forget=20, adjacent=24, remote=44):
    return {
        "forget": samples(forget, 1, [0], dtype),
        "adjacent": samples(adjacent, 2, [1], dtype),
        "remote": samples(remote, 3, [2, 3], dtype),
    }


def data(seed=0, dtype=torch.float32, **sizes):
    return Data.of(**sets(dtype, **sizes), device="cpu", seed=seed)


def net(dtype=torch.float32, seed=0):
    """Smooth, so that orders of convergence are clean; with a frozen weight and BatchNorm statistics of its own."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(D, 10), nn.BatchNorm1d(10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, CLASSES)
    )  # fmt: skip
    model[1].running_mean.uniform_(-0.5, 0.5), model[1].running_var.uniform_(0.5, 2)
    model[3].weight.requires_grad_(False)
    return model.to(dtype).eval()


def trained(dtype=torch.float32, steps=60):
    model = net(dtype)
    x, y = (torch.cat([s[i] for s in sets(dtype).values()]) for i in (0, 1))
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    for _ in range(steps):
        adam.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        adam.step()
    adam.zero_grad()
    return model


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
