"""Tape.project_random against its definition: autograd's gradients, one sample at a time, times the numbers of reference/philox.py."""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracle import Case, close, flat, per_sample, tape_of
from torch import nn
from zoo import ZOO, Via, lively, simple, squares, weight

import entangle_fast as ef
from entangle_fast.capture.contract import Contraction
from entangle_fast.reference import philox

CHUNK = "entangle_fast.reference.per_sample.CHUNK_BYTES"


def onto(grads: dict, k: int, seed: int, kind: str = "sign") -> torch.Tensor:
    """The definition, in float64."""
    total = 0
    for i, g in enumerate(grads.values()):
        size = g[0].numel()
        total = total + g.reshape(len(g), size).double() @ philox.directions(k, size, seed, i, kind).double().T
    return total


@pytest.mark.parametrize("name", ZOO)
def test_the_definition(name, monkeypatch):
    torch.manual_seed(2)
    case = ZOO[name]()
    batch = case.batch(case.n)
    grads, tape = per_sample(case, batch), tape_of(case, batch)
    assert list(grads) == tape.names
    for chunk in (64 << 20, 1):
        monkeypatch.setattr(CHUNK, chunk)
        close(tape.project_random(5, seed=2**40 + 7), onto(grads, 5, 2**40 + 7), 1e-10, "sign")
        with monkeypatch.context() as patched:  # elsewhere normals differ in the last place of float32
            patched.setenv("ENTANGLE_FAST_BACKEND", "reference")
            close(tape.project_random(3, seed=-3, kind="gaussian"), onto(grads, 3, -3, "gaussian"), 1e-10, "gaussian")
    close(tape.project_random(3, seed=-3, kind="gaussian"), onto(grads, 3, -3, "gaussian"), 1e-4, "gaussian, the default backend")


def everything():
    """A table tied to the output, positions, a grouped convolution, norms, LoRA beside and inside a weight, and what takes no part."""

    def forward(s, ids):
        x = s.table(ids) + s.position[: ids.shape[1]]
        x = s.norm(s.conv(x.mT).mT) @ s.mix
        x = F.linear(F.linear(x, s.a), s.b) + F.linear(x, s.base.weight + s.d @ s.c, s.base.bias)
        return x.mean(1) @ s.table.weight.mT

    net = Via(forward, unused=weight(3), table=nn.Embedding(9, 8, padding_idx=2), position=weight(6, 8), conv=nn.Conv1d(8, 8, 3, groups=2),
              norm=nn.LayerNorm(8), mix=weight(8, 8), a=weight(2, 8), b=weight(8, 2), base=nn.Linear(8, 8), c=weight(2, 8),
              d=weight(8, 2))  # fmt: skip
    return Case(lively(net), lambda n: {"ids": torch.randint(0, 9, (n, 5))}, lambda net, b: squares(net(b["ids"])))


@pytest.mark.parametrize("n", [1, 7])
def test_any_number_of_samples_and_directions(n):
    case = everything()
    batch = case.batch(n)
    batch["ids"][0, :2] = 2
    grads, tape = per_sample(case, batch), tape_of(case, batch)
    sketch = tape.project_random(140, seed=1)
    close(sketch, onto(grads, 140, 1), 1e-10, "all")
    assert sketch.dtype == torch.float64
    for k in (0, 1, 33, 129):
        found = tape.project_random(k, seed=1)
        assert found.shape == (n, k)
        close(found, sketch[:, :k], 1e-12, "the first ones")
    assert not torch.equal(tape.project_random(140, seed=2), sketch)


def floats(batch, dtype):
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [everything, ZOO["mlp"], ZOO["cnn_groupnorm_frozen_batchnorm"], ZOO["llama_tied"]])
def test_low_precision_is_as_good_as_plain_pytorch(make, dtype):
    """Against float64 of the same values, at most twice the error of gradients by autograd in that dtype times the same directions."""
    case, wide = make(), make()
    case.model.to(dtype)
    wide.model = copy.deepcopy(case.model).double()
    batch = floats(case.batch(16), dtype)
    truth, plain = onto(per_sample(wide, floats(batch, torch.float64)), 64, 3), onto(per_sample(case, batch), 64, 3)
    found = tape_of(case, batch).project_random(64, seed=3)
    assert found.dtype == torch.float32
    assert (found - truth).norm() <= 2 * (plain - truth).norm() + 1e-6 * truth.norm()


def fails(*_):
    raise AssertionError("a gradient was formed")


