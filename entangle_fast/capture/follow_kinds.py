"""Followers of whole kinds of functions: elementwise, spatial, linear algebra, Fourier, losses; and what no follower knows.

A function that is in no list here or in follow.py may mix the samples in any way: where a gradient passes through it, the
samples are Lost. For data alone that costs nothing, and its result is taken by its sizes.
"""

from __future__ import annotations

from torch import Tensor

from .follow import FOLLOW, _broadcast, _cut, _joined, _kept, _same, by_axis, follows

# each entry of the result depends on the same entry of the inputs; their in-place forms too
ELEMENTWISE = frozenset("""
    abs absolute acos acosh alpha_dropout angle arccos arccosh arcsin arcsinh arctan arctanh asin asinh atan atanh bernoulli bfloat16
    bitwise_not bool bucketize byte ceil celu cfloat cdouble char clone conj conj_physical contiguous cos cosh cpu cuda data deg2rad
    detach digamma double dropout dropout1d dropout2d dropout3d elu empty_like erf erfc erfinv exp exp2 expm1
    feature_alpha_dropout feature_dropout fill fix float floor frac full_like gelu grad half hardshrink hardsigmoid
    hardswish hardtanh i0 imag int invert isfinite isinf isnan isneginf isposinf isreal leaky_relu lgamma log log10 log1p log2 log_sigmoid
    logical_not logit logsigmoid long mish multigammaln mvlgamma nan_to_num neg negative ones_like poisson polygamma positive
    quantize_per_tensor rad2deg rand_like randint_like randn_like real reciprocal relu relu6 requires_grad resolve_conj
    resolve_neg round rrelu rsqrt selu sgn short sigmoid sign signbit silu sin sinc sinh softplus softshrink softsign
    special_digamma special_entr special_erf special_erfc special_erfcx special_erfinv special_exp2 special_expit special_expm1
    special_gammaln special_i0 special_i0e special_i1 special_i1e special_log1p special_log_ndtr special_logit special_ndtr
    special_ndtri special_psi special_round special_sinc sqrt square tan tanh tanhshrink threshold tril triu trunc type zero
    zeros_like normal uniform exponential log_normal cauchy geometric random pin_memory share_memory retain_grad
    _threshold native_dropout xpu chalf special_polygamma special_multigammaln fake_quantize_per_channel_affine
    __abs__ __invert__ __neg__ __pos__ fake_quantize_per_tensor_affine view_as_real
""".split())  # fmt: skip
FOLLOW.update(dict.fromkeys(ELEMENTWISE, _kept))
FOLLOW.update(dict.fromkeys(
    "clip clamp_min clamp_max complex polar logaddexp2 ldexp float_power heaviside nextafter logical_xor bitwise_xor greater less "
    "greater_equal less_equal not_equal arctan2 special_xlogy special_xlog1py __rfloordiv__ __rmod__ __rdiv__ __iand__ __ior__ "
    "__ixor__ __lshift__ __rshift__ __rand__ __ror__ __rxor__ __ifloordiv__ __imod__ isclose fill_diagonal "
    "igamma igammac special_gammainc special_gammaincc bitwise_left_shift bitwise_right_shift "
    "soft_margin_loss poisson_nll_loss hinge_embedding_loss margin_ranking_loss kl_div gaussian_nll_loss".split(), _broadcast))  # fmt: skip


def unknown(c):
    """Data are placed by their sizes; a gradient through what is not known may mix the samples."""
    if any(x.requires_grad for x, _ in c.placed):
        return c.mixed("is not known to keep the samples apart; spell it with functions that are (matmul, einsum, sum, …), or "
                       "where it does say ef.capture(model, strict=False)")  # fmt: skip
    return _kept(c)


def _before_last(c, dims: int):
    """Works on the last ``dims`` dimensions of its operands; those before them are a batch."""
    if not _same(c, [p for _, p in c.placed]) and c.n > 1:
        return c.mixed("meets samples in different dimensions")
    if any(p.axis >= x.dim() - dims for x, p in c.placed):
        return c.mixed("goes over the samples")
    return _kept(c)


def _works_on(dims: int, *names: str):
    follows(*names)(lambda c: _before_last(c, dims))


_works_on(1, "pairwise_distance", "bilinear", "view_as_complex", "linalg_vecdot", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell",
          "max_pool1d", "max_pool1d_with_indices", "avg_pool1d", "adaptive_avg_pool1d", "adaptive_max_pool1d",
          "adaptive_max_pool1d_with_indices", "lp_pool1d", "triplet_margin_loss", "cosine_embedding_loss", "stft")  # fmt: skip
