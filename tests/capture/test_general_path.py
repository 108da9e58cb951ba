"""strict=False through torch.func.vmap: wherever the samples stand, and bags of embeddings. A wrong gradient must be an error."""

import pytest
import torch
import torch.nn.functional as F
from oracle import Case, agree, tape_of
from torch import nn
from zoo import Via, lively, simple, squares, weight

import entangle_fast as ef

N = 4


def ids(x):
    """(n, t, d) → (n, t), of 4 rows."""
    return (x[..., 0] > 0).long() * 2 + (x[..., 1] > 0).long()


def bag(mode="sum", **how):
    return nn.EmbeddingBag(4, 3, mode=mode, **how)


# what weighs the ids of a bag: data, an activation, a table, a parameter
BAGS = {
    "data": (lambda s, x: s.m(ids(x), per_sample_weights=x[..., 1]), {}),
    "activation": (lambda s, x: s.m(ids(x), per_sample_weights=s.w(x)[..., 0]), dict(w=nn.Linear(6, 1))),
    "table": (lambda s, x: s.m(ids(x), per_sample_weights=s.w(ids(x))[..., 0]), dict(w=nn.Embedding(4, 1))),
    "parameter": (lambda s, x: s.m(ids(x), per_sample_weights=s.w.expand(len(x), 5)), dict(w=weight(5))),
    "by keywords": (lambda s, x: F.embedding_bag(weight=s.m.weight, input=ids(x), mode="sum", per_sample_weights=x[..., 1]), {}),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", BAGS)
def test_bags_with_weights(name, frozen):
    forward, members = BAGS[name]
    model = Via(lambda s, x: forward(s, x * s.scale), m=bag().requires_grad_(not frozen), scale=weight(6), **members)
    agree(simple(model, 5, 6, options={"strict": False}))


@pytest.mark.parametrize("how", [dict(mode="mean", padding_idx=1), dict(mode="max")])
def test_bags_of_other_kinds(how):
    agree(simple(Via(lambda s, x: s.m(ids(x)), m=bag(**how)), 5, 6, options={"strict": False}))


def test_infinite_values_and_nan_are_no_mixture():
    """As of masks: what is neither is compared as ever."""
    def forward(s, x):
        y = torch.where(x > 1, -torch.inf, torch.where(x < -1, torch.nan, x)).masked_fill(x.abs() < 0.5, s.w)
        return torch.where(y.isfinite(), y, 0)

    agree(simple(Via(forward, w=nn.Parameter(torch.tensor(1.5))), 5, 6, options={"strict": False}))


@pytest.mark.parametrize("size, dtype", [(1, torch.float64), (6e4, torch.float16), (1e20, torch.float32), (1e-30, torch.float32)])
def test_a_mixture_of_samples_of_any_size(size, dtype):
    """conv_tbc passes over its first dimension, where the samples stand here; squares of such values are infinite or zero."""
    model = Via(lambda s, x: torch.conv_tbc(x, s.w, s.b, 1), w=weight(3, 6, 6), b=nn.Parameter(torch.zeros(6))).to(dtype)
    x = (size * torch.rand(N, 50, 6, dtype=torch.float64) / 12).to(dtype)
    with pytest.raises(ef.CaptureError, match="conv_tbc: it gives other values for the batch"), ef.capture(model, strict=False):
        model(x)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("share", [0.05, 0.002])
@pytest.mark.parametrize("dtype, autocast", [(torch.bfloat16, False), (torch.float16, False), (torch.float32, True)])
def test_a_mixture_that_rounding_to_16_bits_would_hide(dtype, autocast, share):
    """Each sample takes up a share of its neighbour."""
    w = torch.eye(6).expand(3, 6, 6) * torch.tensor([share, 1.0, 0.0])[:, None, None]
    model = Via(lambda s, x: torch.conv_tbc(x, s.w, s.b, 1), w=nn.Parameter(w.clone()), b=nn.Parameter(torch.zeros(6))).to(dtype)
    with pytest.raises(ef.CaptureError, match="conv_tbc: it gives other values for the batch"), ef.capture(model, strict=False), \
            torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # fmt: skip
        model(torch.randn(N, 50, 6).to(dtype))


@torch.library.custom_op("test_general_path::halved", mutates_args=())
def halved(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    if x.dtype == torch.float32:
        raise TypeError("halved: takes 16-bit numbers alone")
    return x * w / 2


halved.register_vmap(lambda info, dims, x, w: (halved(x.movedim(dims[0], 0), w.movedim(dims[1], 0)[:, None, None]), 0))
halved.register_autograd(
    lambda ctx, g: (g * ctx.saved_tensors[1] / 2, (g * ctx.saved_tensors[0] / 2).sum_to_size(ctx.saved_tensors[1].shape)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
IN_16_BITS = {
    "bilinear": (nn.Bilinear(6, 6, 2), lambda s, x: s.m(x[:, 0], x[:, 1])),
    "cdist": (nn.Linear(6, 3), lambda s, x: torch.cdist(x.float(), s.m.weight.float()).to(x.dtype)),
    "cosine": (weight(6), lambda s, x: F.cosine_similarity(x, s.m, dim=2)),
    "gru_cell": (nn.GRUCell(6, 2), lambda s, x: s.m(x[:, 0])),
    "embedding_bag": (bag(), lambda s, x: s.m(ids(x))),
    "conv_transpose1d": (nn.ConvTranspose1d(5, 2, 3), lambda s, x: s.m(x)),
    "a write": (weight(6), lambda s, x: x.clone().masked_fill_(x > 1, s.m[0])),
    "another library's": (weight(6), lambda s, x: torch.ops.test_general_path.halved(x, s.m)),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", IN_16_BITS)
def test_rounding_to_16_bits_is_no_mixture(name, dtype):
    member, forward = IN_16_BITS[name]
    model, x = Via(forward, m=member).to(dtype), torch.randn(64, 5, 6).to(dtype)
    with ef.capture(model, strict=False) as tape:
        tape.backward(squares(model(x).float()))
    assert tape.gram().isfinite().all() and tape.gram().any()


SAME = lambda s, x: x[:, 0, :2] @ s.m(torch.arange(4).view(2, 2))  # noqa: E731  the same bags for every sample
REFUSED = {
    "scale_grad_by_freq": (bag("mean", scale_grad_by_freq=True), lambda s, x: s.m(ids(x)), "max_norm and scale_grad_by_freq make an"),
    "max_norm": (bag(max_norm=1.0), lambda s, x: s.m(ids(x)), "max_norm and scale_grad_by_freq make an"),
    "sparse": (bag(sparse=True), lambda s, x: s.m(ids(x)), "embedding_bag with sparse=True; .*; unset it"),
    "sparse, the same bags": (bag(sparse=True), SAME, "embedding_bag with sparse=True; .*; unset it"),
    "weights of the samples": (bag(), lambda s, x: s.m(ids(x), per_sample_weights=s.m.other), "embedding_bag: torch.func.vmap cannot"),
    "offsets": (bag(), lambda s, x: s.m(ids(x).flatten(), torch.arange(0, 5 * N, 5)), "embedding_bag: positions are folded into the dim"),
    "bags of positions": (bag(), lambda s, x: s.m(ids(x[:, :N]).T), "embedding_bag: it gives other values for the batch than for each"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bags_without_a_gradient_for_each_sample(name):
    member, forward, message = REFUSED[name]
    member.other = weight(N, 5)
    model = lively(Via(forward, m=member))
    with pytest.raises(ef.CaptureError, match=f"parameter 'm.weight'.*{message}"), ef.capture(model, strict=False):
        model(torch.randn(N, 5, 6).double())


def test_the_same_bags_for_every_sample_have_frequencies_of_their_own():
    model, x = lively(Via(SAME, m=bag("mean", scale_grad_by_freq=True))), torch.randn(N, 5, 6).double()
    ef.check_capture(model, lambda: squares(model(x)), rtol=1e-10)


def test_a_sparse_table_of_positions():
    x = torch.randn(N, 5, 6).double()
    tapes = []
    for sparse in (True, False):
        torch.manual_seed(1)
        case = simple(Via(lambda s, x: (x * s.m(torch.arange(5))).tanh(), m=nn.Embedding(5, 6, sparse=sparse)), 5, 6)
        tapes.append(tape_of(case, {"x": x}))
    torch.testing.assert_close(*(tape.gram() for tape in tapes))
    torch.testing.assert_close(*(tape.per_sample() for tape in tapes))


FIRST = lambda x: x.transpose(0, 1)  # noqa: E731  (n, t, d) ↔ (t, n, d)
ELSEWHERE = {
    "bilinear": (nn.Bilinear(6, 6, 2), lambda s, x: FIRST(s.m(FIRST(x), FIRST(x)))),
    "cdist": (nn.Linear(6, 3), lambda s, x: FIRST(torch.cdist(FIRST(x), s.m.weight))),
    "gru_cell": (nn.GRUCell(6, 2), lambda s, x: s.m(FIRST(x)[0])),
    "embedding_bag": (bag(), lambda s, x: s.m(FIRST(FIRST(ids(x))))),
    "conv_transpose1d": (nn.ConvTranspose1d(1, 2, 3), lambda s, x: s.m(FIRST(x)[0].unsqueeze(1))),
}


@pytest.mark.parametrize("t", [4, 5])
@pytest.mark.parametrize("name", ELSEWHERE)
def test_samples_in_another_dimension(name, t):
    """With as many positions as samples sizes tell nothing."""
    member, forward = ELSEWHERE[name]
    agree(simple(Via(forward, m=member), t, 6, options={"strict": False}))


def test_positions_folded_into_the_samples():
    model = lively(Via(lambda s, x: s.m(x.flatten(0, 1), x.flatten(0, 1)).unflatten(0, x.shape[:2]), m=nn.Bilinear(6, 6, 2)))
    with pytest.raises(ef.CaptureError, match="'m.weight' and .*'m.bias': bilinear: positions are folded"), ef.capture(model, strict=False):
        model(torch.randn(N, 5, 6).double())


def test_a_write_to_one_sample():
    """Of each sample's own batch of one there is no second."""
    def forward(s, x):
        y = x[:, 0].clone()
        y[1, 0] = s.w[0]
        return y

    model = lively(Via(forward, w=weight(2)))
    with pytest.raises(ef.CaptureError, match="'w': __setitem__: torch.func.vmap cannot"), ef.capture(model, strict=False):
        model(torch.randn(N, 5, 6).double().requires_grad_())


def test_functional_code_that_no_rule_has_met_yet():
    params = {"w": weight(2, 6, 6).detach().double().requires_grad_()}
    agree(Case(params, lambda n: {"x": torch.randn(n, 6).double()}, lambda p, b: F.bilinear(b["x"], b["x"], p["w"]).square().sum(1),
               options={"strict": False}))  # fmt: skip


CELLS = {
    "gru_cell": lambda: nn.GRUCell(6, 4), "rnn_tanh_cell": lambda: nn.RNNCell(6, 4),
    "rnn_relu_cell": lambda: nn.RNNCell(6, 4, nonlinearity="relu"),
}  # fmt: skip


def over_time(cell, x):
    state = torch.zeros(len(x), 4, dtype=x.dtype)
    for t in range(x.shape[1]):
        state = cell(x[:, t], state)
    return state


DRAWN = torch.randn(5, 4, generator=torch.Generator().manual_seed(2)).double()
FIRST_STATES = {
    "torch's own": lambda cell, x: cell(x[:, 0]),
    "zeros": lambda cell, x: cell(x[:, 0], torch.zeros(len(x), 4, dtype=x.dtype)),
    "new_zeros": lambda cell, x: cell(x[:, 0], x.new_zeros(len(x), 4)),
    "zeros by name": lambda cell, x: cell(hx=torch.zeros(len(x), 4, dtype=x.dtype), input=x[:, 0]),
    "from outside": lambda cell, x: cell(x[:, 0], DRAWN[: len(x)]),
    "over time": over_time,
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap's own
@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("n", [1, 4, 5])
@pytest.mark.parametrize("state", FIRST_STATES)
@pytest.mark.parametrize("kind", CELLS)
def test_a_cells_first_state_has_a_row_for_each_sample(kind, state, n, functional):
    """Also one that is a constant; with as many samples as hidden units too."""
    cell, first = lively(CELLS[kind]()), FIRST_STATES[state]
    if not functional:
        return agree(simple(Via(lambda s, x: first(s.m, x), m=cell), 3, 6, n=n, options={"strict": False}))

    def losses(params, batch):
        def call(*args, **kwargs):
            return torch.func.functional_call(cell, params, args, kwargs)

        return squares(first(call, batch["x"]))

    params = {name: p.detach().requires_grad_() for name, p in cell.named_parameters()}
    agree(Case(params, lambda n: {"x": torch.randn(n, 3, 6).double()}, losses, n=n, options={"strict": False}))


@pytest.mark.parametrize("swap", [False, True])
def test_a_bilinear_layer_of_samples_and_constant_rows(swap):
    def forward(s, x):
        pair = (x, x.new_ones(len(x), 6).cumsum(1))
        return s.m(*pair[::-1] if swap else pair)

    agree(simple(Via(forward, m=nn.Bilinear(6, 6, 2)), 6, options={"strict": False}))
