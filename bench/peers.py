"""What the other libraries offer for the same jobs, each used as its documentation says; a missing one is left out."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F

warnings.filterwarnings("ignore", module="opacus|torchjd|torch.nn")


def losses_of(model, x, y):
    return F.cross_entropy(model(x).float(), y, reduction="none")


def plain(model, x, y):
    """Forward and backward of the mean loss: what one ordinary training step costs; the floor, not a Gram."""
    model.zero_grad(set_to_none=True)
    losses_of(model, x, y).mean().backward()


def ours(model, x, y):
    import entangle_fast as ef

    with ef.capture(model) as tape:
        losses = losses_of(model, x, y)
        tape.backward(losses, stream=("gram",))
    return tape.gram()


def ours_kept(model, x, y):
    """Factors kept, the Gram asked for afterwards."""
    import entangle_fast as ef

    with ef.capture(model) as tape:
        losses = losses_of(model, x, y)
        tape.backward(losses)
    return tape.gram()


def capture_only(model, x, y):
    """Forward and backward with the factors kept and no contraction."""
    import entangle_fast as ef

    with ef.capture(model) as tape:
        losses = losses_of(model, x, y)
        tape.backward(losses)


def _gram_of(grads):
    return sum(g.flatten(1).float() @ g.flatten(1).float().T for g in grads)


def vmap(model, x, y):
    from torch.func import functional_call, grad
    from torch.func import vmap as map_

    params = {k: p.detach() for k, p in model.named_parameters()}

    def one(p, xi, yi):
        return F.cross_entropy(functional_call(model, p, (xi[None],)).float(), yi[None])

    return _gram_of(map_(grad(one), in_dims=(None, 0, 0))(params, x, y).values())


def autograd_loop(model, x, y):
    params, losses = list(model.parameters()), losses_of(model, x, y)
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(l, params, retain_graph=True)]) for l in losses]
    G = torch.stack(rows)
    return G @ G.T


def opacus(model, x, y):
    from opacus import GradSampleModule

    wrapped = GradSampleModule(model, strict=False, loss_reduction="sum")
    try:
        losses_of(wrapped, x, y).sum().backward()
        return _gram_of([p.grad_sample for p in model.parameters()])
    finally:
        for p in model.parameters():
            p.grad_sample = None
        wrapped.to_standard_module()


def torchjd(model, x, y):
    from torchjd.autogram import Engine

    return Engine(model, batch_dim=0).compute_gramian(losses_of(model, x, y))


GRAM = {"ours": ours, "ours_kept": ours_kept, "capture_only": capture_only, "plain": plain, "vmap": vmap, "opacus": opacus,
        "torchjd": torchjd, "autograd_loop": autograd_loop}  # fmt: skip
NO_RESULT = ("plain", "capture_only")
NEEDS = {"opacus": "opacus", "torchjd": "torchjd", "pot": "ot", "geomloss": "geomloss"}


def there(provider: str) -> bool:
    from importlib.util import find_spec

    return provider not in NEEDS or find_spec(NEEDS[provider]) is not None
