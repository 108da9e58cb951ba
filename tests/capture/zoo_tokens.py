"""The zoo: transformers and other models of tokens."""

import math

import torch
import torch.nn.functional as F
from oracle import Case
from torch import nn
from zoo_parts import ZOO, Via, lively, simple, squares, tokens, weight, zoo

import entangle_fast as ef


class RMSNorm(nn.Module):
    """As in HF's Llama: upcast, normalise, cast back, times the weight."""

    def __init__(self, d, one_plus=False):
        super().__init__()
        self.weight, self.one_plus = nn.Parameter(torch.ones(d)), one_plus

    def forward(self, x):
        y = x.double() if x.dtype == torch.float64 else x.float()
        y = (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        return y * (1.0 + self.weight) if self.one_plus else self.weight * y


class Conv1D(nn.Module):
    """As in HF's GPT-2: addmm with a (d_in, d_out) weight."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.weight, self.bias, self.d_out = weight(d_in, d_out), weight(d_out), d_out

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.d_out)


class GPT2(nn.Module):
    def __init__(self, d=8, heads=2, vocab=11, positions=7, tie=True):
        super().__init__()
        self.wte, self.wpe, self.heads = nn.Embedding(vocab, d), nn.Embedding(positions, d), heads
        self.ln1, self.ln2, self.lnf = (nn.LayerNorm(d) for _ in range(3))
        self.attn, self.proj, self.up, self.down = Conv1D(d, 3 * d), Conv1D(d, d), Conv1D(d, 2 * d), Conv1D(2 * d, d)
        self.head = nn.Linear(d, vocab, bias=False)
        if tie:
            self.head.weight = self.wte.weight
        self.register_buffer("mask", torch.tril(torch.ones(positions, positions, dtype=torch.bool)), persistent=False)

    def forward(self, ids):
        n, t = ids.shape
        x = self.wte(ids) + self.wpe(torch.arange(t).unsqueeze(0))
        q, k, v = (z.view(n, t, self.heads, -1).transpose(1, 2) for z in self.attn(self.ln1(x)).chunk(3, -1))
        a = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~self.mask[:t, :t], -1e9).softmax(-1)
        x = x + self.proj((a @ v).transpose(1, 2).reshape(n, t, -1))
        x = x + self.down(F.gelu(self.up(self.ln2(x))))
        return self.head(self.lnf(x))


class Llama(nn.Module):
    def __init__(self, d=8, heads=4, kv=2, vocab=11, tie=False, one_plus=False):
        super().__init__()
        self.embed, self.heads, self.kv, self.dh = nn.Embedding(vocab, d, padding_idx=0), heads, kv, d // heads
        self.q, self.o = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        self.k, self.v = (nn.Linear(d, kv * self.dh, bias=False) for _ in range(2))
        self.gate, self.up, self.down = nn.Linear(d, 12, bias=False), nn.Linear(d, 12, bias=False), nn.Linear(12, d, bias=False)
        self.n1, self.n2, self.nf = (RMSNorm(d, one_plus) for _ in range(3))
        self.head = nn.Linear(d, vocab, bias=False)
        if tie:
            self.head.weight = self.embed.weight

    def rotary(self, x, t):
        freq = 1.0 / 100.0 ** (torch.arange(0, self.dh, 2).double() / self.dh)
        angle = torch.outer(torch.arange(t).double(), freq)
        cos, sin = (f(torch.cat([angle, angle], -1))[None, None].to(x.dtype) for f in (torch.cos, torch.sin))
        turned = torch.cat([-x[..., self.dh // 2 :], x[..., : self.dh // 2]], -1)
        return x * cos + turned * sin

    def forward(self, ids):
        n, t = ids.shape
        x = self.embed(ids)
        y = self.n1(x)
        q = self.rotary(self.q(y).view(n, t, self.heads, -1).transpose(1, 2), t)
        k = self.rotary(self.k(y).view(n, t, self.kv, -1).transpose(1, 2), t)
        v = self.v(y).view(n, t, self.kv, -1).transpose(1, 2)
        k, v = (z[:, :, None].expand(n, self.kv, 2, t, self.dh).reshape(n, self.heads, t, self.dh) for z in (k, v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(a.transpose(1, 2).contiguous().view(n, t, -1))
        y = self.n2(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.head(self.nf(x))


ZOO["gpt2_tied"] = lambda: tokens(GPT2())
ZOO["gpt2_untied"] = lambda: tokens(GPT2(tie=False))
ZOO["llama"] = lambda: tokens(Llama())
ZOO["llama_tied"] = lambda: tokens(Llama(tie=True))
ZOO["gemma_norm"] = lambda: tokens(Llama(one_plus=True))
ZOO["long_tied"] = lambda: tokens(GPT2(positions=40, vocab=5), t=33, vocab=5)


@zoo
def lora():
    case = tokens(Llama())
    model = case.model.requires_grad_(False)

    class Lora(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.a, self.b = base, weight(2, base.in_features).double(), weight(base.out_features, 2).double()
            self.a, self.b = nn.Parameter(self.a), nn.Parameter(self.b)

        def forward(self, x):
            return self.base(x) + F.linear(F.linear(x, self.a), self.b) * 0.5

    for name in ("q", "v", "down"):
        setattr(model, name, Lora(getattr(model, name)))
    return case


@zoo
def lora_merged():  # the product is formed: one weight of two parameters
    case = simple(Via(lambda s, x: F.linear(x, s.base.weight + 0.5 * (s.b @ s.a), s.base.bias),
                      base=nn.Linear(6, 5), a=weight(2, 6), b=weight(5, 2)), 4, 6)  # fmt: skip
    case.model.base.requires_grad_(False)
    return case


@zoo
def dora():
    def forward(s, x):
        w = s.base + s.b @ s.a
        return F.linear(x, s.m * w / w.norm(dim=1, keepdim=True))

    return simple(Via(forward, base=weight(5, 6), a=weight(2, 6), b=weight(5, 2), m=weight(5, 1)), 6)


@zoo
def chain_of_shared_products():  # parameters joined pairwise: a·b, b·c, c·d
    def forward(s, x):
        return F.linear(x, s.a * s.b) + F.linear(x.sin(), s.b * s.c) + F.linear(x.cos(), s.c * s.d) + F.linear(x, s.d)

    return simple(Via(forward, a=weight(3, 4), b=weight(3, 4), c=weight(3, 4), d=weight(3, 4)), 4)


class ViT(nn.Module):
    """cls: how the class token is made; pos: how positions are spelled."""

    def __init__(self, cls="expand", pos="(1,t,d)", d=6, t=5):
        super().__init__()
        self.patch, self.cls, self.kind, self.pos = nn.Conv2d(1, d, 2, stride=2), weight(1, 1, d), cls, pos
        self.norm, self.head, self.scale = nn.LayerNorm(d), nn.Linear(d, 3), weight(d)
        self.attn = nn.MultiheadAttention(d, 2, batch_first=True)
        shapes = {"(1,t,d)": (1, t, d), "(t,d)": (t, d), "[:, :t]": (1, t + 3, d), "[:t]": (t + 3, d), "expand": (1, t, d),
                  "repeat": (1, t, d), "[None]": (t, d)}  # fmt: skip
        if pos in shapes:
            self.table = weight(*shapes[pos])
        else:
            self.table = nn.Embedding(t, d)
            self.register_buffer("ids", torch.arange(t)[None])

    def positions(self, x):
        n, t, _ = x.shape
        return {
            "(1,t,d)": lambda: self.table, "(t,d)": lambda: self.table, "[:, :t]": lambda: self.table[:, :t],
            "[:t]": lambda: self.table[:t], "expand": lambda: self.table.expand(n, -1, -1),
            "repeat": lambda: self.table.repeat(n, 1, 1), "[None]": lambda: self.table[None],
            "arange": lambda: self.table(torch.arange(t)), "arange[None]": lambda: self.table(torch.arange(t)[None]),
            "arange[None][0]": lambda: self.table(torch.arange(t)[None])[0], "buffer": lambda: self.table(self.ids),
            "arange.expand": lambda: self.table(torch.arange(t).expand(n, t)),
            "arange.repeat": lambda: self.table(torch.arange(t).repeat(n, 1)),
            "reversed": lambda: self.table(t - 1 - torch.arange(t)),
        }[self.pos]()  # fmt: skip

    def token(self, n):
        return {
            "expand": lambda: self.cls.expand(n, -1, -1), "expand_sizes": lambda: self.cls.expand(n, 1, self.cls.shape[2]),
            "repeat": lambda: self.cls.repeat(n, 1, 1), "from_vector": lambda: self.cls[0, 0].expand(n, 1, -1),
            "broadcast_to": lambda: torch.broadcast_to(self.cls, (n, 1, self.cls.shape[2])),
            "added": lambda: self.cls + torch.zeros(n, 1, self.cls.shape[2], dtype=self.cls.dtype),
            "repeat_interleave": lambda: self.cls.repeat_interleave(n, 0), "tile": lambda: torch.tile(self.cls, (n, 1, 1)),
        }[self.kind]()  # fmt: skip

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token(len(x)), x], 1)
        x = x + self.positions(x)
        y = self.norm(x)
        x = x + self.scale * self.attn(y, y, y, need_weights=False)[0]
        return self.head(x[:, 0])


POSITIONS = ("(1,t,d)", "(t,d)", "[:, :t]", "[:t]", "expand", "repeat", "[None]", "arange", "arange[None]",
             "arange[None][0]", "buffer", "arange.expand", "arange.repeat", "reversed")  # fmt: skip
TOKENS = ("expand_sizes", "repeat", "from_vector", "broadcast_to", "repeat_interleave", "tile")
for _p in POSITIONS:
    ZOO[f"vit_positions_{_p}"] = lambda p=_p: simple(ViT(pos=p), 1, 4, 4)
for _c in TOKENS:
    ZOO[f"vit_token_{_c}"] = lambda c=_c: simple(ViT(cls=c), 1, 4, 4)
ZOO["vit_batch_of_one"] = lambda: simple(ViT(), 1, 4, 4, n=1, m=2)
ZOO["vit_repeat_batch_of_one"] = lambda: simple(ViT(cls="repeat", pos="repeat"), 1, 4, 4, n=1, m=3)


@zoo
def prefix_tokens():
    def forward(s, x):
        prefix = [y.expand(len(x), -1, -1) for y in (s.prompt, s.emb.weight.unsqueeze(0))]
        return s.lin(torch.cat([*prefix, x], 1))

    return simple(Via(forward, prompt=weight(2, 6), emb=nn.Embedding(3, 6), lin=nn.Linear(6, 4)), 5, 6)


@zoo
def learned_queries():  # Perceiver, DETR: the queries never saw the batch before attention
    return simple(Via(lambda s, x: s.attn(s.q.unsqueeze(0).repeat(len(x), 1, 1), x, x)[0],
                      q=weight(3, 6), attn=nn.MultiheadAttention(6, 2, batch_first=True)), 5, 6)  # fmt: skip


@zoo
def relative_position_bias():  # T5
    def forward(s, x):
        n, t, d = x.shape
        q, k, v = s.qkv(x).chunk(3, -1)
        distance = (torch.arange(t)[None] - torch.arange(t)[:, None]).clamp(-2, 2) + 2
        bias = s.table(distance).permute(2, 0, 1)[:1]
        return ((q @ k.mT + bias).softmax(-1) @ v)

    return simple(Via(forward, qkv=nn.Linear(6, 18), table=nn.Embedding(5, 2)), 5, 6)


def _mha(batch_first=True, cross=False, need_weights=False, **options):
    d = 6
    attn = nn.MultiheadAttention(d, 2, batch_first=batch_first, **options)
    kdim, vdim = options.get("kdim") or d, options.get("vdim") or d

    def forward(s, x, k=None, v=None):
        if not batch_first:
            x, k, v = (z if z is None else z.transpose(0, 1) for z in (x, k, v))
        out, w = s.attn(x, x if k is None else k, x if v is None else v, need_weights=need_weights)
        out = out if batch_first else out.transpose(0, 1)
        return out if w is None else torch.cat([out.flatten(1), w.flatten(1)], 1)

    def batch(n):
        found = {"x": torch.randn(n, 5, d).double()}
        return {**found, "k": torch.randn(n, 7, kdim).double(), "v": torch.randn(n, 7, vdim).double()} if cross else found

    return Case(lively(Via(forward, attn=attn)), batch, lambda net, b: squares(net(**b)))


ZOO["mha"] = _mha
ZOO["mha_seq_first"] = lambda: _mha(batch_first=False)
ZOO["mha_weights"] = lambda: _mha(need_weights=True)
ZOO["mha_no_bias"] = lambda: _mha(bias=False)
ZOO["mha_cross"] = lambda: _mha(cross=True)
ZOO["mha_cross_dims"] = lambda: _mha(cross=True, kdim=4, vdim=3)
ZOO["mha_cross_dims_seq_first"] = lambda: _mha(cross=True, batch_first=False, kdim=4, vdim=3, need_weights=True)
ZOO["mha_bias_kv"] = lambda: _mha(add_bias_kv=True, add_zero_attn=True)
ZOO["mha_bias_kv_seq_first"] = lambda: _mha(add_bias_kv=True, batch_first=False, need_weights=True)
for _first in (True, False):
    ZOO[f"transformer_encoder_{'batch' if _first else 'seq'}_first"] = lambda first=_first: simple(Via(
        lambda s, x: s.enc(x) if first else s.enc(x.transpose(0, 1)).transpose(0, 1),
        enc=nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, batch_first=first, norm_first=first), 2,
                                  enable_nested_tensor=False),
    ), 5, 6)  # fmt: skip


@zoo
def transformer_encoder_decoder():
    return simple(Via(lambda s, x: s.t(x, x[:, :3]), t=nn.Transformer(6, 2, 1, 1, 8, batch_first=True)), 5, 6)


@zoo
def seq_first_model():
    def losses(net, b):
        return squares(net(b["x"].transpose(0, 1)).transpose(0, 1))

    return Case(lively(Via(lambda s, x: s.enc(s.lin(x) + s.pos[: len(x)]), lin=nn.Linear(6, 6), pos=weight(9, 1, 6),
                           enc=nn.TransformerEncoderLayer(6, 2, 8))),
                lambda n: {"x": torch.randn(n, 5, 6).double()}, losses, options={"batch_dim": 1})  # fmt: skip


@zoo
def padded_attention():
    def forward(s, x, lengths):
        keep = torch.arange(x.shape[1])[None] < lengths[:, None]
        y = s.enc(s.lin(x), src_key_padding_mask=~keep)
        return (y * keep.unsqueeze(-1)).sum(1) / lengths.unsqueeze(-1)

    return Case(lively(Via(forward, lin=nn.Linear(6, 6), enc=nn.TransformerEncoderLayer(6, 2, 8, batch_first=True))),
                lambda n: {"x": torch.randn(n, 5, 6).double(), "lengths": torch.arange(n) % 5 + 1},
                lambda net, b: squares(net(b["x"], b["lengths"])))  # fmt: skip


@zoo
def embedding_pad_and_types():
    return tokens(Via(lambda s, ids: s.out(s.a(ids) + s.types(ids % 2) + s.types.weight[0] + s.pos[:, : ids.shape[1]]),
                      a=nn.Embedding(11, 4, padding_idx=-1), types=nn.Embedding(2, 4), pos=weight(1, 9, 4),
                      out=nn.Linear(4, 11)))  # fmt: skip


@zoo
def table_by_index():
    return tokens(Via(lambda s, ids: s.table[ids] @ s.out, table=weight(11, 4), out=weight(4, 11)))


@zoo
def bag_of_words():
    return Case(lively(Via(lambda s, ids: s.out(s.e(ids).mean(1)), e=nn.Embedding(11, 4), out=nn.Linear(4, 3))),
                lambda n: {"ids": torch.randint(0, 11, (n, 6))}, lambda net, b: squares(net(b["ids"])))  # fmt: skip


@zoo
def one_id_per_sample():
    return Case(lively(Via(lambda s, ids: s.out(s.e(ids)), e=nn.Embedding(11, 4), out=nn.Linear(4, 3))),
                lambda n: {"ids": torch.randint(0, 3, (n,))}, lambda net, b: squares(net(b["ids"])))  # fmt: skip


@zoo
def mixed_dimensions():  # a parameter in front of the batch, and batch scalars
    return simple(Via(lambda s, x: (s.basis.view(3, 1, 4) * x).sum(0) + x.sum(1)[:, None] * s.v + (x[:, 0] * s.c)[:, None],
                      basis=weight(3, 4), v=weight(4), c=weight(1)), 4, n=5, m=2)  # fmt: skip


def fused_loss(tie: bool, bias: bool, frozen: bool = False, **options):
    """A language model whose last layer and loss are one call, in chunks of the vocabulary's logits."""
    table, head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=bias)
    if tie:
        head.weight = table.weight
    head.weight.requires_grad_(not frozen)
    net = Via(lambda s, ids: torch.tanh(s.middle(s.table(ids))), table=table, middle=nn.Linear(6, 6), head=head)

    def losses(net, b):
        h, target = net(b["ids"][:, :-1]), b["ids"][:, 1:]
        return ef.ops.linear_sample_loss(h, net.head.weight, target, net.head.bias, **options)

    return Case(lively(net), lambda n: {"ids": torch.randint(0, 11, (n, 5))}, losses)


ZOO |= {
    "fused_loss": lambda: fused_loss(False, True),
    "fused_loss_tied": lambda: fused_loss(True, False, label_smoothing=0.1, ignore_index=3),
    "fused_loss_clipped": lambda: fused_loss(False, True, clip=9.7, penalty=0.3, reduction="sum"),
    "fused_loss_frozen_weight": lambda: fused_loss(False, True, frozen=True),
}
