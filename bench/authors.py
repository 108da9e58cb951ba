"""Entangled unlearning in plain autograd, the way the paper's released code is organised (methods.md §1): DataLoaders,
three gradients a step by autograd.grad, a forward through a frozen copy for the reference losses, inner products tensor by
tensor in double. The same samples in the same numbers as ours; what is compared with in test_jobs.py and demo_speed.py."""

from __future__ import annotations

import copy
import itertools

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset


def ce(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def dot(xs, ys):
    return sum(torch.dot(x.flatten().double(), y.flatten().double()) for x, y in zip(xs, ys))


def cycle(loader):
    return itertools.chain.from_iterable(itertools.repeat(loader))


def stage2_step(model, frozen, buffers, adjacent, forget, remote, *, alpha, lr, momentum, ridge=1e-8):
    """One step on given minibatches: adjacent (x, y); forget and remote lists of (x, y)."""
    params = list(model.parameters())

    def summed(batches, objective):
        total = [torch.zeros_like(p) for p in params]
        for x, y in batches:
            for t, g in zip(total, torch.autograd.grad(objective(x, y), params)):
                t += g
        return total

    def guided(x, y):
        losses = ce(model, x, y)
        with torch.no_grad():
            reference = ce(frozen, x, y)
        return (1 - alpha) * losses.mean() + alpha * (losses.sort().values - reference.sort().values).square().mean()

    g = torch.autograd.grad(ce(model, *adjacent).mean(), params)
    d1, d2 = summed(forget, guided), summed(remote, lambda x, y: ce(model, x, y).mean())
    for v, gi in zip(buffers, g):
        v.mul_(momentum).add_(gi)
    gram = torch.stack([torch.stack([dot(a, b) for b in (d1, d2)]) for a in (d1, d2)])
    gram += ridge * len(params) * torch.eye(2, dtype=torch.float64)
    c = torch.linalg.solve(gram, torch.stack([dot(d1, buffers), dot(d2, buffers)]))
    with torch.no_grad():
        for p, v, a, b in zip(params, buffers, d1, d2):
            v.sub_(c[0].float() * a + c[1].float() * b)
            p.sub_(lr * v)


def unlearn(model, train, c, seed=0):
    """Both stages of Entangled(away_from="means") with the options in `c`, in place."""
    torch.manual_seed(seed)
    model.eval()
    loader = lambda pair, size: DataLoader(TensorDataset(*pair), batch_size=min(size, len(pair[0])), shuffle=True, drop_last=False)  # noqa: E731
    with torch.no_grad():
        start = torch.cat([ce(model, x, y) for x, y in DataLoader(TensorDataset(*train.remote), batch_size=1024)]).mean()
    adam, multiplier = torch.optim.Adam(model.parameters(), lr=c.lr1), 0.0
    forget = cycle(loader(train.forget, c.forget_batch1))
    for _ in range(int(c.epochs1)):
        for (xr, yr), (xf, yf) in zip(loader(train.remote, c.remote_batch1), forget):
            losses = ce(model, xf, yf)
            h = ce(model, xr, yr).mean() - start
            adam.zero_grad()
            (-c.gamma * torch.where(losses < c.clip, losses, losses.detach()).mean() + multiplier * h + c.mu / 2 * h**2).backward()
            adam.step()
            multiplier += c.mu * h.item()
    adam.zero_grad(set_to_none=True)
    frozen = copy.deepcopy(model)
    buffers = [torch.zeros_like(p) for p in model.parameters()]
    forget, remote = cycle(loader(train.forget, c.forget_batch2)), cycle(loader(train.remote, c.remote_batch2))
    steps = -(-int(c.epochs2 * len(train.adjacent[0])) // c.adjacent_batch2)
    for _, adjacent in zip(range(steps), cycle(loader(train.adjacent, c.adjacent_batch2))):
        take = lambda batches: list(itertools.islice(batches, c.batch_limit))  # noqa: E731
        stage2_step(model, frozen, buffers, adjacent, take(forget), take(remote), alpha=c.alpha, lr=c.lr2, momentum=c.momentum)
    return model
