"""One step of each method in plain autograd: what a user would write without this library, on the same batches.

Per-sample gradients come from torch.func's vmap(grad) and stand side by side, spans go through QR, a look-ahead clones the
parameters, noise is drawn tensor by tensor. Each function takes a process (for its model, batches and configuration) and the
step's number and changes the parameters of ``process.model`` as that process' own step does; method_steps.py times both.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from authors import ce, dot
from torch.func import functional_call, grad, jvp, vmap

from entangle_fast.methods import pgu


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def split(vector, params):
    return [v.view(p.shape) for v, p in zip(vector.split([p.numel() for p in params]), params)]


def per_sample(model, x, y):
    """(n, P)."""
    params = {k: p.detach() for k, p in model.named_parameters()}

    def one(p, xi, yi):
        return F.cross_entropy(functional_call(model, p, (xi[None],)), yi[None])

    return torch.cat([g.flatten(1) for g in vmap(grad(one), (None, 0, 0))(params, x, y).values()], 1)


def retain_batch(process, k):
    parts = [s.batch(k, size) for s, size in process.data.retain_sizes(process.config.retain_batch)]
    return torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts])


def forget_batch(process, k):
    return process.data.forget.batch(k, process.config.batch)[1:]


def clipped(losses, clip):
    return torch.where(losses < clip, losses, losses.detach()).mean()


def descend(process, direction):
    """The update that the SGD methods share, from the first step's empty momentum."""
    c, params = process.config, process.params
    norm = math.sqrt(sum(g.double().square().sum() for g in direction))
    scale = min(1.0, c.max_norm / (norm + 1e-6)) if c.max_norm else 1.0
    with torch.no_grad():
        for p, g in zip(params, direction):
            p.sub_(c.lr * scale * g)


def autograd(process, value):
    return torch.autograd.grad(value, process.params)


def orthograd(process, k):
    c, model = process.config, process.model
    g_r = per_sample(model, *retain_batch(process, k))
    g_f = flat(autograd(process, clipped(ce(model, *forget_batch(process, k)), c.clip)))
    q = torch.linalg.qr(g_r.T).Q
    descend(process, split(c.alpha * g_r.mean(0) - (1 - c.alpha) * (g_f - q @ (q.T @ g_f)), process.params))


def woodbury(process, k):
    c, model = process.config, process.model
    g = per_sample(model, *retain_batch(process, k))
    v = c.alpha * g.mean(0) - (1 - c.alpha) * flat(autograd(process, clipped(ce(model, *forget_batch(process, k)), c.clip)))
    small = len(g) * c.damping * torch.eye(len(g), dtype=torch.float64) + (g @ g.T).double()
    away = torch.linalg.solve(small, (g @ v).double()).to(g.dtype)
    descend(process, split((v - g.T @ away) / c.damping, process.params))


def geometric(process, k):
    c, model = process.config, process.model
    x, y = retain_batch(process, k)
    losses = ce(model, x, y)
    u = torch.stack([flat(torch.autograd.grad(part.mean(), process.params, retain_graph=True)) for part in losses.tensor_split(c.groups)])
    mean = flat(autograd(process, losses.mean()))
    g_f = (1 - c.alpha) * flat(autograd(process, clipped(ce(model, *forget_batch(process, k)), c.clip)))
    raw = c.alpha * mean - g_f
    h = 1 / (raw.abs() + c.eps)  # the first step's √v̂
    free = g_f - u.T @ torch.linalg.solve((u * h).double() @ u.double().T, (u * h).double() @ g_f.double()).to(g_f.dtype)
    descend(process, split(h * (c.alpha * mean - free), process.params))


def rosu(process, k):
    c, model, params = process.config, process.model, process.params
    g_f = autograd(process, clipped(ce(model, *forget_batch(process, k)), c.clip))
    x, y = retain_batch(process, k)
    g_r = autograd(process, ce(model, x, y).mean())
    along = float(dot(g_f, g_r) / dot(g_r, g_r))
    free = [f - along * r for f, r in zip(g_f, g_r)]
    norm = float(dot(free, free).sqrt())
    before = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, d in zip(params, free):
            p.add_(d, alpha=c.rho / norm)
    there = autograd(process, ce(model, x, y).mean())
    with torch.no_grad():
        for p, b in zip(params, before):
            p.copy_(b)
    descend(process, [t - c.amplify / norm * d for t, d in zip(there, free)])


