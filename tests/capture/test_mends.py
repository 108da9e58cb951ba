"""What an error of capture proposes is tried: it works."""

import re

import pytest
import torch
from oracle import agree
from torch import nn
from zoo import Via, lively, simple

import entangle_fast as ef

LAYERS = {
    "lstm": (nn.LSTM(6, 4, batch_first=True), lambda s, x: s.head(s.m(x)[0][:, -1])),
    "gru": (nn.GRU(6, 4, batch_first=True), lambda s, x: s.head(s.m(x)[0][:, -1])),
    "rnn_tanh": (nn.RNN(6, 4, batch_first=True), lambda s, x: s.head(s.m(x)[0][:, -1])),
    "rnn_relu": (nn.RNN(6, 4, batch_first=True, nonlinearity="relu"), lambda s, x: s.head(s.m(x)[0][:, -1])),
    "lstm_cell": (nn.LSTMCell(6, 4), lambda s, x: s.head(s.m(x[:, 0])[0])),
    "gru_cell": (nn.GRUCell(6, 4), lambda s, x: s.head(s.m(x[:, 0]))),
    "rnn_tanh_cell": (nn.RNNCell(6, 4), lambda s, x: s.head(s.m(x[:, 0]))),
    "rnn_relu_cell": (nn.RNNCell(6, 4, nonlinearity="relu"), lambda s, x: s.head(s.m(x[:, 0]))),
    "bilinear": (nn.Bilinear(6, 6, 4), lambda s, x: s.head(s.m(x, x)[:, 0])),
    "conv_transpose1d": (nn.ConvTranspose1d(5, 4, 3), lambda s, x: s.head(s.m(x)[:, :, 0])),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap's own, of the cells
@pytest.mark.parametrize("name", LAYERS)
def test_it_proposes_what_works(name):
    layer, forward = LAYERS[name]
    model = lively(Via(forward, m=layer, head=nn.Linear(4, 3)))
    with pytest.raises(ef.CaptureError, match=f"torch's {name}") as raised, ef.capture(model) as tape:
        tape.backward(model(torch.randn(3, 5, 6).double()).sum(1))
    proposed = re.findall(r"requires_grad_\(False\)|strict=False", str(raised.value))
    assert proposed[0] == "requires_grad_(False)"
    if "strict=False" in proposed:
        agree(simple(model, 5, 6, options={"strict": False}))
    else:
        with pytest.raises(ef.CaptureError, match="vmap cannot map it"), ef.capture(model, strict=False) as tape:
            tape.backward(model(torch.randn(3, 5, 6).double()).sum(1))
    model.m.requires_grad_(False)
    agree(simple(model, 5, 6))
