"""Followers of whole kinds of functions: elementwise, spatial, linear algebra, Fourier; which follower serves a name, and what none knows.

A function that has no follower in follow*.py may mix the samples in any way: where a gradient passes through it, the
samples are Lost. For data alone that costs nothing, and its result is taken by its sizes.
"""

from __future__ import annotations

from torch import Tensor

from . import follow_index, follow_layers, follow_products, follow_shapes  # noqa: F401  (each fills FOLLOW)
from .follow import FOLLOW, _before_last, _broadcast, _kept, _same, _widened, by_axis, follows

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


def _works_on(dims: int, *names: str):
    follows(*names)(lambda c: _before_last(c, dims))


_works_on(1, "pairwise_distance", "bilinear", "view_as_complex", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell",
          "max_pool1d", "max_pool1d_with_indices", "avg_pool1d", "adaptive_avg_pool1d", "adaptive_max_pool1d",
          "adaptive_max_pool1d_with_indices", "lp_pool1d", "triplet_margin_loss", "cosine_embedding_loss", "stft")  # fmt: skip
_works_on(2, "max_pool2d", "max_pool2d_with_indices", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d",
          "adaptive_max_pool2d_with_indices", "lp_pool2d", "fractional_max_pool2d", "fractional_max_pool2d_with_indices", "max_unpool1d",
          "linalg_inv", "inverse", "linalg_pinv", "pinverse", "linalg_solve", "linalg_lstsq", "linalg_qr", "qr", "linalg_svd", "svd",
          "linalg_svdvals", "linalg_eigh", "linalg_eigvalsh", "linalg_eig", "linalg_eigvals", "linalg_cholesky", "cholesky",
          "linalg_det", "det", "linalg_slogdet", "slogdet", "logdet", "linalg_matrix_exp", "matrix_exp", "linalg_matrix_power",
          "matrix_power", "linalg_matrix_rank", "linalg_solve_triangular", "triangular_solve", "cholesky_solve", "linalg_lu",
          "linalg_inv_ex", "linalg_cholesky_ex", "linalg_lu_factor", "linalg_lu_solve",
          "istft", "trace")  # fmt: skip
_works_on(3, "max_pool3d", "max_pool3d_with_indices", "avg_pool3d", "adaptive_avg_pool3d", "adaptive_max_pool3d",
          "adaptive_max_pool3d_with_indices", "lp_pool3d", "max_unpool2d", "pixel_shuffle", "pixel_unshuffle")  # fmt: skip
_works_on(4, "max_unpool3d")

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
    if _widened(c):
        return c.lost("broadcasts the samples to more dimensions")
    if not _same(c, [p for _, p in c.placed]) and c.n > 1:
        return c.mixed("meets samples in different dimensions")
    q = c.kwargs.get("q", c.args[1] if len(c.args) > 1 else None) if c.name in ("quantile", "nanquantile") else None
    before = q.dim() if isinstance(q, Tensor) else 0  # several quantiles stand first
    gone = 0 if c.y.dim() - before == c.x.dim() else sum(d < c.place.axis for d in along)
    return c.place.at(before + c.place.axis - gone)


@follows("diag_embed")
def _on_a_new_diagonal(c):
    ends = (c.kwargs.get(k, c.args[i] if len(c.args) > i else d) for i, (k, d) in enumerate((("dim1", -2), ("dim2", -1)), 2))
    pair = {d % c.y.dim() for d in ends}
    if c.place.axis == c.x.dim() - 1:
        return c.mixed("goes over the samples")
    return c.place.at([d for d in range(c.y.dim()) if d not in pair][c.place.axis])


@follows("renorm")
def _renormed(c):
    """Each slice of ``dim`` as a whole."""
    return c.place if by_axis(c.args, c.kwargs, 2, c.x.dim()) == c.place.axis else c.mixed("goes over the samples")


def follower(name: str):
    """By name; an in-place form as its function."""
    known = FOLLOW.get(name)
    if known is None and name.endswith("_") and not name.endswith("__"):
        known = FOLLOW.get(name[:-1])
    return known or unknown
