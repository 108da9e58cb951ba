"""sqnorm: squared norms of per-sample gradients, the diagonal of the Gram at its own cost."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import call
from . import check


@check.kinds
def sqnorm(a: Tensor, b: Tensor) -> Tensor:
    """‖Σ_t b_it a_itᵀ‖² for each sample.  a (n,[t,]d_in), b (n,[t,]d_out) → (n,).

    Equivalent to: ``torch.einsum("nto,nti->noi", b, a).square().sum((1, 2))``
    """
    check.factors(a, b)
    return call("sqnorm", a, b)


@check.kinds
def sqnorm_conv(x: Tensor, g: Tensor, kernel_size, *, stride=1, padding=0, dilation=1, groups: int = 1) -> Tensor:
    """Squared norms of a convolution's per-sample weight gradients.  x (n,C_in,*size), g (n,C_out,*out) → (n,).

    Equivalent to: ``torch.stack([torch.nn.grad.conv2d_weight(x_i, shape, g_i, stride, padding, dilation, groups)
    for x_i, g_i in zip(x[:, None], g[:, None])]).square().flatten(1).sum(1)`` for images, shape (C_out, C_in/groups, *kernel_size)
    """
    shape = check.conv_arguments(x, g, kernel_size, stride, padding, dilation, groups)
    return call("sqnorm_conv", x, g, *shape, groups)


@check.kinds
def sqnorm_embedding(ids: Tensor, b: Tensor, *, padding_idx: int | None = None) -> Tensor:
    """Squared norms of a lookup table's per-sample gradients.  ids (n,t), b (n,t,d) → (n,).

    Equivalent to: ``torch.einsum("nts,ntd,nsd->n", (ids[:, :, None] == ids[:, None]).to(b.dtype), b, b)`` without padding_idx
    """
    check.lookup(ids, b)
    return call("sqnorm_embedding", ids, b, check.padding(padding_idx))
