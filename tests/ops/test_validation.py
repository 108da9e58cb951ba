"""Bad arguments: a ValueError whose message begins with the argument's name, before any kernel runs."""

import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from entangle_fast import ops

r, ids = torch.randn, torch.zeros(4, 3, dtype=torch.int64)
whole, z = lambda *s: torch.ones(s, dtype=torch.int64), lambda *s: torch.ones(s, dtype=torch.complex64)  # noqa: E731
y = torch.zeros(4, dtype=torch.int64)


def adamw(**changed):
    given = {"grads": [r(2)], "exp_avg": [r(2)], "exp_avg_sq": [r(2)], "coef": r(0), "step": torch.tensor(1), **changed}
    names = ("exp_avg", "exp_avg_sq", "grads")
    ops.step_adamw([r(2)], *(given.pop(n) for n in names), [], given.pop("coef"), given.pop("step"), lr=0.1, **given)


BAD = {
    "gram: one dimension": (lambda: ops.gram(r(4), r(4)), "a"),
    "gram: n": (lambda: ops.gram(r(4, 3), r(5, 2)), "b"),
    "gram: t": (lambda: ops.gram(r(4, 2, 3), r(4, 3, 2)), "b"),
    "gram: dims": (lambda: ops.gram(r(4, 3), r(4, 3, 2)), "a, b"),
    "gram: dtypes": (lambda: ops.gram(r(4, 3), r(4, 2).double()), "a"),
    "gram: integers": (lambda: ops.gram(torch.ones(4, 3).long(), torch.ones(4, 2).long()), "a"),
    "gram: devices": (lambda: ops.gram(r(4, 3), r(4, 2, device="meta")), "a"),
    "gram: half a side": (lambda: ops.gram(r(4, 3), r(4, 2), r(4, 3)), "a2 and b2"),
    "gram: other layer": (lambda: ops.gram(r(4, 3), r(4, 2), r(4, 5), r(4, 2)), "a2"),
    "gram: other dtype": (lambda: ops.gram(r(4, 3), r(4, 2), r(4, 3).double(), r(4, 2).double()), "a"),
    "gram: route": (lambda: ops.gram(r(4, 3), r(4, 2), route="fast"), "route"),
    "gram: rows of positions": (lambda: ops.gram(r(4, 2, 3), r(4, 2, 2), route="rows"), "route"),
    "layers: none": (lambda: ops.gram_layers([]), "layers"),
    "layers: no pair": (lambda: ops.gram_layers([r(4, 3)]), "layers[0]"),
    "layers: dims": (lambda: ops.gram_layers([(r(4), r(4))]), "layers[0][0], layers[0][1]"),
    "layers: positions": (lambda: ops.gram_layers([(r(4, 3), r(4, 2)), (r(4, 5, 3), r(4, 5, 2))]), "layers[1]"),
    "layers: n of a pair": (lambda: ops.gram_layers([(r(4, 3), r(5, 2))]), "layers[0][1]"),
    "layers: n": (lambda: ops.gram_layers([(r(4, 3), r(4, 2)), (r(5, 3), r(5, 2))]), "layers[1]"),
    "layers: dtypes": (lambda: ops.gram_layers([(r(4, 3), r(4, 2)), (r(4, 3).double(), r(4, 2).double())]), "layers[1]"),
    "layers: devices": (lambda: ops.gram_layers([(r(4, 3), r(4, 2)), (r(4, 3, device="meta"), r(4, 2, device="meta"))]), "layers[1]"),
    "layers: others' number": (lambda: ops.gram_layers([(r(4, 3), r(4, 2))], []), "others"),
    "layers: others' width": (lambda: ops.gram_layers([(r(4, 3), r(4, 2))], [(r(4, 3), r(4, 1))]), "others[0]"),
    "layers: others' dtype": (lambda: ops.gram_layers([(r(4, 3), r(4, 2))], [(r(4, 3).bfloat16(), r(4, 2).bfloat16())]), "others[0]"),
    "conv: dims": (lambda: ops.gram_conv(r(4, 3), r(4, 2), 3), "x, g"),
    "conv: n": (lambda: ops.gram_conv(r(4, 3, 5), r(3, 2, 3), 3), "g"),
    "conv: size": (lambda: ops.gram_conv(r(4, 3, 5), r(4, 2, 4), 3), "g"),
    "conv: kernel": (lambda: ops.sqnorm_conv(r(4, 3, 5), r(4, 2, 3), (3, 3)), "kernel_size"),
    "conv: a float kernel": (lambda: ops.sqnorm_conv(r(4, 3, 5), r(4, 2, 3), 3.0), "kernel_size"),
    "conv: a tensor as kernel": (lambda: ops.sqnorm_conv(r(4, 3, 5), r(4, 2, 3), torch.tensor(3)), "kernel_size"),
    "conv: stride": (lambda: ops.sqnorm_conv(r(4, 3, 5), r(4, 2, 3), 3, stride=(1, 1)), "stride"),
    "conv: groups": (lambda: ops.sqnorm_conv(r(4, 3, 5), r(4, 2, 3), 3, groups=2), "groups"),
    "conv: no groups": (lambda: ops.sqnorm_conv(r(4, 3, 5), r(4, 2, 3), 3, groups=0), "groups"),
    "conv: no stride": (lambda: ops.sqnorm_conv(r(4, 3, 5), r(4, 2, 3), 3, stride=0), "stride"),
    "conv: no kernel": (lambda: ops.sqnorm_conv(r(4, 3, 5), r(4, 2, 6), 0), "kernel_size"),
    "conv: padding": (lambda: ops.sqnorm_conv(r(4, 3, 5), r(4, 2, 1), 3, padding=-1), "padding"),
    "conv: other channels": (lambda: ops.gram_conv(r(4, 3, 5), r(4, 2, 3), 3, x2=r(4, 4, 5), g2=r(4, 2, 3)), "x2"),
    "conv: half a side": (lambda: ops.gram_conv(r(4, 3, 5), r(4, 2, 3), 3, x2=r(4, 3, 5)), "x2 and g2"),
    "conv: basis": (lambda: ops.project_conv(r(4, 3, 5), r(4, 2, 3), r(2, 2, 3)), "basis"),
    "conv: basis channels": (lambda: ops.project_conv(r(4, 3, 5), r(4, 2, 3), r(2, 2, 4, 3)), "basis"),
    "conv: w": (lambda: ops.combine_conv(r(4, 3, 5), r(4, 2, 3), r(4), 3), "w"),
    "embedding: float ids": (lambda: ops.gram_embedding(r(4, 3), r(4, 3, 2)), "ids"),
    "conv: integers": (lambda: ops.gram_conv(whole(4, 3, 5), whole(4, 2, 3), 3), "x"),
    "embedding: complex ids": (lambda: ops.gram_embedding(z(4, 3), r(4, 3, 2)), "ids"),
    "embedding: integers": (lambda: ops.sqnorm_embedding(ids, whole(4, 3, 2)), "b"),
    "embedding: t": (lambda: ops.gram_embedding(ids, r(4, 2, 2)), "ids"),
    "gram_embedding: padding": (lambda: ops.gram_embedding(ids, r(4, 3, 2), padding_idx=-1), "padding_idx"),
    "sqnorm_embedding: padding": (lambda: ops.sqnorm_embedding(ids, r(4, 3, 2), padding_idx=-2), "padding_idx"),
    "project_embedding: padding": (lambda: ops.project_embedding(ids, r(4, 3, 2), r(2, 5, 2), padding_idx=-1), "padding_idx"),
    "combine_embedding: padding": (lambda: ops.combine_embedding(ids, r(4, 3, 2), r(2, 4), 5, padding_idx=-1), "padding_idx"),
    "project_random_embedding: padding":
        (lambda: ops.project_random_embedding(ids, r(4, 3, 2), 2, 5, seed=0, padding_idx=-1), "padding_idx"),
    "embedding: half a side": (lambda: ops.gram_embedding(ids, r(4, 3, 2), ids), "ids2 and b2"),
    "embedding: width": (lambda: ops.gram_embedding(ids, r(4, 3, 2), ids, r(4, 3, 5)), "b2"),
    "embedding: basis": (lambda: ops.project_embedding(ids, r(4, 3, 2), r(3, 5, 4)), "basis"),
    "embedding: basis too short": (lambda: ops.project_embedding(ids + 7, r(4, 3, 2), r(3, 5, 2)), "ids"),
    "embedding: id out of range": (lambda: ops.combine_embedding(ids + 7, r(4, 3, 2), r(1, 4), 5), "ids"),
    "embedding: id below zero": (lambda: ops.combine_embedding(ids - 1, r(4, 3, 2), r(1, 4), 5), "ids"),
    "project: basis": (lambda: ops.project(r(4, 3), r(4, 2), r(2, 3, 2)), "basis"),
    "project: complex basis": (lambda: ops.project(r(4, 3), r(4, 2), z(1, 2, 3)), "basis"),
    "project: k": (lambda: ops.project_random(r(4, 3), r(4, 2), -1, seed=0), "k"),
    "project: kind": (lambda: ops.project_random(r(4, 3), r(4, 2), 1, seed=0, kind="rademacher"), "kind"),
    "project: seed": (lambda: ops.project_random(r(4, 3), r(4, 2), 1, seed=2**63), "seed"),
    "project: offset": (lambda: ops.project_random(r(4, 3), r(4, 2), 1, seed=0, offset=2**63), "offset"),
    "random conv: k": (lambda: ops.project_random_conv(r(4, 3, 5), r(4, 2, 3), -1, 3, seed=0), "k"),
    "random conv: kind": (lambda: ops.project_random_conv(r(4, 3, 5), r(4, 2, 3), 1, 3, seed=0, kind="normal"), "kind"),
    "random conv: size": (lambda: ops.project_random_conv(r(4, 3, 5), r(4, 2, 4), 1, 3, seed=0), "g"),
    "random embedding: k": (lambda: ops.project_random_embedding(ids, r(4, 3, 2), -1, 5, seed=0), "k"),
    "random embedding: seed": (lambda: ops.project_random_embedding(ids, r(4, 3, 2), 1, 5, seed=-(2**63) - 1), "seed"),
    "random embedding: t": (lambda: ops.project_random_embedding(ids, r(4, 2, 2), 1, 5, seed=0), "ids"),
    "random embedding: id out of range": (lambda: ops.project_random_embedding(ids + 5, r(4, 3, 2), 1, 5, seed=0), "ids"),
    "combine: w": (lambda: ops.combine(r(4, 3), r(4, 2), r(4)), "w"),
    "combine: w's n": (lambda: ops.combine(r(4, 3), r(4, 2), r(2, 5)), "w"),
    "combine: complex w": (lambda: ops.combine(r(4, 3), r(4, 2), z(2, 4)), "w"),
    "loss: logits": (lambda: ops.sample_loss(r(4), y), "logits"),
    "loss: target's n": (lambda: ops.sample_loss(r(5, 3), y), "target"),
    "loss: target's dtype": (lambda: ops.sample_loss(r(4, 3), y.int()), "target"),
    "loss: clip": (lambda: ops.sample_loss(r(4, 3), y, clip=math.nan), "clip"),
    "loss: penalty": (lambda: ops.sample_loss(r(4, 3), y, penalty=-1.0), "penalty"),
    "loss: smoothing": (lambda: ops.sample_loss(r(4, 3), y, label_smoothing=1.5), "label_smoothing"),
    "loss: reduction": (lambda: ops.sample_loss(r(4, 3), y, reduction="none"), "reduction"),
    "loss: integer logits": (lambda: ops.sample_loss(torch.ones(4, 3).long(), y), "logits"),
    "linear loss: weight": (lambda: ops.linear_sample_loss(r(4, 3), r(5, 4), y), "weight"),
    "linear loss: bias": (lambda: ops.linear_sample_loss(r(4, 3), r(5, 3), y, r(4)), "bias"),
    "linear loss: dtypes": (lambda: ops.linear_sample_loss(r(4, 3), r(5, 3).double(), y), "h"),
    "linear loss: integers": (lambda: ops.linear_sample_loss(whole(4, 3), whole(5, 3), y), "h"),
    "w2: integers": (lambda: ops.w2_sorted(whole(4), r(4)), "losses"),
    "w2: complex reference": (lambda: ops.w2_moments(r(4), z(4)), "reference"),
    "w2: integer features": (lambda: ops.w2_features(whole(4, 2), r(4, 2)), "features"),
    "w2: dims": (lambda: ops.w2_sorted(r(4, 1), r(4)), "losses"),
    "w2: empty": (lambda: ops.w2_moments(r(4), r(0)), "reference"),
    "w2: width": (lambda: ops.w2_features(r(4, 2), r(4, 3)), "reference"),
    "step: lengths": (lambda: ops.step_update([r(2)], None, [], [], r(0), lr=1.0), "grads"),
    "step: shapes": (lambda: ops.step_update([r(2)], None, [r(3)], [], r(0), lr=1.0), "grads[0]"),
    "step: momentum": (lambda: ops.step_update([r(2)], [r(3)], [r(2)], [], r(0), lr=1.0), "momentum[0]"),
    "step: coef": (lambda: ops.step_update([r(2)], None, [r(2)], [], r(1), lr=1.0), "coef"),
    "step: complex coef": (lambda: ops.step_update([r(2)], None, [r(2)], [[r(2)]], z(1), lr=1.0), "coef"),
    "step: no parameter": (lambda: ops.step_update([], None, [], [], r(0), lr=1.0), "params"),
    "step: no list": (lambda: ops.step_gram([]), "directions"),
    "step: empty lists": (lambda: ops.step_gram([[], []]), "directions[0]"),
    "step: directions": (lambda: ops.step_gram([[r(2)], [r(3)]]), "directions[1]"),
    "step: counter": (lambda: ops.step_update([r(2)], None, [r(2)], [], r(0), lr=1.0, counter=torch.ones(1)), "counter"),
    "project: no grads": (lambda: ops.step_project([[]], None, []), "grads"),
    "project: directions": (lambda: ops.step_project([[r(3)]], None, [r(2)]), "directions[0]"),
    "project: momentum": (lambda: ops.step_project([], [r(3)], [r(2)]), "momentum[0]"),
    "project: ridge": (lambda: ops.step_project([[r(2)]], None, [r(2)], ridge=-1.0), "ridge"),
    "project: ridge of nan": (lambda: ops.step_project([[r(2)]], None, [r(2)], ridge=math.nan), "ridge"),
    "project: infinite ridge": (lambda: ops.step_project([[r(2)]], None, [r(2)], ridge=math.inf), "ridge"),
    "adamw: grads": (lambda: adamw(grads=[r(3)]), "grads[0]"),
    "adamw: moments": (lambda: adamw(exp_avg=[]), "exp_avg"),
    "adamw: moments' dtype": (lambda: adamw(exp_avg_sq=[r(2).double()]), "exp_avg_sq[0]"),
    "adamw: coef": (lambda: adamw(coef=r(1)), "coef"),
    "adamw: step": (lambda: adamw(step=torch.ones(1)), "step"),
    "adamw: step's dtype": (lambda: adamw(step=torch.ones(())), "step"),
    "adamw: counter": (lambda: adamw(counter=torch.ones((), dtype=torch.int64, device="meta")), "counter"),
    "adamw: betas": (lambda: adamw(betas=(0.9, 1.0)), "betas"),
    "adamw: eps": (lambda: adamw(eps=-1.0), "eps"),
    "adamw: no parameter": (lambda: ops.step_adamw([], [], [], [], [], r(0), torch.tensor(1), lr=0.1), "params"),
    "lookahead: no parameter": (lambda: ops.step_lookahead([], [], 1.0), "params"),
    "undo: no parameter": (lambda: ops.step_lookahead_undo([], [], ([], ids, r(0)), 1.0), "params"),
    "lookahead: grads": (lambda: ops.step_lookahead([r(2)], [r(3)], 1.0), "grads[0]"),
    "lookahead: capacity below 0": (lambda: ops.step_lookahead([r(2)], [r(2)], 1.0, -1), "capacity: got -1; needs an int >= 0"),
    "lookahead: no int": (lambda: ops.step_lookahead([r(2)], [r(2)], 1.0, 2.0), "capacity: got 2.0"),
}


