"""Capture against autograd, every question, over the zoo."""

import pytest
import torch
from oracle import agree
from zoo import ZOO


@pytest.mark.parametrize("name", ZOO)
def test_agrees_with_autograd(name, recwarn):
    torch.manual_seed(2)
    agree(ZOO[name]())
    assert not [str(w.message) for w in recwarn if "padding='same'" not in str(w.message)]  # torch's own
