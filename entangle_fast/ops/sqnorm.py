"""sqnorm: squared norms of per-sample gradients, the diagonal of the Gram at its own cost."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import call
from . import check


def sqnorm(a: Tensor, b: Tensor) -> Tensor:
    """‖Σ_t b_it a_itᵀ‖² for each sample.  a (n,[t,]d_in), b (n,[t,]d_out) → (n,).

    Equivalent to: ``torch.einsum("nto,nti->noi", b, a).square().sum((1, 2))``
    """
    check.factors(a, b)
    return call("sqnorm", a, b)


def sqnorm_conv(x: Tensor, g: Tensor, kernel_size, *, stride=1, padding=0, dilation=1, groups: int = 1) -> Tensor:
    """Squared norms of a convolution's per-sample weight gradients.  x (n,C_in,*size), g (n,C_out,*out) → (n,)."""
    shape = check.conv_arguments(x, g, kernel_size, stride, padding, dilation, groups)
    return call("sqnorm_conv", x, g, *shape, groups)


def sqnorm_embedding(ids: Tensor, b: Tensor, *, padding_idx: int | None = None) -> Tensor:
    """Squared norms of a lookup table's per-sample gradients.  ids (n,t), b (n,t,d) → (n,)."""
    check.lookup(ids, b)
    return call("sqnorm_embedding", ids, b, -1 if padding_idx is None else padding_idx)
