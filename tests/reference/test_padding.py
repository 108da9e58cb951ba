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


@pytest.mark.parametrize("backend", BACKENDS)
def test_negative_ids_are_ids_like_any_other(monkeypatch, backend):
    """The Gram and its diagonal ask for no table: -1 is no padding where none is named, nor where another is."""
    monkeypatch.setenv(dispatch.ENV, backend)
    ids, other = torch.tensor([[-1, 2, -1], [-1, 0, -3]]), torch.tensor([[-3, -1, -1], [0, PAD, -1]])
    b, b2 = torch.randn(2, 3, D), torch.randn(2, 3, D)
    for padding_idx in (None, PAD):
        left, right = (x if padding_idx is None else poisoned(i, x, 0) for i, x in ((ids, b), (other, b2)))
        for i2, x2 in ((None, None), (other, b2)):
            same = ids[:, None, :, None] == (ids if i2 is None else i2)[None, :, None, :]
            want = torch.einsum("nmts,ntd,msd->nm", same.to(b.dtype), left, left if i2 is None else right)
            torch.testing.assert_close(ops.gram_embedding(ids, b, i2, x2, padding_idx=padding_idx), want)
        same = ids[:, :, None] == ids[:, None]
        torch.testing.assert_close(ops.sqnorm_embedding(ids, b, padding_idx=padding_idx),
                                   torch.einsum("nts,ntd,nsd->n", same.to(b.dtype), left, left))  # fmt: skip


@pytest.mark.skipif(dispatch.EXTENSION is not None, reason="needs the compiled library")
def test_a_negative_id_names_no_row_of_a_table():
    """The operations themselves, whose -1 says that there is no padding."""
    ids, b = torch.tensor([[-1, 1]]), torch.ones(1, 2, D)
    for call in (
        lambda: dispatch.registered("project_embedding")(ids, b, torch.ones(2, ROWS, D)),
        lambda: dispatch.registered("project_random_embedding")(ids, b, 2, ROWS, 3),
    ):
        with pytest.raises(RuntimeError, match="id -1 in a table of 5"):
            call()


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
