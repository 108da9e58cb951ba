"""As many positions, channels or features as samples: sizes say nothing, and the answer must still be right or refused."""

import pytest
import torch
import torch.nn.functional as F
from oracle import Case, agree, tape_of
from torch import nn
from zoo import POSITIONS, ZOO, Via, ViT, lively, simple, squares, tokens, weight

import entangle_fast as ef


def draw(*shape):
    return lambda n: {"x": torch.randn(n, *shape).double()}


@pytest.mark.parametrize("positions", POSITIONS)
def test_positions_when_n_equals_t(positions):
    agree(simple(ViT(pos=positions), 1, 4, 4, n=5, m=3))


@pytest.mark.parametrize("name, n", [
    ("gpt2_tied", 5), ("llama", 5), ("relative_position_bias", 5), ("flattened_rows", 5), ("mixer", 5), ("mha_weights", 5),
    ("split_qkv", 4), ("windows_in_the_batch", 4), ("frames_in_the_batch", 9), ("grouped_frames_in_the_batch", 3),
    ("position_major_rows", 5), ("mha_seq_first", 5), ("transformer_encoder_seq_first", 5), ("conv_of_transposed_input", 6),
    ("conv_1d", 3), ("conv_2d_depthwise", 4), ("norms", 4), ("cnn_groupnorm_frozen_batchnorm", 3), ("spelled_products", 5),
    ("mixed_dimensions", 3), ("mixed_dimensions", 4), ("scalars_and_gates", 4), ("padded_attention", 5), ("learned_queries", 5),
    ("learned_queries", 3), ("prefix_tokens", 5), ("seq_first_model", 5), ("transformer_encoder_decoder", 3), ("mlp", 6),
    ("weight_used_transposed_too", 5), ("flattened_rows", 30), ("mha_bias_kv_seq_first", 5), ("resnet_block", 8),
])  # fmt: skip
def test_zoo_with_a_size_that_equals_n(name, n):
    case = ZOO[name]()
    case.n, case.m = n, 2
    agree(case)


def test_seq_first_by_hand():
    """(t, n, d) without any module that says so, n = t."""
    def forward(s, x):
        x = x.transpose(0, 1)  # (t, n, d)
        x = s.norm(s.lin(x) + s.pos.unsqueeze(1)) * s.gain
        return (x @ s.w).permute(1, 0, 2)

    agree(simple(Via(forward, lin=nn.Linear(6, 6), norm=nn.LayerNorm(6), gain=weight(6), pos=weight(4, 6), w=weight(6, 3)), 4, 6))


def test_functional_code_with_n_equal_to_t():
    p = {"e": weight(9, 4), "pos": weight(4, 4), "w": weight(4, 3), "s": weight(4)}
    p = {k: v.detach().double().requires_grad_() for k, v in p.items()}

    def losses(p, b):
        x = p["e"][b["ids"]] + p["pos"][torch.arange(4)] + F.embedding(torch.arange(4), p["pos"]) * p["s"]
        return squares(x @ p["w"])

    agree(Case(p, lambda n: {"ids": torch.randint(0, 9, (n, 4))}, losses))


def test_functional_positions_from_outside_are_refused_when_n_equals_t():
    p = {"e": weight(9, 4), "pos": weight(4, 4)}
    ids, where = torch.randint(0, 9, (4, 4)), torch.arange(4)
    with pytest.raises(ef.CaptureError, match="samples"), ef.capture(p) as tape:
        tape.backward(squares(F.embedding(ids, p["e"]) + F.embedding(where, p["pos"])))


def test_functional_flat_rows_with_a_named_batch():
    p = {"w": torch.randn(3, 6, dtype=torch.float64, requires_grad=True)}
    for dim in (None, 0):
        for n in (4, 5):
            case = Case(p, draw(5, 6), lambda p, b: squares(F.linear(b["x"].view(-1, 6), p["w"]).view(len(b["x"]), 5, 3)),
                        n=n, m=n, options={"batch_size": n, "batch_dim": dim})  # fmt: skip
            agree(case)


def test_flat_input_needs_a_word_on_its_order():
    model = nn.Linear(6, 3).double()
    rows = torch.randn(20, 6).double()
    with pytest.raises((ef.CaptureError, ValueError)), ef.capture(model, batch_size=4) as tape:
        tape.backward(squares(model(rows).view(4, 5, 3)))
    agree(Case(model, draw(5, 6), lambda net, b: squares(net(b["x"].flatten(0, 1)).view(-1, 5, 3)), n=4, m=4,
               options={"batch_size": 4, "batch_dim": 0}))  # fmt: skip
    agree(Case(model, draw(5, 6), lambda net, b: squares(net(b["x"].transpose(0, 1).reshape(-1, 6)).view(5, -1, 3).transpose(0, 1)),
               n=4, m=4, options={"batch_size": 4, "batch_dim": 1}))  # fmt: skip