def lookahead(process, k):
    """order 1: the parameters are cloned for the look-ahead; order 2: H v by jvp over grad, from the start."""
    c, model, params = process.config, process.model, process.params
    xf, yf = forget_batch(process, k)
    x, y = retain_batch(process, k)
    g = autograd(process, ce(model, x, y).mean())
    before = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, d in zip(params, g):
            p.sub_(d, alpha=c.alpha)
    ahead = autograd(process, -clipped(ce(model, xf, yf), c.clip))
    with torch.no_grad():
        for p, b in zip(params, before):
            p.copy_(b)
    if c.order == 2:
        at = {name: p.detach() for name, p in model.named_parameters()}
        loss = lambda q: F.cross_entropy(functional_call(model, q, (x,)), y)  # noqa: E731
        curved = jvp(grad(loss), (at,), (dict(zip(at, ahead)),))[1].values()
        ahead = [a - c.alpha * h for a, h in zip(ahead, curved)]
    descend(process, [r + c.lam * a for r, a in zip(g, ahead)])


def influence(process, k):
    """joint: two forwards and backwards, then decay, noise and update tensor by tensor."""
    c, model, params, d = process.config, process.model, process.params, process.data
    parts = [s.batch(k, size) for s, size in d.retain_sizes(c.batch)]
    retain = autograd(process, ce(model, *(torch.cat([p[i] for p in parts]) for i in (1, 2))).mean())
    forget = autograd(process, clipped(ce(model, *d.forget.batch(k, c.forget_batch)[1:]), c.clip))
    with torch.no_grad():
        for p, r, f in zip(params, retain, forget):
            unit = p.square().mean().sqrt()
            p.mul_(1 - c.lr * c.omega).sub_(r - c.gamma * f, alpha=c.lr)
            if c.sigma:
                p.add_(torch.randn_like(p) * unit, alpha=math.sqrt(c.lr) * c.sigma)


def ssd(process, k):
    """The squares of one batch of per-sample gradients, added up; nothing moves yet."""
    name, rows = process.chunks[k]
    x, y = getattr(process.data, name).take(rows)
    found = split(per_sample(process.model, x, y).square().sum(0), process.params)
    torch._foreach_add_(process.squares["forget" if name == "forget" else "retain"], found)


def pgu_bases(process):
    """Every layer's inputs kept (patches unfolded) and taken apart by SVD, as the paper describes it; weight → M."""
    kept: dict = {}

    def keep(layer, inputs):
        a = inputs[0].detach()
        if isinstance(layer, torch.nn.Conv2d):
            a = F.unfold(a, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT.flatten(0, 1)
        kept.setdefault(layer, []).append(a)

    hooks = [layer.register_forward_pre_hook(keep) for layer in pgu.projectable(process.model)]
    with torch.no_grad():
        for _, x, _ in itertools.chain(*(s.chunks() for s in process.data.retain)):
            process.model(x)
    for hook in hooks:
        hook.remove()
    found = {}
    for layer, parts in kept.items():
        _, s, vh = torch.linalg.svd(torch.cat(parts), full_matrices=False)
        rank = int((s.cumsum(0) / s.sum() <= process.config.share).sum()) + 1
        found[id(layer.weight)] = vh[:rank].T
    return found


def entangled_samples(process, k):
    """Stage 2 away from every forget sample's gradient and the remote mean: forget gradients formed, one QR."""
    c, model, params, d = process.config, process.model, process.params, process.data
    g = autograd(process, ce(model, *d.adjacent.batch(k, c.adjacent_batch2)[1:]).mean())
    norm = math.sqrt(float(dot(g, g)))
    g = flat(g) * min(1.0, c.max_norm2 / norm)
    remote = flat(autograd(process, ce(model, *d.remote.batch(k, c.remote_batch2)[1:]).mean()))
    rows, x, y = d.forget.batch(k, c.forget_batch2)
    span = torch.cat([per_sample(model, x, y), remote[None]])
    moved = c.momentum * flat(process.sgd.buffers) + g
    q, r = torch.linalg.qr(span.T)
    q = q[:, r.diagonal().abs() > len(span) * torch.finfo(r.dtype).eps * r.diagonal().abs().max()]
    v = split(moved - q @ (q.T @ moved), params)
    with torch.no_grad():
        for p, b, new in zip(params, process.sgd.buffers, v):
            b.copy_(new)
            p.sub_(c.lr2 * new)
