"""Positions of padding_idx are left out, whatever stands there: NaN and infinity too, in the reference and in what serves the call."""

import pytest
import torch

from entangle_fast import dispatch, ops
from entangle_fast.reference import per_sample

PAD, ROWS, N, T, D = 2, 5, 4, 6, 3
BACKENDS = ["reference", *(["cpp"] if dispatch.EXTENSION is None else [])]


def poisoned(ids, b, value):
    return b.masked_fill((ids == PAD).unsqueeze(-1), value)


def calls(ids, b, other, b2, w, basis):
    yield "gram_embedding", ops.gram_embedding(ids, b, padding_idx=PAD)
    yield "gram_embedding of two", ops.gram_embedding(ids, b, other, b2, padding_idx=PAD)
    yield "sqnorm_embedding", ops.sqnorm_embedding(ids, b, padding_idx=PAD)
    yield "project_embedding", ops.project_embedding(ids, b, basis, padding_idx=PAD)
    yield "project_random_embedding", ops.project_random_embedding(ids, b, 2, ROWS, seed=3, padding_idx=PAD)
    yield "per_sample.embedding", per_sample.embedding(ids, b, ROWS, PAD)
    yield "combine_embedding", ops.combine_embedding(ids, b, w, ROWS, padding_idx=PAD)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_left_out(monkeypatch, generator, backend, dtype, value):
    monkeypatch.setenv(dispatch.ENV, f"{backend},reference")
    ids, other = (torch.randint(0, ROWS, (n, T), generator=generator) for n in (N, N - 1))
    ids[:, 0], other[:, 1] = PAD, PAD
    b, b2 = (torch.randn(*i.shape, D, generator=generator).to(dtype) for i in (ids, other))
    w, basis = torch.randn(2, N, generator=generator), torch.randn(2, ROWS, D, generator=generator).to(dtype)
    zero = dict(calls(ids, poisoned(ids, b, 0), other, poisoned(other, b2, 0), w, basis))
    found = dict(calls(ids, poisoned(ids, b, value), other, poisoned(other, b2, value), w, basis))
    basis[:, PAD] = value
    found["project_embedding, basis too"] = ops.project_embedding(ids, b, basis, padding_idx=PAD)
    zero["project_embedding, basis too"] = zero["project_embedding"]
    for name, x in found.items():
        assert x.isfinite().all(), name
        torch.testing.assert_close(x, zero[name], rtol=0, atol=0, msg=name)


def test_a_padded_row_of_a_weight_that_is_not_finite_stays_zero():
    ids, b = torch.tensor([[PAD, 1]]), torch.ones(1, 2, D)
    table = ops.combine_embedding(ids, b, torch.full((1, 1), torch.inf), ROWS, padding_idx=PAD)
    assert not table[0, PAD].any() and table[0, 1].isinf().all()


def test_elsewhere_what_is_not_finite_shows():
    ids, b = torch.tensor([[PAD, 1]]), torch.ones(1, 2, D)
    b[0, 1] = torch.nan
    for name, x in calls(ids, b, ids, b, torch.ones(1, 1), torch.ones(1, ROWS, D)):
        assert not x.isfinite().all(), name


def test_gradients_do_not_reach_padding():
    ids, b = torch.tensor([[PAD, 1]]), torch.full((1, 2, D), torch.nan)
    b[0, 1] = 1.0
    b.requires_grad_()
    ops.sqnorm_embedding(ids, b, padding_idx=PAD).sum().backward()
    assert not b.grad[0, 0].any() and (b.grad[0, 1] == 2).all()
