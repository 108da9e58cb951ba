"""project: per-sample gradients onto k directions, given or random."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import call
from . import check


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


def project_conv(x: Tensor, g: Tensor, basis: Tensor, *, stride=1, padding=0, dilation=1, groups: int = 1) -> Tensor:
    """x (n,C_in,*size), g (n,C_out,*out), basis (k, C_out, C_in/groups, *kernel_size) → (n, k)."""
    check.require(basis.dim() == x.dim() + 1, f"basis: shape {tuple(basis.shape)}; needs (k, C_out, C_in/groups, *kernel)")
    _, *shape = check.conv_arguments(x, g, list(basis.shape[3:]), stride, padding, dilation, groups)
    check.require(tuple(basis.shape[1:3]) == (g.shape[1], x.shape[1] // groups),
                  f"basis: channels {tuple(basis.shape[1:3])}; needs {(g.shape[1], x.shape[1] // groups)}")  # fmt: skip
    check.same_device(x=x, basis=basis)
    check.real(basis=basis)
    return call("project_conv", x, g, basis, *shape, groups)


def project_embedding(ids: Tensor, b: Tensor, basis: Tensor, *, padding_idx: int | None = None) -> Tensor:
    """ids (n,t), b (n,t,d), basis (k, num_embeddings, d) → (n, k)."""
    check.lookup(ids, b)
    check.require(basis.dim() == 3 and basis.shape[2] == b.shape[2],
                  f"basis: shape {tuple(basis.shape)}; needs (k, num_embeddings, {b.shape[2]})")  # fmt: skip
    check.in_table(ids, basis.shape[1])
    check.same_device(ids=ids, basis=basis)
    check.real(basis=basis)
    return call("project_embedding", ids, b, basis, -1 if padding_idx is None else padding_idx)


def project_random(a: Tensor, b: Tensor, k: int, *, seed: int, offset: int = 0, kind: str = "sign") -> Tensor:
    """Per-sample gradients of a linear layer onto k random directions that are generated, not stored, (n, k).

    kind: "sign" (±1) or "gaussian", from Philox stream (seed, offset): the same numbers on every backend.
    """
    check.factors(a, b)
    check.require(k >= 0, f"k: got {k}; needs a number of directions >= 0")
    check.choice("kind", kind, ("sign", "gaussian"))
    return call("project_random", a, b, k, seed, offset, kind)
