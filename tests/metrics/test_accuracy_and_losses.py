from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from entangle_fast.metrics import accuracy, evaluate, loss_distribution, predict, sample_losses
from entangle_fast.tasks import Triple


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    net.train()
    net[1].eval()
    return net


class AsIs(nn.Module):
    def forward(self, x):
        return x


def one_hot(*classes):
    return F.one_hot(torch.tensor(classes), 4).float()


def test_accuracy():
    assert accuracy(AsIs(), (one_hot(0, 1, 2, 3), torch.tensor([0, 1, 2, 0])), batch_size=3) == 75.0
    assert predict(AsIs(), one_hot(2, 1)).tolist() == [2, 1]


def test_evaluate():
    y = torch.tensor
    sets = SimpleNamespace(
        test=Triple((one_hot(0, 1), y([0, 0])), (one_hot(0, 0), y([0, 0])), (one_hot(3, 3, 2), y([1, 3, 2]))),
        test_fine=Triple(y([0, 0]), y([1, 1]), y([3, 3, 1])), class_names=("a", "b", "c", "d"))
    result = evaluate(AsIs(), sets)
    assert result["forget"] == 50.0 and result["adjacent"] == 100.0 and result["remote"] == pytest.approx(200 / 3)
    # b is in two sets, as with neighbours; c has no sample
    assert result["per_class"] == {"a": 50.0, "b": 100.0, "d": 50.0}
    assert all(type(v) is float for v in [result["forget"], *result["per_class"].values()])


def test_evaluate_on_a_task():
    from entangle_fast.tasks import ImageClasses, SmallCNN
    x = torch.randint(0, 256, (8, 1, 28, 28), dtype=torch.uint8)
    task = ImageClasses(x, torch.arange(8) % 4, x, torch.arange(8) % 4, "abcd", superclass_names="pq",
                        superclass_of=torch.tensor([0, 0, 1, 1]), forget="a")
    assert set(evaluate(SmallCNN(2), task.split())["per_class"]) == set("abcd")


def test_sample_losses_by_definition(model):
    x, y = torch.randn(7, 3), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    losses = sample_losses(model, (x, y), batch_size=2)
    logits = model[1](model[0](x)).detach()
    torch.testing.assert_close(losses, -logits.log_softmax(1)[torch.arange(7), y])
    assert losses.shape == (7,) and not losses.requires_grad


def test_half_precision_losses_are_float32():
    assert sample_losses(AsIs(), (one_hot(0, 1).bfloat16(), torch.tensor([0, 1]))).dtype == torch.float32


def test_the_model_is_left_as_found(model):
    x, y = torch.randn(7, 3), torch.zeros(7).long()
    modes, before = [m.training for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    accuracy(model, (x, y))
    sample_losses(model, (x, y))
    for call in (accuracy, sample_losses):
        with pytest.raises(RuntimeError):
            call(model, (torch.randn(7, 4), y))
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_refusals():
    y = torch.tensor([0, 1])
    for call in (accuracy, sample_losses):
        with pytest.raises(ValueError, match="data: got no samples"):
            call(AsIs(), (torch.zeros(0, 4), torch.zeros(0).long()))
        with pytest.raises(ValueError, match="data: 3 samples but 2 labels"):
            call(AsIs(), (one_hot(0, 1, 2), y))
    with pytest.raises(FloatingPointError, match="data: the model.s logits are NaN"):
        accuracy(AsIs(), (one_hot(0, 1) * torch.nan, y))


def test_loss_distribution():
    generator = torch.Generator().manual_seed(0)
    losses = torch.randn(101, generator=generator).exp()
    got = loss_distribution(losses, (0.0, 0.1, 0.333, 1.0))
    for q, value in got["quantiles"].items():
        assert value == pytest.approx(torch.quantile(losses.double(), q).item())
    assert got["min"] == losses.min() and got["max"] == losses.max()
    assert got["mean"] == pytest.approx(losses.mean().item())
    assert loss_distribution(torch.tensor([2.0]))["quantiles"][0.95] == 2.0
    assert loss_distribution(torch.tensor([1.0, torch.inf]))["quantiles"][0.05] == torch.inf


@pytest.mark.parametrize("losses, quantiles, message", [
    (torch.tensor([]), (0.5,), "losses: got shape"), (torch.tensor([1.0, torch.nan]), (0.5,), "with 1 NaN"),
    (torch.ones(2, 2), (0.5,), "losses: got shape"), (torch.ones(2), (1.5,), "quantiles: got"),
])
def test_loss_distribution_refuses(losses, quantiles, message):
    with pytest.raises(ValueError, match=message):
        loss_distribution(losses, quantiles)
