"""What the tests of methods that take SGD steps share: a plain run to compare with, and a run that is cut in two."""

import torch
import torch.nn.functional as F
from small import data, flat, trained

from entangle_fast import storage
from entangle_fast.methods.process import sample_cross_entropy

F64 = torch.float64


def begin(config, dtype=F64, model=None, sets=None):
    model = trained(dtype) if model is None else model
    return config.start(model, data(dtype=dtype) if sets is None else sets, sample_cross_entropy, 0)


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def gradient(value, model):
    """Flat gradient (P,) of a scalar."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, trainable(model))])


def each_gradient(model, x, y):
    """(n, P): one backward a sample."""
    return torch.stack([gradient(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), model) for i in range(len(x))])


def put(model, vector):
    with torch.no_grad():
        for p, part in zip(trainable(model), vector.split([p.numel() for p in trainable(model)])):
            p.copy_(part.view(p.shape))


def retain_batch(d, k, size):
    """24 adjacent and 44 remote samples: a batch in that proportion, adjacent first."""
    near = round(size * len(d.adjacent) / (len(d.adjacent) + len(d.remote)))
    parts = [d.adjacent.batch(k, near), d.remote.batch(k, size - near)]
    return torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts])


def forget_batch(d, k, size):
    return d.forget.batch(k, size)[1:]


def clipped_gradient(model, x, y, clip):
    """Of the mean loss, samples at or beyond clip left out of the sum."""
    losses = F.cross_entropy(model(x), y, reduction="none")
    return gradient(torch.where(losses < clip, losses, losses.detach()).mean(), model)


def follow(config, direction, steps=5, model=trained, sets=None, tolerance=1e-9):
    """The process, beside θ ← θ − η·clipped direction(model, data, k) from the same start, momentum as in torch's SGD."""
    process, other = begin(config, model=model(F64), sets=sets), model(F64)
    start = flat(other)
    theta, buffer = start.clone(), torch.zeros_like(start)
    for k in range(steps):
        process.step()
        g = direction(other, process.data, k)
        if config.max_norm:
            g = g * min(1.0, config.max_norm / (g.norm().item() + 1e-6))  # torch's own clipping
        buffer = config.momentum * buffer + g
        theta = theta - config.lr * buffer
        put(other, theta)
    assert (theta - start).norm() > 1e-3
    gap = (flat(process.model) - theta).norm() / (theta - start).norm()
    assert gap < tolerance, gap
    return process


def resumes_to_the_bit(config, folder, dtype=torch.float32, steps=6, cut=3, model=trained, sets=None):
    whole, first = (begin(config, dtype, model(dtype), sets) for _ in range(2))
    rows = [whole.step() for _ in range(steps)]
    assert whole.total >= steps
    for _ in range(cut):
        first.step()
    weights = {f"model.{k}": v for k, v in first.model.state_dict().items()}
    storage.save_tensors(folder / "state.safetensors", {**first.state(), **weights})
    kept = storage.load_tensors(folder / "state.safetensors")
    other = model(dtype)
    put(other, torch.zeros_like(flat(other)))
    second = begin(config, dtype, other, sets)
    other.load_state_dict({k[6:]: v for k, v in kept.items() if k.startswith("model.")})
    second.done = cut
    second.load({k: v for k, v in kept.items() if not k.startswith("model.")})
    again = [second.step() for _ in range(steps - cut)]
    assert torch.equal(flat(whole.model), flat(second.model))
    assert [{k: float(v) for k, v in r.items() if k != "stage"} for r in rows[cut:]] == [
        {k: float(v) for k, v in r.items() if k != "stage"} for r in again]  # fmt: skip
    return whole, second