def test_two_views_joined_and_parted():  # siamese, contrastive, classifier-free guidance
    def forward(s, x):
        a, b = s.net(torch.cat([x, x.sin()])).chunk(2)
        c, d = s.net(torch.cat([x, x.cos()])).split(len(x))
        y = s.net(torch.cat([a, b]))
        return (a * b + c - d) + y[: len(x)] - y[len(x) :]

    agree(simple(Via(forward, net=nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))), 6))


def test_repeated_samples():
    def forward(s, x):
        y = s.net(x.repeat_interleave(3, 0)).view(len(x), 3, -1).mean(1)
        z = s.net(x.repeat(2, 1)).view(2, len(x), -1).sum(0)
        u = s.net(x.unsqueeze(1).expand(-1, 3, -1).reshape(-1, 6)).unflatten(0, (-1, 3))
        return y + z + u[:, 0] - s.net(x.repeat_interleave(3, 0))[::3]

    agree(simple(Via(forward, net=nn.Linear(6, 6)), 6, n=4, m=3))


def test_one_sample_at_a_time_and_joined_again():
    agree(Case(lively(nn.Linear(6, 3)), draw(6), lambda net, b: torch.stack([y.square().sum() for y in net(b["x"])])))
    agree(Case(lively(nn.Linear(6, 3)), draw(6), lambda net, b: torch.stack([net(b["x"])[i].sin().sum() for i in range(len(b["x"]))])))


def test_rows_in_another_order_are_refused():
    model, x = lively(nn.Linear(6, 3)), torch.randn(4, 6).double()
    order = torch.tensor([1, 0, 3, 2])
    for shuffle in (lambda y: y[order], lambda y: y.flip(0), lambda y: y.roll(1, 0), lambda y: y.index_select(0, order),
                    lambda y: y.sort(0).values, lambda y: torch.stack([y[1], y[0], y[2], y[3]])):  # fmt: skip
        with pytest.raises(ef.CaptureError), ef.capture(model) as tape:
            tape.backward(shuffle(model(x)).square().sum(1))


MIXING = {
    "centred": lambda y: y - y.mean(0),
    "pairwise": lambda y: y @ y.T,
    "einsum": lambda y: torch.einsum("nd,md->nm", y, y),
    "softmax": lambda y: y.softmax(0),
    "normalised": lambda y: F.normalize(y, dim=0),
    "cumulative": lambda y: y.cumsum(0),
    "total": lambda y: y / y.sum(),
    "reduced_then_expanded": lambda y: y.sum().expand(len(y), 1),
    "first": lambda y: y - y[0],
    "distances": lambda y: (y[:, None] - y[None]).square().sum(2),
    "permuted": lambda y: y + y[torch.randperm(len(y))],
}


@pytest.mark.parametrize("name", MIXING)
def test_losses_that_mix_samples_are_refused(name):
    model, x = lively(nn.Sequential(nn.Linear(6, 3))), torch.randn(4, 6).double()
    with pytest.raises(ef.CaptureError, match="sample"), ef.capture(model) as tape:
        tape.backward(squares(MIXING[name](model(x))))


def test_data_may_mix():
    """Inputs normalised by their batch, mixup: no gradient flows there."""
    def forward(s, x):
        x = (x - x.mean(0)) / x.std(0)
        return s.lin(0.7 * x + 0.3 * x[torch.randperm(len(x), generator=torch.Generator().manual_seed(len(x)))])

    agree(simple(Via(forward, lin=nn.Linear(6, 3)), 6))


def test_routed_tokens_are_refused():
    """Mixture of experts: the rows that a mask selects have no known sample."""
    def forward(s, x):
        y = s.into(x).flatten(0, 1)
        chosen = torch.arange(len(y)) % 2 == 0  # a multiple of n rows
        z = torch.zeros_like(y)
        z[chosen] = s.expert(y[chosen])
        return z.view(x.shape)

    model = lively(Via(forward, into=nn.Linear(6, 6), expert=nn.Linear(6, 6)))
    with pytest.raises(ef.CaptureError, match="mask"), ef.capture(model) as tape:
        tape.backward(squares(model(torch.randn(4, 4, 6).double())))


