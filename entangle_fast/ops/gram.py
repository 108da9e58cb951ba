"""gram: inner products of per-sample gradients, from the layer factors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..dispatch import call
from . import check, cost

Layers = Sequence[tuple[Tensor, Tensor]]
ROUTES = ("auto", "rows", "pairs", "tiles")


@check.kinds
def gram(a: Tensor, b: Tensor, a2: Tensor | None = None, b2: Tensor | None = None, *, route: str = "auto") -> Tensor:
    """Gram of a linear layer's per-sample weight gradients G_i = Σ_t b_it a_itᵀ, without forming all of them.

    Args:
        a: (n, d_in) or (n, t, d_in), the layer's inputs.
        b: (n, d_out) or (n, t, d_out), gradients of the per-sample losses (seed 1 each) w.r.t. its outputs.
        a2, b2: the other side of a cross-Gram, m samples; None for the symmetric Gram at half the work.
        route: "rows" (t = 1), "pairs", "tiles", or "auto": the cost model of ops/cost.py decides.

    Returns: (n, m); float32 for float32, bfloat16 and float16 input, float64 for float64.

    Equivalent to: ``G = torch.einsum("nto,nti->noi", b, a).flatten(1); G @ G2.T``

    Raises: ValueError for shapes, devices or dtypes that do not go together.
    """
    check.factors(a, b)
    check.both_or_none(a2=a2, b2=b2)
    check.choice("route", route, ROUTES)
    if a2 is not None:
        check.factors(a2, b2, "a2 b2")
        check.same_device(a=a, a2=a2)
        check.same_dtype(a=a, a2=a2)
        check.require(a.shape[-1] == a2.shape[-1] and b.shape[-1] == b2.shape[-1],
                      f"a2, b2: widths {a2.shape[-1]}, {b2.shape[-1]} against {a.shape[-1]}, {b.shape[-1]} in a, b; "
                      "both sides must come from the same layer")  # fmt: skip
    t, s = (x.shape[1] if x.dim() == 3 else 1 for x in (a, a if a2 is None else a2))
    if route == "auto":
        m = a.shape[0] if a2 is None else a2.shape[0]
        route = cost.route(a.shape[0], m, t, s, a.shape[-1], b.shape[-1], a2 is None)
    check.require(route != "rows" or t == s == 1, f"route: 'rows' needs t = 1, got t = {t}, {s}; use 'pairs' or 'tiles'")
    return call("gram", a, b, a2, b2, route)


def _layers(name: str, layers: Layers, like: Layers) -> None:
    for l, layer in enumerate(layers):
        here = f"{name}[{l}]"
        if not (isinstance(layer, (tuple, list)) and len(layer) == 2):
            raise ValueError(f"{here}: got {type(layer).__name__}; needs a pair (a, b)")
        a, b = layer
        check.factors(a, b, f"{here}[0] {here}[1]")
        if a.dim() != 2:
            raise ValueError(f"{here}: shape {tuple(a.shape)}; needs one position, (n,d_in): use gram for more")
        if len(a) != len(layers[0][0]):
            raise ValueError(f"{here}: {len(a)} samples against {len(layers[0][0])} in {name}[0]; all layers need the same n")
        check.same_device(**{here: a, "layers[0]": like[0][0]})
        check.same_dtype(**{here: a, "layers[0]": like[0][0]})


@check.kinds
def gram_layers(layers: Layers, others: Layers | None = None) -> Tensor:
    """Gram of many linear layers' per-sample weight gradients, one position each: their row-form Grams, added up in one call.

    Args:
        layers: (a (n, d_in), b (n, d_out)) of each layer, as in gram; widths may differ, dtype and device may not.
        others: the other side of a cross-Gram, the same layers with m samples; None for the symmetric Gram at half the work.

    Returns: (n, m); float32 for float32, bfloat16 and float16 input, float64 for float64.

    Equivalent to: ``sum((a @ a2.T) * (b @ b2.T) for (a, b), (a2, b2) in zip(layers, others))``

    Raises: ValueError for no layer, and for shapes, devices or dtypes that do not go together.
    """
    check.require(len(layers) > 0, "layers: got none; needs the factors (a, b) of at least one layer")
    _layers("layers", layers, layers)
    if others is not None:
        check.require(len(others) == len(layers), f"others: {len(others)} layers against {len(layers)} in layers; needs as many")
        _layers("others", others, layers)
        for l, ((a, b), (a2, b2)) in enumerate(zip(layers, others)):
            if a.shape[1] != a2.shape[1] or b.shape[1] != b2.shape[1]:
                raise ValueError(f"others[{l}]: widths {a2.shape[1]}, {b2.shape[1]} against {a.shape[1]}, {b.shape[1]} in layers; "
                                 "both sides must come from the same layer")  # fmt: skip
    (a, b), (a2, b2) = zip(*layers), ((), ()) if others is None else zip(*others)
    return call("gram_layers", list(a), list(b), list(a2), list(b2))


@check.kinds
def gram_conv(
    x: Tensor, g: Tensor, kernel_size, *, stride=1, padding=0, dilation=1, groups: int = 1,
    x2: Tensor | None = None, g2: Tensor | None = None, route: str = "auto",
) -> Tensor:  # fmt: skip
    """Gram of a convolution's per-sample weight gradients, (n, m); 1 to 3 spatial sizes.

    Args:
        x: (n, C_in, *size), the layer's input.  g: (n, C_out, *out_size), gradients w.r.t. its output.
        kernel_size, stride, padding, dilation: integers or one per spatial size, as in torch's convolutions.
        x2, g2: the other side of a cross-Gram; None for the symmetric one.
        route: "pairs", "tiles" or "auto".

    Equivalent to: ``G = torch.stack([torch.nn.grad.conv2d_weight(x_i, shape, g_i, stride, padding, dilation, groups)
    for x_i, g_i in zip(x[:, None], g[:, None])]).flatten(1); G @ G.T`` for images, shape (C_out, C_in/groups, *kernel_size)

    Raises: ValueError for shapes, devices or dtypes that do not go together.
    """
    shape = check.conv_arguments(x, g, kernel_size, stride, padding, dilation, groups)
    check.both_or_none(x2=x2, g2=g2)
    check.choice("route", route, ("auto", "pairs", "tiles"))
    if x2 is not None:
        check.conv_arguments(x2, g2, kernel_size, stride, padding, dilation, groups)
        check.same_device(x=x, x2=x2)
        check.same_dtype(x=x, x2=x2)
        check.require(x.shape[1] == x2.shape[1] and g.shape[1] == g2.shape[1],
                      f"x2, g2: channels {x2.shape[1]}, {g2.shape[1]} against {x.shape[1]}, {g.shape[1]}")  # fmt: skip
    if route == "auto":
        width = x.shape[1] // groups
        for k in shape[0]:
            width *= k
        other = (x, g) if x2 is None else (x2, g2)
        t, s = g.shape[2:].numel(), other[1].shape[2:].numel()
        route = cost.route(x.shape[0], other[0].shape[0], t, s, width, g.shape[1] // groups, x2 is None)
        route = "pairs" if route == "rows" else route
    return call("gram_conv", x, g, *shape, groups, x2, g2, route)


@check.kinds
def gram_embedding(
    ids: Tensor, b: Tensor, ids2: Tensor | None = None, b2: Tensor | None = None, *, padding_idx: int | None = None
) -> Tensor:
    """Gram of a lookup table's per-sample gradients, (n, m): positions count where their ids are equal.

    Args:
        ids: (n, t) integers.  b: (n, t, d), gradients w.r.t. the looked-up rows.
        ids2, b2: the other side of a cross-Gram; None for the symmetric one.
        padding_idx: the row that carries no gradient, or None.

    Equivalent to: ``same = ids[:, None, :, None] == ids2[None, :, None, :]; torch.einsum("nmts,ntd,msd->nm", same.to(b.dtype), b, b2)``
    without padding_idx
    """
    check.lookup(ids, b)
    check.both_or_none(ids2=ids2, b2=b2)
    if ids2 is not None:
        check.lookup(ids2, b2, "ids2 b2")
        check.require(b.shape[-1] == b2.shape[-1], f"b2: width {b2.shape[-1]} against {b.shape[-1]} in b")
    return call("gram_embedding", ids, b, ids2, b2, check.padding(padding_idx))
