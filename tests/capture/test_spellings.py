"""Every spelling of a function that has a rule: exact, or refused by name; never silent."""

import pytest
import torch
import torch.nn.functional as F
from oracle import Case, agree
from torch import Tensor, nn
from zoo import Via, lively, simple, squares, weight

import entangle_fast as ef
from entangle_fast.capture.mode import RULES
from entangle_fast.capture.sources import function_name

# spelled with a parameter, and what reads it: x (n, 5, 6)
EXACT = {
    "layer_norm": (dict(w=weight(6), b=weight(6)), lambda s, x: torch.layer_norm(x, (6,), s.w, s.b)),
    "rms_norm": (dict(w=weight(6)), lambda s, x: torch.rms_norm(x, (6,), s.w)),
    "group_norm": (dict(w=weight(5), b=weight(5)), lambda s, x: torch.group_norm(x, 5, s.w, s.b)),
    "batch_norm": (dict(m=nn.BatchNorm1d(5)), lambda s, x: torch.batch_norm(
        x, s.m.weight, s.m.bias, s.m.running_mean, s.m.running_var, False, 0.1, 1e-5, False)),
    "instance_norm": (dict(w=weight(5), b=weight(5)), lambda s, x: torch.instance_norm(x, s.w, s.b, None, None, True, 0.1, 1e-5, False)),
    "embedding": (dict(w=weight(4, 3)), lambda s, x: torch.embedding(s.w, (x > 0).long(), padding_idx=1)),
    "frozen embedding": (dict(w=weight(3)), lambda s, x: torch.embedding(torch.eye(4, 3).double(), (x > 0).long()) * s.w),
    "index_select": (dict(w=weight(4, 3)), lambda s, x: s.w.index_select(0, (x[:, 0, 0] > 0).long())),
    "convolution": (dict(w=weight(2, 5, 3)), lambda s, x: torch.convolution(x, s.w, None, [2], [1], [1], False, [0], 1)),
    "mv": (dict(w=weight(6)), lambda s, x: torch.stack([torch.mv(x[:, 0], s.w), x[:, 1].mv(s.w)], 1)),
    "linalg.matmul": (dict(w=weight(6, 3)), lambda s, x: torch.linalg.matmul(x, s.w)),
    "weight first": (dict(w=weight(6, 6), b=weight(6, 1), v=weight(3, 6)), lambda s, x: (s.v @ F.gelu(s.w @ x[:, 0].T + s.b)).T),
    "weight first, a vector": (dict(w=weight(6), v=weight(5)), lambda s, x: torch.cat(
        [s.w @ x.mT, s.v @ x, (s.w @ x[:, 0].T)[:, None], torch.matmul(s.w, x.permute(1, 2, 0)).T], 1)),
    "first, mm": (dict(w=weight(3, 6), b=weight(3, 1)), lambda s, x: torch.mm(s.w, x[:, 0].T).T + torch.addmm(s.b, s.w, x[:, 1].T).T),
    "by the second's name": (dict(w=weight(6, 6), v=weight(6)), lambda s, x: torch.cat(
        [torch.mm(mat2=s.w, input=x[:, 0]), x[:, 1].mm(mat2=s.w), torch.matmul(x, other=s.w)[:, 2], x[:, 3].mv(vec=s.v)[:, None],
         torch.mv(input=x[:, 4], vec=s.v)[:, None], torch.mm(input=s.w, mat2=x[:, 0].T).T], 1)),
    "weight first, samples last": (dict(w=weight(3, 6)), lambda s, x: (s.w @ x.permute(1, 2, 0)).permute(2, 0, 1)),
    "repeat, a view of it": (dict(p=weight(5, 6)), lambda s, x: s.p.repeat(len(x), 1, 1).view(len(x) * 5, 6).view_as(x) * x),
    "repeat, written to": (dict(p=weight(5, 6)), lambda s, x: s.p.repeat(len(x), 1, 1).add_(x).mul_(x)),
    "weight first, a view of it": (dict(w=weight(4, 6)), lambda s, x: (s.w @ x.mT).view(len(x), 20)),
    "addmm": (dict(w=weight(6, 3), b=weight(3)), lambda s, x: torch.addmm(s.b, x[:, 0], s.w, beta=2, alpha=3)),
    "one bias for all outputs": (dict(w=weight(6, 3), b=weight(1)), lambda s, x:
        torch.addmm(s.b, x[:, 0], s.w) + F.linear(x, s.w.T, s.b)[:, 1]),
    "addmm, a matrix first": (dict(w=weight(2, 6), b=weight(2, 1)), lambda s, x: torch.addmm(s.b, s.w.detach(), x[:, 0].T).T),
    "addmv": (dict(w=weight(6), b=weight(1)), lambda s, x: torch.addmv(s.b, x[:, 0], s.w, alpha=2)[:, None]),
    "baddbmm": (dict(b=weight(5, 5)), lambda s, x: torch.baddbmm(s.b, x, x.mT, beta=0.5)),
    "addr": (dict(w=weight(3), b=weight(3)), lambda s, x: s.b.addr(x[:, 0, 0], s.w, beta=2)),
    "outer": (dict(w=weight(3)), lambda s, x: torch.outer(x[:, 0, 0], s.w) + torch.ger(s.w, x[:, 1, 0]).T),
    "inner": (dict(w=weight(3, 6), v=weight(6)), lambda s, x: torch.inner(x, s.w) + x.inner(s.v)[..., None]),
    "inner, 0-d": (dict(w=nn.Parameter(torch.tensor(1.5))), lambda s, x: torch.inner(s.w, x)),
    "inner, other way": (dict(w=weight(3, 6)), lambda s, x: torch.inner(s.w, x).movedim(0, -1)),
    "inner, a view of it": (dict(w=weight(3, 6)), lambda s, x: torch.inner(s.w, x).view(-1).view(3, len(x), 5).movedim(0, -1)),
    "tensordot": (dict(w=weight(6, 3), v=weight(5, 6, 2)), lambda s, x: torch.cat(
        [torch.tensordot(x, s.w, 1)[:, 0], torch.tensordot(x, s.v, 2), torch.tensordot(x, s.w, ([2], [0]))[:, 1]], 1)),
    "chain_matmul": (dict(w=weight(6, 4), v=weight(4, 3)), lambda s, x: torch.chain_matmul(x[:, 0], s.w, s.v)),
    "multi_dot": (dict(w=weight(6, 4), v=weight(4, 3)), lambda s, x: torch.linalg.multi_dot([x[:, 0], s.w, s.v])),
    "vecdot": (dict(w=weight(6), v=weight(5, 1)), lambda s, x: torch.linalg.vecdot(x, s.w) + torch.linalg.vecdot(x, s.v, dim=1)[:, :5]),
    "prelu": (dict(w=weight(5)), lambda s, x: torch.prelu(x, s.w) + x.prelu(s.w)),
    "clamp": (dict(w=weight(6), v=weight(6)), lambda s, x: torch.clamp(x, min=s.w - 1) + x.clip(max=s.v) + x.clamp_min(s.v)),
    "extrema": (dict(w=weight(6), v=weight(6)), lambda s, x: torch.fmax(x, s.w) * x.fmin(s.v) + torch.logaddexp(x, s.w).logaddexp2(s.v)),
    "powers": (dict(w=weight(6)), lambda s, x: torch.float_power(x.abs() + 1, s.w) + torch.ldexp(x, s.w) + x.copysign(s.w)),
    "logs": (dict(w=weight(6)), lambda s, x: torch.xlogy(x, s.w.exp()) + torch.special.xlogy(x, s.w.exp())
             + torch.special.xlog1py(x, s.w.exp()) + torch.arctan2(x, s.w)),
    "modulo": (dict(w=weight(6)), lambda s, x: x % s.w.exp()),
    "comparisons": (dict(w=weight(6)), lambda s, x: torch.where(torch.greater(x, s.w) & x.not_equal(s.w), x * s.w, x)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:torch.chain_matmul is deprecated")
@pytest.mark.parametrize("name", EXACT)
def test_exact(name):
    members, forward = EXACT[name]
    agree(simple(Via(forward, **members), 5, 6))


@pytest.mark.parametrize("n", [4, 6])
def test_functional_code_with_the_weight_first(n):
    """The first that meets a parameter is x.T: what is not summed over counts the samples."""
    params = {"w": weight(6, 6), "b": weight(6, 1), "v": weight(6)}

    def losses(p, batch):
        return (p["v"] @ torch.tanh(p["w"] @ batch["x"].T + p["b"])).square()

    agree(Case(params, lambda n: {"x": torch.randn(n, 6)}, losses, n=n, m=n), rtol=1e-5)


# no rule in this spelling, or none at all
REFUSED = {
    "bmm": (dict(w=weight(4, 6, 3)), lambda s, x: torch.bmm(x, s.w)),
    "baddbmm": (dict(w=weight(4, 6, 3)), lambda s, x: torch.baddbmm(x[..., :3], x, s.w)),
    "addbmm": (dict(b=weight(5, 5)), lambda s, x: torch.addbmm(s.b, x, x.mT)[:4]),
    "dot": (dict(w=weight(4)), lambda s, x: torch.dot(x[:, 0, 0], s.w) * x),
    "vdot": (dict(w=weight(4)), lambda s, x: torch.vdot(x[:, 0, 0], s.w) * x),
    "kron": (dict(w=weight(2, 2)), lambda s, x: torch.kron(x[:, 0], s.w)[:4]),
    "bilinear": (dict(w=weight(2, 6, 6)), lambda s, x: torch.bilinear(x, x, s.w, None)),
    "conv_tbc": (dict(w=weight(3, 6, 2), b=weight(2)), lambda s, x: torch.conv_tbc(x, s.w, s.b)),
    "conv_transpose1d": (dict(w=weight(5, 2, 3)), lambda s, x: torch.conv_transpose1d(x, s.w)),
    "conv_transpose1d by convolution": (dict(w=weight(5, 2, 3)), lambda s, x: torch.convolution(x, s.w, None, [1], [0], [1], True, [0], 1)),
    "native_layer_norm": (dict(w=weight(6)), lambda s, x: torch.native_layer_norm(x, (6,), s.w, None, 1e-5)[0]),
    "native_group_norm": (dict(w=weight(5)), lambda s, x: torch.native_group_norm(x, s.w, None, 4, 5, 6, 5, 1e-5)[0]),
    "embedding_bag": (dict(w=weight(4, 3)), lambda s, x: torch.embedding_bag(s.w, (x[:, 0] > 0).long().flatten(), torch.arange(4) * 6)[0]),
    "gather": (dict(w=weight(4, 6)), lambda s, x: s.w.gather(0, (x[:, 0] > 0).long())),
    "take": (dict(w=weight(6)), lambda s, x: torch.take(s.w, (x > 0).long())),
    "cdist": (dict(w=weight(3, 6)), lambda s, x: torch.cdist(x[:, 0], s.w)),
    "cross": (dict(w=weight(6, 3)), lambda s, x: torch.linalg.cross(x.unflatten(-1, (2, 3))[:, 0], s.w[:1])),
    "mse_loss": (dict(w=weight(5, 6)), lambda s, x: F.mse_loss(x, s.w, reduction="none")),
    "einsum": (dict(w=weight(5, 6)), lambda s, x: torch.einsum("nti,ti->nt", x, s.w)),
    "matmul with the weight first": (dict(w=weight(3, 4)), lambda s, x: s.w @ x[:, 0]),
    "addmm_": (dict(w=weight(6, 6)), lambda s, x: x[:, 0].clone().addmm_(x[:, 0], s.w)),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    members, forward = REFUSED[name]
    model = lively(Via(forward, **members))
    with pytest.raises(ef.CaptureError, match=f"(?s)parameter '[wb]'.*{name.split()[0]}|{name.split()[0]}.*parameter '[wb]'"):
        with ef.capture(model) as tape:
            tape.backward(squares(model(torch.randn(4, 5, 6).double())))


def bare(f) -> str:
    name = function_name(f)
    return name.removeprefix("special_").removeprefix("linalg_")


def test_no_spelling_of_a_rules_name_is_left_out():
    named = {bare(f) for f in RULES}
    every = [f for functions in torch.overrides.get_overridable_functions().values() for f in functions]
    assert [f for f in every if bare(f) in named and f not in RULES] == []
    assert {torch.layer_norm, torch.embedding, Tensor.prelu, torch.linalg.matmul} <= set(RULES)