def test_what_has_a_factored_form_is_not_formed(monkeypatch):
    """Transposed weights too, and views of whole ones."""

    def forward(s, ids):
        x = s.table(ids) @ s.mix
        x = s.conv(x.mT).mT.mean(1) + F.linear(x[:, 0], s.long.view(8, 8))
        return torch.addmm(s.bias, x, s.down) @ s.table.weight[:, :3].contiguous().detach().mT @ s.vector.view(9, 1) + x @ s.column

    net = Via(forward, table=nn.Embedding(9, 8), mix=weight(8, 8), conv=nn.Conv1d(8, 8, 3), long=weight(64), bias=weight(3),
              down=weight(8, 3), vector=weight(9), column=weight(8, 1))  # fmt: skip
    case = Case(lively(net), lambda n: {"ids": torch.randint(0, 9, (n, 5))}, lambda net, b: squares(net(b["ids"])))
    batch = case.batch(4)
    grads, tape = per_sample(case, batch), tape_of(case, batch)
    monkeypatch.setattr(Contraction, "per_sample", fails)
    close(tape.project_random(9, seed=4), onto(grads, 9, 4), 1e-10, "all")


def test_directions_are_drawn_once_where_parameters_are_small(monkeypatch):
    """LoRA merged into its weight: formed a sample at a time, drawn for all."""
    case = simple(Via(lambda s, x: F.linear(x, s.b @ s.a), a=weight(1, 40), b=weight(40, 1)), 40)
    batch = case.batch(6)
    tape, calls, spans, op, form = tape_of(case, batch), [], [], ef.ops.project_random, Contraction.per_sample
    monkeypatch.setattr(CHUNK, 4 * 80 * 6)
    monkeypatch.setattr(ef.ops, "project_random", lambda a, *rest, **named: calls.append(len(a)) or op(a, *rest, **named))
    monkeypatch.setattr(Contraction, "per_sample", lambda self, lo, hi: spans.append((lo, hi)) or form(self, lo, hi))
    found = tape.project_random(8, seed=0)
    assert calls == [6, 6] and spans == [(i, i + 1) for i in range(6)]
    close(found, onto(per_sample(case, batch), 8, 0), 1e-10, "LoRA")


@pytest.mark.parametrize("backend", ["reference", ""])
def test_rows_that_do_not_occur_are_not_drawn(backend, monkeypatch):
    """Or this would take years."""
    monkeypatch.setenv("ENTANGLE_FAST_BACKEND", backend)
    ids, b = torch.tensor([[2**40 - 1, 5]]), torch.ones(1, 2, 3)
    found = ef.ops.project_random_embedding(ids, b, 130, 2**40, seed=3)
    elements = (ids.T * 3 + torch.arange(3)).flatten()
    rows = torch.stack([d.sum() for d in philox.each_direction(130, elements, 3 * 2**40, 3)])
    assert torch.equal(found[0], rows)


def test_it_estimates_the_gram():
    case, k = everything(), 4096
    tape, new = (tape_of(case, case.batch(n)) for n in (12, 10))
    estimate = tape.project_random(k, seed=5) @ new.project_random(k, seed=5).T / k
    lengths = torch.outer(tape.sqnorms().sqrt(), new.sqnorms().sqrt())
    error = ((estimate - tape.gram(new)) / lengths).square().mean().sqrt() * k**0.5
    assert 0.5 < error < 2


def test_bad_arguments_are_named():
    case = simple(nn.Linear(4, 3), 4)
    tape = tape_of(case, case.batch(3))
    for arguments, error, message in (
        (dict(k=-1, seed=0), ValueError, "k: got -1; needs a number of directions >= 0"),
        (dict(k=2.5, seed=0), TypeError, "k: got float; needs a whole number"),
        (dict(k="2", seed=0), TypeError, "k: got str; needs a whole number"),
        (dict(k=2, seed=None), TypeError, "seed: got None; needs a whole number"),
        (dict(k=2, seed=0.5), TypeError, "seed: got float; needs a whole number"),
        (dict(k=2, seed=2**63), ValueError, "seed: got 9223372036854775808; needs an integer of 64 bits"),
        (dict(k=2, seed=0, kind="normal"), ValueError, "kind: got 'normal'; needs one of 'sign', 'gaussian'"),
    ):
        with pytest.raises(error) as raised:
            tape.project_random(**arguments)
        assert str(raised.value).startswith(message), str(raised.value)
    assert tape.project_random(2, seed=0).shape == (3, 2)


def test_tapes_that_cannot_answer():
    model = nn.Linear(4, 3)
    with ef.capture(model) as tape:
        losses = model(torch.randn(3, 4)).square().sum(1)
        with pytest.raises(ef.CaptureError, match="no backward yet"):
            tape.project_random(2, seed=0)
        with pytest.raises(ValueError, match="^k: got -1"):
            tape.project_random(-1, seed=0)
        tape.backward(losses, stream=("gram",))
    with pytest.raises(ef.CaptureError, match="only gram can be asked"):
        tape.project_random(2, seed=0)


def test_gradients_that_are_not_finite_are_not_hidden():
    model = nn.Linear(4, 3)
    x = torch.randn(3, 4)
    x[1, 2] = torch.inf
    with ef.capture(model) as tape:
        tape.backward(model(x).square().sum(1))
    assert tape.project_random(5, seed=0).isfinite().all(1).tolist() == [True, False, True]
    assert flat(tape.per_sample()).isfinite().all(1).tolist() == [True, False, True]
