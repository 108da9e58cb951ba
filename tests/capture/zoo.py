"""Models that capture has to cover, small, in float64 unless a test casts them.

ZOO: name → function that builds an oracle.Case. Batches are drawn so that sizes differ (n=4 or 3, t=5, …), the traps
where they coincide live in test_coincidences.py.
"""

import math

import torch
import torch.nn.functional as F
from oracle import Case
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

ZOO = {}


def zoo(fn):
    ZOO[fn.__name__] = fn
    return fn


def lively(module: nn.Module) -> nn.Module:
    """float64, eval, and no parameter or statistic at a value that hides an error (0 or 1)."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
        for m in module.modules():
            if getattr(m, "running_mean", None) is not None:
                m.running_mean.normal_(generator=generator)
                m.running_var.uniform_(0.5, 2, generator=generator)
    return module.double().eval()


def squares(y: torch.Tensor) -> torch.Tensor:
    """Some loss per sample."""
    y = y.flatten(1)
    return (y * torch.linspace(-1, 1, y.shape[1], dtype=y.dtype)).sum(1).sin() + y.square().mean(1)


def simple(model: nn.Module, *shape: int, **options) -> Case:
    """A model of one float tensor (n, *shape)."""
    return Case(
        lively(model), lambda n: {"x": torch.randn(n, *shape, dtype=torch.float64)},
        lambda net, b: squares(net(b["x"])), **options,
    )  # fmt: skip


def tokens(model: nn.Module, t: int = 5, vocab: int = 11, **options) -> Case:
    """A language model: ids (n, t) → logits (n, t, vocab)."""
    def losses(net, b):
        logits = net(b["ids"])
        each = F.cross_entropy(logits[:, :-1].flatten(0, 1), b["ids"][:, 1:].flatten(), reduction="none")
        return each.view(len(b["ids"]), -1).mean(1)

    return Case(lively(model), lambda n: {"ids": torch.randint(0, vocab, (n, t))}, losses, **options)


class Via(nn.Module):
    """A module from a function of (self, x) and submodules or parameters."""

    def __init__(self, fn, **members):
        super().__init__()
        self.fn = fn
        for name, value in members.items():
            setattr(self, name, value)

    def forward(self, *args, **kwargs):
        return self.fn(self, *args, **kwargs)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(0.5 * torch.randn(shape))


# ---- rows and images ----


@zoo
def mlp():
    return simple(nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3)), 6)


@zoo
def mlp_inplace_relu():
    return simple(nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(8, 3, bias=False)), 6)


@zoo
def batch_of_one():
    return simple(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), 6, n=1, m=2)


@zoo
def cnn_groupnorm_frozen_batchnorm():
    return simple(nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3), nn.GroupNorm(3, 6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    ), 3, 9, 9)  # fmt: skip


@zoo
def resnet_block():
    return simple(Via(
        lambda s, x: s.head(F.relu(s.n2(s.c2(F.relu(s.n1(s.c1(x)), inplace=True))) + s.short(x)).mean((2, 3))),
        c1=nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), n1=nn.BatchNorm2d(4),
        c2=nn.Conv2d(4, 4, 3, padding=1, bias=False), n2=nn.BatchNorm2d(4),
        short=nn.Sequential(nn.Conv2d(3, 4, 1, stride=2, bias=False), nn.BatchNorm2d(4)), head=nn.Linear(4, 3),
    ), 3, 8, 8)  # fmt: skip


@zoo
def convnext_block():
    return simple(Via(
        lambda s, x: x + (s.scale * s.out(F.gelu(s.into(s.norm(s.depth(x).permute(0, 2, 3, 1)))))).permute(0, 3, 1, 2),
        depth=nn.Conv2d(4, 4, 7, padding=3, groups=4), norm=nn.LayerNorm(4), into=nn.Linear(4, 8), out=nn.Linear(8, 4),
        scale=weight(4),
    ), 4, 6, 6)  # fmt: skip


CONVS = {
    "1d": (nn.Conv1d(3, 4, 3), 3, 9),
    "1d_everything": (nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), 4, 11),
    "1d_same_even": (nn.Conv1d(3, 4, 4, padding="same"), 3, 9),
    "2d_pair": (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)), 3, 8, 7),
    "2d_same": (nn.Conv2d(2, 3, 3, padding="same", dilation=2), 2, 7, 6),
    "2d_valid": (nn.Conv2d(2, 3, 3, padding="valid"), 2, 7, 6),
    "2d_patches": (nn.Conv2d(3, 5, 2, stride=2), 3, 6, 6),
    "2d_patches_leftover": (nn.Conv2d(3, 5, 2, stride=2), 3, 7, 7),
    "2d_depthwise": (nn.Conv2d(4, 8, 3, padding=1, groups=4), 4, 6, 6),
    "2d_grouped": (nn.Conv2d(4, 6, 3, groups=2, bias=False), 4, 6, 6),
    "2d_reflect": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), 2, 6, 6),
    "2d_circular": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), 2, 6, 6),
    "2d_pointwise": (nn.Conv2d(4, 6, 1), 4, 3, 3),
    "2d_one_pixel": (nn.Conv2d(4, 6, 3), 4, 3, 3),
    "3d": (nn.Conv3d(2, 4, (2, 3, 3), stride=(1, 2, 1), padding=(0, 1, 1), groups=2), 2, 4, 5, 5),
}
for _name, (_layer, *_shape) in CONVS.items():
    ZOO[f"conv_{_name}"] = lambda layer=_layer, shape=_shape: simple(nn.Sequential(layer, nn.Tanh()), *shape)
    ZOO[f"conv_{_name}_inside"] = lambda layer=_layer, shape=_shape: simple(
        Via(lambda s, x: s.layer(x * s.gate).tanh(), layer=layer, gate=weight()), *shape
    )


@zoo
def conv_of_transposed_input():
    return simple(Via(lambda s, x: s.conv(x.transpose(1, 2)), conv=nn.Conv1d(3, 4, 3, padding=1)), 6, 3)


@zoo
def channels_last():
    case = simple(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 2)), 3, 6, 6)
    case.model.to(memory_format=torch.channels_last)
    draw = case.batch
    case.batch = lambda n: {"x": draw(n)["x"].to(memory_format=torch.channels_last)}
    return case


@zoo
def norms():
    return simple(nn.Sequential(
        nn.Conv1d(4, 4, 3), nn.InstanceNorm1d(4, affine=True), nn.GroupNorm(2, 4), nn.BatchNorm1d(4), nn.PReLU(4),
        nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 4), nn.BatchNorm1d(4), nn.RMSNorm(4), nn.PReLU(),
    ), 4, 6)  # fmt: skip


@zoo
def norms_partly_trainable():
    case = simple(Via(
        lambda s, x: s.bn(s.gn(s.rms(s.ln(x)).transpose(1, 2))),
        ln=nn.LayerNorm((5, 6), bias=False), rms=nn.RMSNorm(6), gn=nn.GroupNorm(3, 6), bn=nn.BatchNorm1d(6),
    ), 5, 6)  # fmt: skip
    case.model.gn.weight.requires_grad_(False)
    case.model.bn.bias.requires_grad_(False)
    return case


@zoo
def bitfit():
    case = simple(nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(12, 5), nn.LayerNorm(5), nn.Linear(5, 2)), 2, 4, 4)  # fmt: skip
    for name, p in case.model.named_parameters():
        p.requires_grad_(name.endswith("bias"))
    return case


@zoo
def frozen_and_unused():
    case = simple(Via(
        lambda s, x: s.head(s.frozen(F.relu(s.first(x)))) + s.also(x),
        first=nn.Linear(5, 6), frozen=nn.Linear(6, 6), head=nn.Linear(6, 3), also=nn.Linear(5, 3), unused=nn.Linear(7, 7),
        nothing=weight(0, 3),
    ), 5)  # fmt: skip
    case.model.frozen.requires_grad_(False)
    case.model.also.weight.requires_grad_(False)
    return case


@zoo
def branch_that_losses_ignore():
    def forward(s, x):
        s.aside(x).sum()
        return s.main(x)

    return simple(Via(forward, main=nn.Linear(4, 3), aside=nn.Linear(4, 2)), 4)


@zoo
def reused_layer():
    return simple(Via(lambda s, x: s.layer(F.relu(s.layer(F.relu(s.layer(x))))), layer=nn.Linear(5, 5)), 5)


@zoo
def reused_conv_and_norm():
    return simple(Via(lambda s, x: s.norm(s.conv(F.relu(s.norm(s.conv(x))))),
                      conv=nn.Conv2d(3, 3, 3, padding=1), norm=nn.GroupNorm(1, 3)), 3, 5, 5)  # fmt: skip


@zoo
def reused_grouped_conv():
    return simple(Via(lambda s, x: s.conv(F.relu(s.conv(x))), conv=nn.Conv1d(4, 4, 3, padding=1, groups=2)), 4, 5)


@zoo
def weight_used_transposed_too():  # an autoencoder with tied weights
    return simple(Via(lambda s, x: F.relu(x @ s.w.t()) @ s.w + s.b, w=weight(7, 5), b=weight(5)), 5)


@zoo
def shared_slices():
    def forward(s, x):
        q, k = s.w[:4], s.w[4:]
        return torch.cat([F.linear(x, q), F.linear(x.cos(), k), F.linear(x.sin(), s.w[2:6])], -1)

    return simple(Via(forward, w=weight(8, 5)), 5)


@zoo
def split_qkv():
    return simple(Via(lambda s, x: sum(F.linear(f(x), p) for f, p in zip((torch.sin, torch.cos, torch.tanh), s.w.chunk(3))),
                      w=weight(9, 5)), 4, 5)  # fmt: skip


@zoo
def weight_norm_parametrization():
    return simple(nn.Sequential(weight_norm(nn.Linear(5, 4)), nn.Tanh(), weight_norm(nn.Linear(4, 3))), 5)


@zoo
def weight_norm_conv():
    return simple(nn.Sequential(weight_norm(nn.Conv1d(3, 4, 3)), nn.Tanh(), weight_norm(nn.Conv1d(4, 2, 2))), 3, 7)


@zoo
def weight_standardised_conv():
    def forward(s, x):
        w = s.conv.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, w, s.conv.bias, padding=1)

    return simple(Via(forward, conv=nn.Conv2d(3, 4, 3)), 3, 5, 5)


@zoo
def masked_weight_in_place():  # PixelCNN, pruning: the copy of the weight is changed after it was made
    def forward(s, x):
        w = s.w.clone()
        w[:, ::2] = 0
        w.mul_(2.0)
        return F.linear(x, w)

    return simple(Via(forward, w=weight(4, 6)), 6)


@zoo
def masked_weight_through_a_view():
    def forward(s, x):
        w = s.w * 1
        first = s.w.clone()
        w[0].zero_()
        first.t()[1].mul_(3)
        return F.linear(x, w) + F.linear(x, first)

    return simple(Via(forward, w=weight(4, 6)), 6)


@zoo
def copies_that_overlap():  # one row of the weight and one column of its transposed copy: one element in common
    def forward(s, x):
        w = s.w.t().contiguous()
        return (x * s.w[1]).sum(-1, keepdim=True) + (x.cos() * w[0][:5]).sum(-1, keepdim=True)

    return simple(Via(forward, w=weight(6, 5)), 5)


@zoo
def weight_indexed_with_repeats():
    import numpy

    def forward(s, x):
        return F.linear(x, s.w[numpy.array([0, 0, 1])]) + F.linear(x, s.w[[2, 2, 1]]) * s.w[torch.tensor([0, 1, 1]), 0]

    return simple(Via(forward, w=weight(4, 6)), 6)


@zoo
def scalars_and_gates():
    return simple(Via(
        lambda s, x: (s.a * s.lin(x) + s.b * x) / (1 + s.c.exp()) ** s.d.sigmoid() - torch.where(x > 0, s.e, s.a) * x,
        lin=nn.Linear(4, 4), a=weight(), b=weight(1), c=weight(4), d=weight(1, 4), e=weight(1, 1),
    ), 4)  # fmt: skip


@zoo
def spelled_products():
    def forward(s, x):
        y = torch.matmul(x, s.a) + x @ s.b.T + torch.einsum("ntd,ed->nte", x, s.b) + s.c.mT.__rmatmul__(x)
        z = torch.einsum("ntd,dhe->nhte", x, s.d)  # as einops-style attention has it
        v = torch.einsum("nhte,hef->ntf", z, s.e)
        return torch.cat([y, v, (x @ s.v).unsqueeze(-1), (s.rows @ x).transpose(1, 2)[..., :2].mean(1, keepdim=True)
                          .expand(-1, x.shape[1], -1)], -1)  # fmt: skip

    return simple(Via(forward, a=weight(6, 4), b=weight(4, 6), c=weight(4, 6), d=weight(6, 2, 3), e=weight(2, 3, 5),
                      v=weight(6), rows=weight(3, 5)), 5, 6)  # fmt: skip


@zoo
def mixer():
    return simple(Via(
        lambda s, x: (x + s.across(s.n1(x).transpose(1, 2)).transpose(1, 2)) + s.along(s.n2(x)),
        across=nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 5)), along=nn.Linear(6, 6),
        n1=nn.LayerNorm(6), n2=nn.LayerNorm(6),
    ), 5, 6)  # fmt: skip


@zoo
def flattened_rows():  # HF's habit: (n, t, d) → (n·t, d) → linear → back
    def forward(s, x):
        n, t, d = x.shape
        y = s.norm(F.relu(s.into(x.view(-1, d)))) * s.gate
        return torch.addmm(s.bias, y, s.out).view(n, t, -1)

    return simple(Via(forward, into=nn.Linear(6, 8), norm=nn.LayerNorm(8), out=weight(8, 4), bias=weight(4), gate=weight(8)),
                  5, 6)  # fmt: skip


@zoo
def frames_in_the_batch():
    return simple(Via(
        lambda s, x: s.head(s.norm(s.conv(x.flatten(0, 1))).unflatten(0, x.shape[:2]).flatten(2).mean(1)),
        conv=nn.Conv2d(2, 4, 3), norm=nn.GroupNorm(2, 4), head=nn.Linear(36, 3),
    ), 3, 2, 5, 5)  # fmt: skip


@zoo
def grouped_frames_in_the_batch():
    return simple(Via(
        lambda s, x: s.bn(s.conv(x.flatten(0, 1))).unflatten(0, x.shape[:2]),
        conv=nn.Conv2d(2, 4, 3, groups=2), bn=nn.BatchNorm2d(4),
    ), 3, 2, 5, 5)  # fmt: skip


@zoo
def windows_in_the_batch():  # Swin
    def forward(s, x):
        n, h, w, d = x.shape
        y = x.view(n, h // 2, 2, w // 2, 2, d).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, d)  # (n·windows, 4, d)
        y = s.norm(y + s.table) @ s.w + s.lin(y)
        return y.view(n, h // 2, w // 2, 2, 2, d).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, d)

    return simple(Via(forward, norm=nn.LayerNorm(3), table=weight(4, 3), w=weight(3, 3), lin=nn.Linear(3, 3)), 4, 4, 3,
                  n=3, m=5)  # fmt: skip


@zoo
def position_major_rows():  # (t, n, d) flattened: samples are the fast index
    def forward(s, x):
        y = x.transpose(0, 1)
        flat = s.lin(y.reshape(-1, 6)) * s.gate
        return s.norm(flat).view(5, -1, 4).transpose(0, 1)

    return simple(Via(forward, lin=nn.Linear(6, 4), gate=weight(4), norm=nn.LayerNorm(4)), 5, 6)


@zoo
def checkpointed():
    return simple(Via(
        lambda s, x: s.head(checkpoint(s.body, s.first(x), use_reentrant=False)),
        first=nn.Linear(6, 6), body=nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 6)),
        head=nn.Linear(6, 3),
    ), 6)  # fmt: skip


@zoo
def checkpointed_first():  # nothing before it needs a gradient
    return simple(Via(
        lambda s, x: s.head(checkpoint(s.body, x, use_reentrant=False)) * s.gain,
        body=nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)), head=nn.Linear(6, 3), gain=weight(3),
    ), 6)  # fmt: skip


@zoo
def detached_and_no_grad_parts():
    def forward(s, x):
        with torch.no_grad():
            aside = s.lin(x) * s.scale
        return s.head(s.lin(x).detach() + s.lin(x)) + aside + s.scale.detach() * s.scale

    return simple(Via(forward, lin=nn.Linear(5, 5), head=nn.Linear(5, 5), scale=weight(5)), 5)


@zoo
def many_inputs():
    case = Case(
        lively(Via(lambda s, batch, *, extra: s.a(batch["image"]) + s.b(batch["more"][0]) * s.g + extra["e"],
                   a=nn.Linear(4, 3), b=nn.Linear(2, 3), g=weight(3))),
        lambda n: {"image": torch.randn(n, 4).double(), "more": [torch.randn(n, 2).double()], "e": torch.randn(n, 3).double()},
        lambda net, b: squares(net({"image": b["image"], "more": b["more"]}, extra={"e": b["e"]})),
    )  # fmt: skip
    return case


@zoo
def functional():
    params = {"w": weight(5, 6), "b": weight(5), "g": weight(5), "v": weight(5, 3)}
    params = {k: p.detach().double().requires_grad_() for k, p in params.items()}
    return Case(params, lambda n: {"x": torch.randn(n, 6).double()},
                lambda p, b: squares(F.relu(F.linear(b["x"], p["w"], p["b"]) * p["g"]) @ p["v"]))  # fmt: skip


@zoo
def functional_call():
    case = mlp()
    module = case.model
    params = dict(module.named_parameters())
    return Case(params, case.batch, lambda p, b: squares(torch.func.functional_call(module, p, (b["x"],))))


@zoo
def two_parts_called_one_by_one():
    return Case(lively(nn.ModuleDict({"a": nn.Linear(6, 5), "b": nn.Linear(5, 3)})),
                lambda n: {"x": torch.randn(n, 6).double()}, lambda net, b: squares(net["b"](net["a"](b["x"]).relu())))  # fmt: skip


@zoo
def called_twice():
    def losses(net, b):
        return squares(net(b["x"])) + squares(net(b["y"])).cos()

    return Case(lively(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))),
                lambda n: {"x": torch.randn(n, 6).double(), "y": torch.randn(n, 6).double()}, losses)  # fmt: skip


@zoo
def chosen_rows_of_the_logits():
    return Case(lively(nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5))),
                lambda n: {"x": torch.randn(n, 6).double(), "y": torch.randint(0, 5, (n,))},
                lambda net, b: -net(b["x"]).log_softmax(1)[torch.arange(len(b["y"])), b["y"]])  # fmt: skip


# ---- tokens ----


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
