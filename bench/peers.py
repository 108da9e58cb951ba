"""What the other libraries offer for the same jobs, each used as its documentation says; a missing one is left out.

In a venv of their own that sees the packages of .venv, so that none of them moves torch or brings a torchvision that does
not fit it (POT and geomloss alone are in the extra ``bench``):

    python -m venv peers && realpath .venv/lib/python3*/site-packages > $(echo peers/lib/python3*/site-packages)/main.pth
    peers/bin/pip install --no-deps opacus torchjd backpack-for-pytorch einops unfoldNd opt_einsum POT geomloss
    make bench BENCH_PYTHON=peers/bin/python

A function here takes a model and a batch and gives a call. What a library does once before a training loop (wrapping the
model, building an engine, compiling) is done once, on a copy, and not timed.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import entangle_fast as ef

warnings.filterwarnings("ignore", module="opacus|torchjd|backpack|torch.nn")


def losses_of(model, x, y):
    return F.cross_entropy(model(x).float(), y, reduction="none")


# ---- ours, and the floor ----


def plain(model, x, y):
    """Forward and backward of the mean loss: what one ordinary training step costs; the floor, not a Gram."""

    def call():
        model.zero_grad(set_to_none=True)
        losses_of(model, x, y).mean().backward()

    return call


def captured(model, x, y, stream=()):
    with ef.capture(model) as tape:
        losses = losses_of(model, x, y)
        tape.backward(losses, stream=stream)
    return tape


def capture_only(model, x, y):
    """Forward and backward with the factors kept and no contraction."""
    return lambda: captured(model, x, y) and None


# ---- per-sample gradients: a call gives a list of tensors (n, *shape), one a parameter ----


def vmap_grads(model, x, y):
    from torch.func import functional_call, grad, vmap

    params = {k: p.detach() for k, p in model.named_parameters()}

    def one(p, xi, yi):
        return F.cross_entropy(functional_call(model, p, (xi[None],)).float(), yi[None])

    return lambda: list(vmap(grad(one), in_dims=(None, 0, 0))(params, x, y).values())


def loop_grads(model, x, y):
    """One backward for each sample."""
    params = list(model.parameters())

    def call():
        rows = [torch.autograd.grad(losses_of(model, xi[None], yi[None]).sum(), params) for xi, yi in zip(x, y)]
        return [torch.stack(parts) for parts in zip(*rows)]

    return call


def handed_over(model, field):
    """The per-sample gradients that a library left on the parameters, which keep them no longer: 12 GB stay behind otherwise
    while the next provider has its turn."""
    grads = [getattr(p, field) for p in model.parameters()]
    for p in model.parameters():
        delattr(p, field)
    return grads


def opacus_grads(model, x, y):
    from opacus import GradSampleModule

    wrapped = GradSampleModule(copy.deepcopy(model), strict=False, loss_reduction="sum")

    def call():
        wrapped.zero_grad(set_to_none=True)
        losses_of(wrapped, x, y).sum().backward()
        return handed_over(wrapped, "grad_sample")

    return call


def backpack_grads(model, x, y):
    from backpack.extensions import BatchGrad

    return _backpack(model, x, y, BatchGrad(), "grad_batch")


def _backpack(model, x, y, extension, field):
    from backpack import backpack, extend

    extended = extend(copy.deepcopy(model))

    def call():
        extended.zero_grad(set_to_none=True)
        with backpack(extension):
            losses_of(extended, x, y).sum().backward()
        return handed_over(extended, field)

    return call


GRADS = {"vmap": vmap_grads, "autograd_loop": loop_grads, "opacus": opacus_grads, "backpack": backpack_grads}


# ---- Grams (n, n), squared norms (n,) ----


def gram_of(grads, others=None) -> Tensor:
    rows = lambda gs: [g.flatten(1).float() for g in gs]  # noqa: E731
    grads = rows(grads)
    return sum(g @ h.T for g, h in zip(grads, rows(others) if others is not None else grads))


def sqnorms_of(grads) -> Tensor:
    return sum(g.flatten(1).float().square().sum(1) for g in grads)


def _then(of: Callable, source: Callable) -> Callable:
    def build(model, x, y):
        grads = source(model, x, y)
        return lambda: of(grads())

    return build


def torchjd_gram(model, x, y):
    from torchjd.autogram import Engine

    model = copy.deepcopy(model)  # the engine hooks its modules
    batched = not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())  # it refuses those
    engine = Engine(model, batch_dim=0 if batched else None)
    return lambda: engine.compute_gramian(losses_of(model, x, y))


def compiled(f: Callable) -> Callable:
    torch.compiler.reset()  # each job's shapes are compiled for; past a limit of them torch would run eagerly instead
    return torch.compile(f, dynamic=False)


def compiled_gram(model, x, y):
    """torch.compile of the vmap form."""
    grads = vmap_grads(model, x, y)
    return compiled(lambda: gram_of(grads()))


def ghost_sqnorms(model, x, y):
    """Opacus' ghost clipping: norms from the layers' factors where it has a rule, from one layer's gradients elsewhere."""
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(copy.deepcopy(model), strict=False, loss_reduction="sum", use_ghost_clipping=True)

    def call():
        wrapped.zero_grad(set_to_none=True)
        losses_of(wrapped, x, y).sum().backward()
        return wrapped.get_norm_sample().square()

    return call


def opacus_sqnorms(model, x, y):
    grads = opacus_grads(model, x, y)

    def call():  # as its DPOptimizer does
        norms = [g.reshape(len(g), -1).norm(2, dim=-1) for g in grads()]
        return torch.stack(norms, 1).norm(2, dim=1).square()

    return call


def backpack_sqnorms(model, x, y):
    from backpack.extensions import BatchL2Grad

    norms = _backpack(model, x, y, BatchL2Grad(), "batch_l2")
    return lambda: sum(norms())


FLOOR = {"plain": plain, "capture_only": capture_only}
GRAM = {
    "ours": lambda m, x, y: lambda: captured(m, x, y, ("gram",)).gram(),
    "ours_kept": lambda m, x, y: lambda: captured(m, x, y).gram(),  # factors kept, the Gram asked for afterwards
    **FLOOR, **{name: _then(gram_of, source) for name, source in GRADS.items()},
    "torchjd": torchjd_gram, "compile": compiled_gram,
}  # fmt: skip
SQNORMS = {
    "ours": lambda m, x, y: lambda: captured(m, x, y, ("sqnorms",)).sqnorms(),
    **FLOOR, "vmap": _then(sqnorms_of, vmap_grads), "autograd_loop": _then(sqnorms_of, loop_grads),
    "opacus": opacus_sqnorms, "ghost": ghost_sqnorms, "backpack": backpack_sqnorms,
}  # fmt: skip