_works_on(2, "max_pool2d", "max_pool2d_with_indices", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d",
          "adaptive_max_pool2d_with_indices", "lp_pool2d", "fractional_max_pool2d", "fractional_max_pool2d_with_indices", "max_unpool1d",
          "linalg_inv", "inverse", "linalg_pinv", "pinverse", "linalg_solve", "linalg_lstsq", "linalg_qr", "qr", "linalg_svd", "svd",
          "linalg_svdvals", "linalg_eigh", "linalg_eigvalsh", "linalg_eig", "linalg_eigvals", "linalg_cholesky", "cholesky",
          "linalg_det", "det", "linalg_slogdet", "slogdet", "logdet", "linalg_matrix_exp", "matrix_exp", "linalg_matrix_power",
          "matrix_power", "linalg_matrix_rank", "linalg_solve_triangular", "triangular_solve", "cholesky_solve", "linalg_lu",
          "linalg_inv_ex", "linalg_cholesky_ex", "linalg_lu_factor", "linalg_lu_solve",
          "istft", "diag_embed", "trace")  # fmt: skip
_works_on(3, "max_pool3d", "max_pool3d_with_indices", "avg_pool3d", "adaptive_avg_pool3d", "adaptive_max_pool3d",
          "adaptive_max_pool3d_with_indices", "lp_pool3d", "max_unpool2d", "pixel_shuffle", "pixel_unshuffle")  # fmt: skip
_works_on(4, "max_unpool3d")


@follows("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "conv_tbc", "group_norm",
         "instance_norm", "interpolate", "upsample", "upsample_nearest", "upsample_bilinear", "local_response_norm", "grid_sample",
         "affine_grid", "fold", "channel_shuffle", "embedding_bag", "multi_margin_loss", "multilabel_margin_loss",
         "multilabel_soft_margin_loss", "sample_loss", "linear_sample_loss")  # fmt: skip
def _one_a_row(c):
    """Each entry of dimension 0 on its own, all other dimensions together; a weight made from the batch is none."""
    if any(p.axis or x.dim() < 2 and c.name != "affine_grid" for x, p in c.placed[:1]) or not _same(c, [p for _, p in c.placed]):
        return c.mixed("goes over the samples")
    if c.name == "conv_tbc" or c.name.startswith("conv") and (len(c.placed) > 1 or c.x.dim() != int(c.name[-2]) + 2):
        return c.mixed("takes a weight or channels from the samples")
    return _kept(c)


@follows("embedding", "batch_norm", "prelu", "one_hot")
def _entry_by_entry(c):
    """Any dimension may be the samples'; a table or weight made from the batch is none."""
    own = c.args[0] if c.args else c.kwargs.get("input")
    if c.name == "embedding":  # torch's own takes the table first
        own = next(x for x in (*c.args, *c.kwargs.values()) if isinstance(x, Tensor) and not x.is_floating_point())
    if len(c.placed) > 1 or c.x is not own:
        return c.mixed("takes a weight from the samples")
    return c.place


@follows("linear")
def _linear(c):
    place = _entry_by_entry(c)
    return place if place is not c.place else _before_last(c, 1)


@follows("cross_entropy", "nll_loss")
def _classes(c):
    """Dimension 1 counts the classes, or the only one."""
    if any(p.axis == min(1, x.dim() - 1) for x, p in c.placed if x.dim() == max(z.dim() for z, _ in c.placed)):
        if c.x.dim() > 1 or c.y.dim() == 0:
            return c.mixed("goes over the samples")
    return _kept(c)


@follows("inner")
def _inner(c):
    if not all(x.dim() for x in c.args):
        return _broadcast(c)
    if len(c.placed) > 1 or c.place.axis == c.x.dim() - 1:
        return c.mixed("adds up over the samples, or pairs them")
    return c.place if c.x is c.args[0] else c.place.at(c.args[0].dim() - 1 + c.place.axis)


@follows("scaled_dot_product_attention")
def _attended(c):
    """Queries, keys and values are (…, positions, d)."""
    if any(x.dim() - p.axis < 3 for x, p in c.placed) and c.n > 1:
        return c.mixed("lets the samples attend to each other")
    return _broadcast(c)


@follows("pad", "constant_pad_nd")
def _padded(c):
    sides = c.kwargs.get("pad", c.args[1] if len(c.args) > 1 else ())
    before = c.x.dim() - 1 - c.place.axis
    if any(sides[2 * before : 2 * before + 2]):
        return c.lost("adds rows to the batch")
    return c.place


@follows("unfold")
def _windows(c):
    if c.y.dim() == c.x.dim() + 1:  # Tensor.unfold(dimension, size, step), not F.unfold of images
        dim = c.kwargs.get("dimension", c.args[1] if len(c.args) > 1 else 0)
        return c.lost("takes some of the samples out") if dim % c.x.dim() == c.place.axis else c.place
    return c.mixed("goes over the samples") if c.place.axis or c.x.dim() < 4 else c.place


