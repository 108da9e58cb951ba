"""The zoo: rows, images and sequences of vectors."""


import torch
import torch.nn.functional as F
from oracle import Case
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint
from zoo_parts import ZOO, Via, lively, simple, squares, weight, zoo


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
