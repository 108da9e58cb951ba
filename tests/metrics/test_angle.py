import math

import pytest
import torch
import torch.nn.functional as F
from small import net, samples, trained

from entangle_fast.metrics import gradient_angle

F64 = torch.float64
FORGET, RETAIN = samples(20, 1, [0], F64), samples(44, 3, [2, 3], F64)


def direct(model):
    params = [p for p in model.parameters() if p.requires_grad]
    u, v = (torch.cat([g.flatten() for g in torch.autograd.grad(F.cross_entropy(model(x), y), params)]) for x, y in (FORGET, RETAIN))
    return math.degrees(math.acos(u @ v / (u.norm() * v.norm())))


@pytest.mark.parametrize("batch_size", [3, 1024])
def test_it_is_the_angle_of_the_mean_gradients(batch_size):
    model = trained(F64)
    model[0].train()  # a mode to be given back
    assert gradient_angle(model, FORGET, RETAIN, batch_size=batch_size) == pytest.approx(direct(model), rel=1e-9)
    assert model[0].training and not model[1].training and all(p.grad is None for p in model.parameters())


def test_known_angles():
    model = net(F64)
    assert gradient_angle(model, FORGET, FORGET) == pytest.approx(0, abs=1e-5)
    against = gradient_angle(model, FORGET, FORGET, loss=lambda out, y: F.cross_entropy(out, y, reduction="none"))
    assert against == pytest.approx(0, abs=1e-5)
    linear = torch.nn.Linear(2, 1, bias=False)
    e = torch.eye(2)
    found = [gradient_angle(linear, (e[:1], torch.ones(1)), (e[i : i + 1], torch.full((1,), s)), loss=lambda out, y: y * out[:, 0])
             for i, s in ((0, -1.0), (1, 1.0))]  # fmt: skip
    assert found == pytest.approx([180, 90])


def test_a_zero_gradient_has_no_angle():
    assert math.isnan(gradient_angle(net(F64), FORGET, RETAIN, loss=lambda out, y: 0 * out[:, 0]))


def test_refusals():
    model, nothing = net(F64), (torch.zeros(0, 6, dtype=F64), torch.zeros(0).long())
    with pytest.raises(ValueError, match="retain: got no samples"):
        gradient_angle(model, FORGET, nothing)
    with pytest.raises(ValueError, match="not reduced"):
        gradient_angle(model, FORGET, RETAIN, loss=F.cross_entropy)
    with pytest.raises(TypeError, match="loss: gave a NoneType for 20 samples; needs a tensor"):
        gradient_angle(model, FORGET, RETAIN, loss=lambda out, y: None)
    with pytest.raises(ValueError, match="loss: gave losses without a gradient"):
        gradient_angle(model, FORGET, RETAIN, loss=lambda out, y: out.detach().sum(1))
    with pytest.raises(FloatingPointError, match="retain: its gradient"):
        gradient_angle(model, FORGET, (RETAIN[0] * torch.nan, RETAIN[1]))
    with pytest.raises(ValueError, match="no trainable parameter"):
        gradient_angle(model.requires_grad_(False), FORGET, RETAIN)
