"""Lists of tensors, the same on one flat vector in float64, and optimisers beside torch's."""

import pytest
import torch

from entangle_fast.optim import ProjectedAdamW, ProjectedMomentum

F64 = torch.float64
SHAPES = [(4, 3), (5,), (2, 1, 3)]


def tensors(seed, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=F64).to(dtype) for s in SHAPES]


def flat(ts):
    return torch.cat([t.flatten() for t in ts]).double()


def span(directions, ridge=0.0):
    """The matrix P_V, by an SVD; with a ridge Dᵀ(DDᵀ + ridge)⁻¹D."""
    d = torch.stack([flat(x) for x in directions])
    if ridge:
        return d.T @ torch.linalg.inv(d @ d.T + ridge * torch.eye(len(d), dtype=F64)) @ d
    u = torch.linalg.svd(d, full_matrices=False)
    basis = u.Vh[u.S > 1e-7 * u.S[0]]
    return basis.T @ basis


MAKES = [lambda p, **o: ProjectedAdamW(p, **o), lambda p, **o: ProjectedMomentum(p, **{"lr": 1e-3} | o)]
BOTH = pytest.mark.parametrize("make", MAKES, ids=["adamw", "momentum"])


def pair(make, dtype=F64):
    """Ours, and the one of torch's that it is without directions, on the same parameters in two groups."""
    own, theirs = tensors(0, dtype), tensors(0, dtype)
    mine = make([{"params": own[:2]}, {"params": own[2:], "lr": 0.02}])
    torchs = torch.optim.AdamW if isinstance(mine, ProjectedAdamW) else lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9)
    return own, mine, theirs, torchs([{"params": theirs[:2]}, {"params": theirs[2:], "lr": 0.02}])


def stepped(own, mine, theirs, plain, steps, waits=lambda i, k: False):
    for k in range(steps):
        for i, (p, q, g) in enumerate(zip(own, theirs, tensors(k + 1))):
            p.grad, q.grad = (None, None) if waits(i, k) else (g, g.clone())
        mine.step(), plain.step()