def test_written_into_a_buffer():
    def forward(s, x):
        y = torch.zeros(len(x), 5, 6, dtype=x.dtype)
        y[:, 1:] = x
        z = x.new_zeros(len(x), 7, 6)
        z[:, 2:6].copy_(s.a(x))
        w = torch.zeros_like(y)
        w[..., :3] = s.a(y)[..., 3:]
        return s.b(y) + s.b(z)[:, :5] + w

    agree(simple(Via(forward, a=nn.Linear(6, 6), b=nn.Linear(6, 6)), 4, 6, n=3, m=2))


def test_ignored_positions_and_flat_losses():
    def losses(net, b):
        logits = net(b["ids"])
        each = F.cross_entropy(logits.view(-1, 11), b["ids"].roll(-1, 1).view(-1), reduction="none", ignore_index=3)
        return each.view(b["ids"].shape).sum(1)

    case = ZOO["gpt2_tied"]()
    case.losses, case.n = losses, 5
    agree(case)


def test_gather_of_the_last_token():
    def forward(s, ids):
        y = s.head(s.emb(ids))
        last = (ids > 2).sum(1) % ids.shape[1]
        a = y[torch.arange(len(ids)), last]
        b = y.gather(1, last[:, None, None].expand(-1, 1, y.shape[2])).squeeze(1)
        c = torch.take_along_dim(y, last[:, None, None], 1)[:, 0]
        return a + b.sin() + c.cos()

    case = tokens(Via(forward, emb=nn.Embedding(11, 4), head=nn.Linear(4, 3)))
    case.losses = lambda net, b: squares(net(b["ids"]))
    for n in (4, 5, 3):
        case.n = n
        agree(case)


def test_branches_that_join_parameters_differently():
    """One tape sees a and b apart, the other as a product: the cross-Gram must have all terms."""
    model = lively(Via(lambda s, x, joint: F.linear(x, s.a * s.b) if joint else F.linear(x, s.a) + F.linear(x.sin(), s.b),
                       a=weight(3, 4), b=weight(3, 4)))  # fmt: skip
    from oracle import flat, per_sample

    cases = [Case(model, draw(4), lambda net, b, j=j: squares(net(b["x"], j))) for j in (True, False)]
    batches = [c.batch(3) for c in cases]
    tapes = [tape_of(c, b) for c, b in zip(cases, batches)]
    g, h = (flat(per_sample(c, b)) for c, b in zip(cases, batches))
    torch.testing.assert_close(tapes[0].gram(tapes[1]), g @ h.T)
    torch.testing.assert_close(tapes[1].gram(tapes[0]), h @ g.T)


@pytest.mark.parametrize("pick", [lambda y: y[1], lambda y: y.select(0, 1), lambda y: y.unbind()[1], lambda y: y[1] * y[1].sum()])
def test_losses_of_one_sample_alone(pick):
    """Positions without their batch: as many of them as samples, and none of the others'."""
    net = nn.Linear(4, 4).double()
    with ef.capture(net) as tape:
        losses = pick(net(torch.randn(4, 4).double()))
    with pytest.raises(ef.CaptureError, match="losses: they are not one per sample, .*: all of them are of sample 1, which was picked"):
        tape.backward(losses)
    with ef.capture(net) as tape:
        tape.backward(net(torch.randn(1, 4).double())[0][:1])  # the only sample there is
    assert tape.gram().shape == (1, 1)


def test_one_tensor_under_two_names():
    w = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 4, dtype=torch.float64)
    with ef.capture({"a": w, "b": w}) as tape:
        tape.backward(squares(F.linear(x, w)))
    assert tape.names == ["a"]
    assert tape.per_sample()["a"].abs().sum() > 0


def test_frozen_attention_and_adapters():
    def forward(s, x):
        y, w = s.attn(x, x, x)
        z = s.seq(x.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1))[0].transpose(0, 1)
        h, _ = s.lstm(x)
        return s.adapter(y + z + h) + (w @ x) * s.gain

    case = simple(Via(forward, attn=nn.MultiheadAttention(6, 2, batch_first=True), seq=nn.MultiheadAttention(6, 2),
                      lstm=nn.LSTM(6, 6, batch_first=True), adapter=nn.Linear(6, 6), gain=weight(6)), 5, 6, n=5, m=4)  # fmt: skip
    for part in ("attn", "seq", "lstm"):
        getattr(case.model, part).requires_grad_(False)
    agree(case)
