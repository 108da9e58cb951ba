import pytest

from entangle_fast.capture import remake


@pytest.fixture(autouse=True)
def small_inputs_are_made_again(monkeypatch):
    """As large ones are: the models here are small."""
    monkeypatch.setattr(remake, "_SMALL", 0)