# where a function's dim stands among its arguments, and what it is when not given; None: all dimensions
_DIMENSIONS = {
    **{f"fft_{name}{end}": (2, default) for name in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")
       for end, default in (("", -1), ("2", (-2, -1)), ("n", None))},
    "fft_fftshift": (1, None), "fft_ifftshift": (1, None), "linalg_vector_norm": (2, None), "linalg_norm": (2, None),
    "linalg_matrix_norm": (2, (-2, -1)), "quantile": (2, None), "nanquantile": (2, None), "glu": (1, -1), "linalg_cross": (2, -1),
    "cross": (2, None), "flipud": (9, 0), "fliplr": (9, 1), "msort": (9, 0), "rot90": (2, (0, 1)), "trapezoid": (2, -1),
    "cumulative_trapezoid": (2, -1),
}  # fmt: skip


@follows(*_DIMENSIONS)
def _over_dimensions(c):
    """Along named dimensions, or all of them."""
    position, default = _DIMENSIONS[c.name]
    dim = by_axis(c.args, c.kwargs, position, c.x.dim(), default)
    along = range(c.x.dim()) if dim is None else (dim,) if isinstance(dim, int) else dim
    if any(p.axis in along for _, p in c.placed):
        return c.mixed("goes over the samples")
    if c.name == "rot90" or c.y.dim() >= c.x.dim() or len(c.placed) > 1:
        return _kept(c)
    return c.place.at(c.place.axis - sum(d < c.place.axis for d in along))


@follows("renorm")
def _renormed(c):
    """Each slice of ``dim`` as a whole."""
    return c.place if by_axis(c.args, c.kwargs, 2, c.x.dim()) == c.place.axis else c.mixed("goes over the samples")


@follows("cdist")
def _distances(c):
    tails = [x.dim() - p.axis for x, p in c.placed]
    if all(t >= 3 for t in tails):
        return _broadcast(c)
    if len(c.placed) > 1 or tails[0] != 2 or c.args[0] is c.args[1]:
        return c.mixed("pairs samples with others")
    return c.place.at(c.y.dim() - (2 if c.x is c.args[0] else 1))


@follows("diagonal")
def _on_the_diagonal(c):
    offset, first, second = (c.kwargs.get(k, c.args[i] if len(c.args) > i else d)
                             for i, (k, d) in enumerate((("offset", 0), ("dim1", 0), ("dim2", 1)), 1))  # fmt: skip
    pair = {first % c.x.dim(), second % c.x.dim()}
    if c.place.axis in pair:
        return c.lost("takes some of the samples out") if offset or c.y.shape[-1] != c.n else c.place.at(c.y.dim() - 1)
    return c.place.at(c.place.axis - sum(d < c.place.axis for d in pair))


_STACKS = {"vstack": 0, "row_stack": 0, "hstack": 1, "dstack": 2, "column_stack": 1}


@follows(*_STACKS)
def _side_by_side(c):
    if any(x.dim() != c.x.dim() for x, _ in c.placed):
        return c.lost("joins tensors of several shapes")
    if c.name in ("vstack", "row_stack", "dstack") and c.x.dim() == 1:
        return c.place.at(1)
    dim = 0 if c.name == "hstack" and c.x.dim() == 1 else _STACKS[c.name]
    if c.x.dim() <= dim:  # a new dimension behind the others
        return _kept(c)
    c.args, c.kwargs = (c.args[0], dim), {}
    return _joined(c)


@follows("hsplit", "vsplit", "dsplit")
def _cut_at(c):
    c.args = (c.args[0], c.args[1], {"hsplit": min(1, c.x.dim() - 1), "vsplit": 0, "dsplit": 2}[c.name])
    return _cut(c)


@follows("broadcast_tensors")
def _broadcast_together(c):
    given = c.args[0] if len(c.args) == 1 and isinstance(c.args[0], (tuple, list)) else c.args
    place = next((p for x, p in c.placed if x is given[c.k]), None)
    return place and place.at(c.y.dim() - (given[c.k].dim() - place.axis))


@follows("meshgrid")
def _grid(c):
    given = c.args[0] if len(c.args) == 1 and isinstance(c.args[0], (tuple, list)) else c.args
    at = [k for k, x in enumerate(given) if any(x is z for z, _ in c.placed)]
    if len(at) > 1:
        return c.mixed("pairs samples with others")
    swapped = c.kwargs.get("indexing", "ij") == "xy" and at[0] < 2
    return c.place.at(1 - at[0] if swapped else at[0]) if given[c.k].dim() else c.place


def follower(name: str):
    """By name; an in-place form as its function."""
    known = FOLLOW.get(name)
    if known is None and name.endswith("_") and not name.endswith("__"):
        known = FOLLOW.get(name[:-1])
    return known or unknown

