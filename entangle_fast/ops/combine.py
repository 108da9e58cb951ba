"""combine: Σ_i w_i G_i, one weighted gradient for each row of w."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import call
from . import check


def _weights(w: Tensor, n: int) -> None:
    mend = ": give w[None]" if w.shape == (n,) else ""
    check.require(w.dim() == 2 and w.shape[1] == n, f"w: shape {tuple(w.shape)}; needs (m, {n}), one row per combination{mend}")
    check.real(w=w)


@check.kinds
def combine(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    """Weighted sums of a linear layer's per-sample gradients.  a (n,[t,]d_in), b (n,[t,]d_out), w (m,n) → (m,d_out,d_in).

    Equivalent to: ``torch.einsum("mn,nto,nti->moi", w, b, a)``
    """
    check.factors(a, b)
    _weights(w, a.shape[0])
    check.same_device(a=a, w=w)
    return call("combine", a, b, w)


@check.kinds
def combine_conv(
    x: Tensor, g: Tensor, w: Tensor, kernel_size, *, stride=1, padding=0, dilation=1, groups: int = 1
) -> Tensor:
    """Weighted sums of a convolution's per-sample weight gradients.

    x (n,C_in,*size), g (n,C_out,*out), w (m,n) → (m, C_out, C_in/groups, *kernel_size) =: (m, *shape).

    Equivalent to: ``torch.stack([torch.nn.grad.conv2d_weight(x, shape, v.view(-1, 1, 1, 1) * g, stride, padding, dilation, groups)
    for v in w])`` for images
    """
    shape = check.conv_arguments(x, g, kernel_size, stride, padding, dilation, groups)
    _weights(w, x.shape[0])
    check.same_device(x=x, w=w)
    return call("combine_conv", x, g, w, *shape, groups)


@check.kinds
def combine_embedding(
    ids: Tensor, b: Tensor, w: Tensor, num_embeddings: int, *, padding_idx: int | None = None
) -> Tensor:
    """Weighted sums of a lookup table's per-sample gradients.  ids (n,t), b (n,t,d), w (m,n) → (m, num_embeddings, d).

    Equivalent to: ``torch.stack([torch.zeros(num_embeddings, b.shape[2]).index_add(0, ids.flatten(), (v[:, None, None] * b).flatten(0, 1))
    for v in w])`` without padding_idx
    """
    check.lookup(ids, b)
    check.in_table(ids, num_embeddings)
    _weights(w, ids.shape[0])
    check.same_device(ids=ids, w=w)
    return call("combine_embedding", ids, b, w, num_embeddings, check.padding(padding_idx))
