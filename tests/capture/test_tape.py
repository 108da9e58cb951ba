"""What a user sees of a tape: its line, its names, and what it says of losses that are none."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import entangle_fast as ef

N = 4
PUBLIC = ["backward", "combine", "gram", "n", "names", "params", "per_sample", "project", "project_random", "sqnorms"]


def model():
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))


def losses(net, n=N):
    return net(torch.randn(n, 3)).square().sum(1)


def test_only_what_is_for_users_is_listed():
    with ef.capture(model()) as tape:
        assert [name for name in dir(tape) if not name.startswith("_")] == PUBLIC


def test_it_is_one_line():
    net = model()
    with ef.capture(net) as tape:
        assert repr(tape) == "Tape(no samples yet, 2 layers, 4 parameters, float32 on cpu, no backward yet)"
        values = losses(net)
        assert repr(tape).startswith("Tape(4 samples, 2 layers, ")
        tape.backward(values)
    # a (4, 3), b (4, 5), which the bias shares, a (4, 5), b (4, 2)
    assert repr(tape) == "Tape(4 samples, 2 layers, 4 parameters, float32 on cpu, 240 B held)"
    with ef.capture(net) as streamed:
        streamed.backward(losses(net), stream=("gram", "sqnorms"))
    assert repr(streamed).endswith("float32 on cpu, streamed: gram, sqnorms)")
    net[0].double()
    with ef.capture({"w": net[0].weight, "v": net[2].weight}) as tape:
        assert "1 layer, 2 parameters, float32 on cpu and float64 on cpu" in repr(tape)


def test_a_large_tape_says_so():
    net, ids = nn.Embedding(9, 250), torch.zeros(1000, 1, dtype=torch.int64)
    with ef.capture(net) as tape:
        tape.backward(net(ids).square().sum((1, 2)))
    assert repr(tape).endswith(" 1.01 MB held)"), repr(tape)


def test_a_broken_backward_is_in_the_line():
    net = model()
    net[1].register_full_backward_hook(lambda *_: 1 / 0)
    with ef.capture(net) as tape:
        values = losses(net)
        with pytest.raises(ZeroDivisionError):
            tape.backward(values)
    assert repr(tape).endswith("its backward was broken off)")


@pytest.mark.parametrize("wrong, error, message", [
    (lambda x: x.detach(), ef.CaptureError, r"losses: they depend on no trainable parameter .* \.detach\(\), \.item\(\) or numpy"),
    (lambda x: x.detach().numpy(), TypeError, "losses: got ndarray; needs a tensor .n,., one loss per sample: compute them with torch"),
    (lambda x: x.mean().item(), TypeError, r"losses: got float; .*: use reduction='none', and no \.item\(\)"),
    (lambda x: x.mean(), ValueError, "losses: got an already reduced loss; .*: use reduction='none'"),
    (lambda x: x.tolist(), TypeError, "losses: got list; .*: torch.stack them"),
    (lambda x: None, TypeError, "losses: got NoneType; needs a tensor"),
])  # fmt: skip
def test_losses_that_are_none(wrong, error, message):
    net = model()
    with ef.capture(net) as tape:
        values = losses(net)
        with pytest.raises(error, match=message):
            tape.backward(wrong(values))
        tape.backward(values)  # the tape is as it was
    torch.testing.assert_close(tape.sqnorms(), tape.gram().diagonal())


def test_swapped_arguments_of_a_loss_are_torchs_to_name():
    net, y = model(), torch.zeros(N, dtype=torch.int64)
    with pytest.raises(RuntimeError), ef.capture(net) as tape:
        tape.backward(F.cross_entropy(y, net(torch.randn(N, 3)), reduction="none"))
    with ef.capture(net) as tape:  # and the model is free again
        tape.backward(losses(net))


def test_a_direction_alone_is_named():
    net = model()
    with ef.capture(net) as tape:
        tape.backward(losses(net))
    g = tape.combine(torch.ones(N))
    with pytest.raises(ValueError, match=r"directions\[0\]: needs 4 tensors shaped like tape.params, in that order: give project"):
        tape.project(g)
    assert tape.project([g]).shape == (N, 1)
