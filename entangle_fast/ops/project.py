"""project: per-sample gradients onto k directions, given or random."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import call
from . import check


@check.kinds
def project(a: Tensor, b: Tensor, basis: Tensor) -> Tensor:
    """<Σ_t b_it a_itᵀ, D_k>.  a (n,[t,]d_in), b (n,[t,]d_out), basis (k, d_out, d_in) → (n, k).

    Equivalent to: ``torch.einsum("nto,nti,koi->nk", b, a, basis)``
    """
    check.factors(a, b)
    check.require(basis.dim() == 3 and basis.shape[1:] == (b.shape[-1], a.shape[-1]),
                  f"basis: shape {tuple(basis.shape)}; needs (k, {b.shape[-1]}, {a.shape[-1]})")  # fmt: skip
    check.same_device(a=a, basis=basis)
    check.real(basis=basis)
    return call("project", a, b, basis)


@check.kinds
def project_conv(x: Tensor, g: Tensor, basis: Tensor, *, stride=1, padding=0, dilation=1, groups: int = 1) -> Tensor:
    """A convolution's per-sample weight gradients onto k directions.

    x (n,C_in,*size), g (n,C_out,*out), basis (k, C_out, C_in/groups, *kernel_size) =: (k, *shape) → (n, k).

    Equivalent to: ``G = torch.stack([torch.nn.grad.conv2d_weight(x_i, shape, g_i, stride, padding, dilation, groups)
    for x_i, g_i in zip(x[:, None], g[:, None])]).flatten(1); G @ basis.flatten(1).T`` for images
    """
    check.require(basis.dim() == x.dim() + 1, f"basis: shape {tuple(basis.shape)}; needs (k, C_out, C_in/groups, *kernel)")
    _, *shape = check.conv_arguments(x, g, list(basis.shape[3:]), stride, padding, dilation, groups)
    check.require(tuple(basis.shape[1:3]) == (g.shape[1], x.shape[1] // groups),
                  f"basis: channels {tuple(basis.shape[1:3])}; needs {(g.shape[1], x.shape[1] // groups)}")  # fmt: skip
    check.same_device(x=x, basis=basis)
    check.real(basis=basis)
    return call("project_conv", x, g, basis, *shape, groups)


@check.kinds
def project_embedding(ids: Tensor, b: Tensor, basis: Tensor, *, padding_idx: int | None = None) -> Tensor:
    """A lookup table's per-sample gradients onto k directions.  ids (n,t), b (n,t,d), basis (k, num_embeddings, d) → (n, k).

    Equivalent to: ``torch.einsum("ntd,kntd->nk", b, basis[:, ids])`` without padding_idx
    """
    check.lookup(ids, b)
    check.require(basis.dim() == 3 and basis.shape[2] == b.shape[2],
                  f"basis: shape {tuple(basis.shape)}; needs (k, num_embeddings, {b.shape[2]})")  # fmt: skip
    check.in_table(ids, basis.shape[1])
    check.same_device(ids=ids, basis=basis)
    check.real(basis=basis)
    return call("project_embedding", ids, b, basis, check.padding(padding_idx))


@check.kinds
def project_random(a: Tensor, b: Tensor, k: int, *, seed: int, offset: int = 0, kind: str = "sign") -> Tensor:
    """Per-sample gradients of a linear layer onto k random directions that are generated, not stored, (n, k).

    Args:
        a: (n, d_in) or (n, t, d_in).  b: (n, d_out) or (n, t, d_out), as in gram.  k: number of directions.
        kind: "sign" (±1) or "gaussian", as entangle_fast/reference/philox.py draws directions: the same numbers on every backend.
            One offset a layer: the sums over layers are then the projections of the whole gradients.

    Divided by √k, dot products of the rows estimate those of the gradients (Johnson & Lindenstrauss).

    Equivalent to: ``D = philox.directions(k, b.shape[-1] * a.shape[-1], seed, offset).view(k, b.shape[-1], a.shape[-1]);
    torch.einsum("nto,nti,koi->nk", b, a, D.to(a.dtype))`` for "sign", with philox from entangle_fast.reference

    >>> import torch, entangle_fast as ef
    >>> a, b = torch.randn(6, 20), torch.randn(6, 10)
    >>> sketch = ef.ops.project_random(a, b, 4096, seed=0) / 4096**0.5
    >>> gap = sketch @ sketch.T - ef.ops.gram(a, b)
    >>> bool(gap.norm() < 0.2 * ef.ops.gram(a, b).norm())
    True
    """
    check.factors(a, b)
    check.directions(k, seed, kind, offset)
    return call("project_random", a, b, k, seed, offset, kind)


@check.kinds
def project_random_conv(
    x: Tensor, g: Tensor, k: int, kernel_size, *, seed: int, stride=1, padding=0, dilation=1, groups: int = 1, offset: int = 0,
    kind: str = "sign",
) -> Tensor:  # fmt: skip
    """A convolution's per-sample weight gradients onto k random directions, (n, k); nothing is unfolded, no direction stored.

    x (n,C_in,*size), g (n,C_out,*out), and how they belong together as in gram_conv; k, seed, offset and kind as in project_random:
    elements are those of the weight (C_out, C_in/groups, *kernel_size) laid flat.

    Equivalent to: ``D = philox.directions(k, torch.Size(shape).numel(), seed, offset).view(k, *shape);
    project_conv(x, g, D, stride=stride, padding=padding, dilation=dilation, groups=groups)`` for "sign" and a weight of that shape
    """
    shape = check.conv_arguments(x, g, kernel_size, stride, padding, dilation, groups)
    check.directions(k, seed, kind, offset)
    return call("project_random_conv", x, g, k, *shape, groups, seed, offset, kind)


@check.kinds
def project_random_embedding(
    ids: Tensor, b: Tensor, k: int, num_embeddings: int, *, seed: int, offset: int = 0, kind: str = "sign", padding_idx: int | None = None
) -> Tensor:
    """A lookup table's per-sample gradients onto k random directions, (n, k); drawn are only the rows that ids name.

    ids (n,t), b (n,t,d); k, seed, offset and kind as in project_random: elements are those of the (num_embeddings, d) table laid flat.

    Equivalent to: ``D = philox.directions(k, num_embeddings * b.shape[2], seed, offset).view(k, num_embeddings, b.shape[2]);
    torch.einsum("ntd,kntd->nk", b, D[:, ids].to(b.dtype))`` for "sign" without padding_idx
    """
    check.lookup(ids, b)
    check.directions(k, seed, kind, offset)
    check.in_table(ids, num_embeddings)
    padding = check.padding(padding_idx)
    return call("project_random_embedding", ids, b, k, num_embeddings, seed, offset, kind, padding)