@pytest.mark.parametrize("name", BAD)
def test_message_names_the_argument(name):
    call, argument = BAD[name]
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value).startswith(argument), str(error.value)


@pytest.mark.parametrize("call, error, message", [
    (lambda: ops.gram_conv(r(4, 3, 5), r(4, 2, 5), 3, padding="same"), TypeError,
     "^padding: got 'same', which is no padding here; needs 1 integers of dilation·.* for 'same'"),
    (lambda: ops.sqnorm_conv(r(4, 3, 5), r(4, 2, 5), "3"), TypeError, "^kernel_size: got '3', .* needs 1 integers$"),
    (lambda: ops.sample_loss(r(4, 3, 7), torch.zeros(4, 7).long()), ValueError,
     r"^target: shape \(4, 7\) does not go with logits \(4, 3, 7\); .*logits.transpose\(1, 2\)"),
    (lambda: ops.combine(r(4, 3), r(4, 2), r(4)), ValueError, r"^w: shape \(4,\); needs \(m, 4\), .*: give w\[None\]$"),
    (lambda: ops.sample_loss(r(4, 3, 7), torch.zeros(4, 6).long()), ValueError, r"logits \(4, 3, 7\); .* \(n,t\)$"),
])  # fmt: skip
def test_what_is_said_of_torchs_other_ways(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("label", [-1, 3, 10**12])
def test_label_out_of_range(label):
    for call in (lambda: ops.sample_loss(r(4, 3), y + label), lambda: ops.linear_sample_loss(r(4, 2), r(3, 2), y + label)):
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            call()


def test_a_capture_needs_a_capacity(monkeypatch):
    with FakeTensorMode():
        p, g = [torch.empty(3, device="cuda")], [torch.empty(3, device="cuda")]
        with monkeypatch.context() as patched:
            for name in ("is_initialized", "is_current_stream_capturing"):
                patched.setattr(torch.cuda, name, lambda: True)
            with pytest.raises(RuntimeError, match="^capacity: got None under a CUDA graph capture.*needs an int >= 0"):
                ops.step_lookahead(p, g, 0.1)
        assert p[0]._version == 0 and ops.step_lookahead(p, g, 0.1, 7)[1].shape == (7, 2)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    ops.step_lookahead([r(3)], [r(3)], 0.1)  # of the CPU nothing is captured


def test_numpys_integers_are_kernel_sizes():
    x, g = r(4, 3, 5), r(4, 2, 3)
    assert torch.equal(ops.gram_conv(x, g, np.int64(3)), ops.gram_conv(x, g, 3))
