"""What torch refuses without a capture is refused inside one: nothing is converted in silence."""

import pytest
import torch
from torch import nn

import entangle_fast as ef

LAYERS = [(nn.Linear(8, 3), (4, 8)), (nn.Conv1d(2, 3, 3), (4, 2, 8)), (nn.LayerNorm(8), (4, 8)), (nn.GroupNorm(2, 8), (4, 8))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
@pytest.mark.parametrize("layer, shape", LAYERS, ids=lambda x: type(x).__name__)
def test_an_input_of_another_dtype(layer, shape, dtype):
    x = (5 * torch.randn(shape)).to(dtype)
    with pytest.raises(RuntimeError):
        layer(x)
    with pytest.raises((ef.CaptureError, RuntimeError)), ef.capture(layer):
        layer(x)


def test_autocast_converts():
    layer = nn.Linear(8, 3)
    with torch.autocast("cpu", torch.bfloat16), ef.capture(layer) as tape:
        out = layer(torch.randn(4, 8))
        tape.backward(out.float().square().sum(1))
    assert out.dtype == torch.bfloat16 and tape.gram().isfinite().all()


@pytest.mark.parametrize("bias", [(3,), (3, 1), (1,)])
def test_autocast_of_addmm_casts_what_is_added(bias):
    x, params = torch.randn(4, 8), {"w": torch.randn(3, 8, requires_grad=True), "b": torch.randn(bias, requires_grad=True)}

    def forward():
        return torch.addmm(params["b"], x, params["w"].T) if bias == (3,) else torch.addmm(params["b"], params["w"], x.T).T

    with torch.autocast("cpu", torch.bfloat16):
        plain = forward()
        with ef.capture(params, batch_size=4) as tape:
            out = forward()
            tape.backward(out.float().square().sum(1))
    assert out.dtype == plain.dtype == torch.bfloat16
    product = (x @ params["w"].T).abs().max().item()  # it is rounded here before anything is added
    torch.testing.assert_close(out, plain, rtol=0.016, atol=torch.finfo(out.dtype).eps * product)
