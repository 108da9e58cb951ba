"""What docstrings call equivalent is: each `Equivalent to: ``…``` is evaluated on the arguments that its function gets."""

import inspect
import operator
import re

import pytest
import torch
import torch.nn.functional as F

import entangle_fast as ef

SOME = torch.Generator().manual_seed(0)


def some(*shape):
    return torch.randn(*shape, generator=SOME, dtype=torch.float64)


def lists(k):
    return [[some(3, 2), some(4)] for _ in range(k)]


def flat(tensors):
    return torch.cat([x.flatten() for x in tensors])


def case(pick=lambda found: found, also=None, **arguments):
    """The function's arguments, what its equivalent reads also, and what of the result is compared."""
    return arguments, {"torch": torch, "F": F, **arguments, **(also or {})}, pick


first, second = operator.itemgetter(0), operator.itemgetter(1)
A, B, A2, B2, W = some(4, 3, 6), some(4, 3, 2), some(5, 3, 6), some(5, 3, 2), some(2, 4)
LAYERS, OTHERS = ([(some(n, 3), some(n, 2)), (some(n, 4), some(n, 3))] for n in (4, 5))
IMAGES = dict(x=some(4, 4, 6, 5), g=some(4, 6, 3, 5), stride=(2, 1), padding=(1, 1), dilation=(1, 2), groups=2)
KERNEL, SHAPE = (3, 2), (6, 2, 3, 2)
IDS = dict(ids=torch.randint(0, 5, (4, 3), generator=SOME), b=B)
LOSSES, REFERENCE = (some(7).abs().requires_grad_() for _ in range(2))
S, V = some(3, 20), some(20)
K, C = S @ S.T, S @ V
DIRECTIONS, (MOMENTUM, GRADS) = lists(2), lists(2)
DRAWS = {"philox": ef.reference.philox}
MODEL, X, Y = torch.nn.Linear(4, 3).double(), some(6, 4), torch.arange(6) % 3
STAGE1 = dict(remote_start=0.7, multiplier=torch.tensor(0.4), mu=3.0, gamma=2.0, clip=0.8)

CASES = {
    "ops.combine": case(a=A, b=B, w=W),
    "ops.combine_conv": case(also={"shape": SHAPE}, w=W, kernel_size=KERNEL, **IMAGES),
    "ops.combine_embedding": case(w=W.float(), num_embeddings=5, ids=IDS["ids"], b=B.float()),
    "ops.gram": case(also={"G2": torch.einsum("nto,nti->noi", B2, A2).flatten(1)}, a=A, b=B, a2=A2, b2=B2),
    "ops.gram_conv": case(also={"shape": SHAPE}, kernel_size=KERNEL, **IMAGES),
    "ops.gram_embedding": case(ids2=IDS["ids"].flip(1), b2=some(4, 3, 2), **IDS),
    "ops.gram_layers": case(layers=LAYERS, others=OTHERS),
    "ops.linear_sample_loss": case(
        also={"sample_loss": ef.ops.sample_loss}, h=some(4, 5), weight=some(3, 5), bias=some(3), target=torch.arange(4) % 3),
    "ops.project": case(a=A, b=B, basis=some(3, 2, 6)),
    "ops.project_conv": case(also={"shape": SHAPE}, basis=some(3, *SHAPE), **IMAGES),
    "ops.project_embedding": case(basis=some(3, 5, 2), **IDS),
    "ops.project_random": case(also=DRAWS, a=A, b=B, k=3, seed=5, offset=2),
    "ops.project_random_conv": case(
        also={"shape": SHAPE, "project_conv": ef.ops.project_conv, **DRAWS}, kernel_size=KERNEL, k=3, seed=5, offset=2, **IMAGES),
    "ops.project_random_embedding": case(also=DRAWS, k=3, num_embeddings=5, seed=5, offset=2, **IDS),
    "ops.sample_loss": case(logits=some(6, 3), target=Y),
    "ops.sqnorm": case(a=A, b=B),
    "ops.sqnorm_conv": case(also={"shape": SHAPE}, kernel_size=KERNEL, **IMAGES),
    "ops.sqnorm_embedding": case(**IDS),
    "ops.step_gram": case(directions=DIRECTIONS),
    "ops.step_project": case(
        second, {"D": torch.stack([flat(d) for d in DIRECTIONS]), "v": flat(MOMENTUM), "g": flat(GRADS)},
        directions=DIRECTIONS, momentum=MOMENTUM, grads=GRADS, beta=0.9),
    "ops.w2_features": case(first, features=some(6, 3), reference=some(8, 3)),
    "ops.w2_moments": case(first, losses=some(6), reference=some(8)),
    "ops.w2_sorted": case(first, losses=LOSSES, reference=REFERENCE),
    "weights.clipped": case(losses=LOSSES, clip=0.8),
    "weights.clipped_norms": case(sqnorms=some(8).abs(), bound=0.8),
    "weights.damped": case(
        lambda found: found[0] * V + found[1] @ S, {"S": S, "v": V}, gram=K, cross=C, damping=0.3),
    "weights.lagrangian": case(lambda found: (found.forget, found.remote), forget=LOSSES, remote=REFERENCE, **STAGE1),
    "weights.means": case(losses=LOSSES),
    "weights.project_onto": case(also={"S": S, "v": V}, gram=K, cross=C),
    "weights.solve": case(gram=K, rhs=C, ridge=0.5),
    "weights.w2": case(second, values=LOSSES, reference=REFERENCE),
    "tasks.embed": case(model=torch.nn.Sequential(MODEL, torch.nn.Tanh(), torch.nn.Linear(3, 2).double()), data=X),
    "metrics.accuracy": case(model=MODEL, data=(X, Y)),
    "metrics.gradient_angle": case(model=MODEL, forget=(X[:3], Y[:3]), retain=(X[3:], Y[3:])),
    "metrics.predict": case(model=MODEL, data=X),
    "metrics.sample_losses": case(model=MODEL, data=(X, Y)),
}  # fmt: skip


def plain(function, names):
    text = " ".join(re.search(r"Equivalent to: ``(.*?)``", inspect.getdoc(function), re.DOTALL)[1].split())
    *before, last = text.split("; ")
    for line in before:
        exec(line, names)
    return eval(last, names)


@pytest.mark.parametrize("name", CASES)
def test_equivalent(name):
    room, function = name.split(".")
    function = getattr(getattr(ef, room), function)
    arguments, names, pick = CASES[name]
    theirs = plain(function, dict(names))
    torch.testing.assert_close(pick(function(**arguments)), theirs, check_dtype=False)


def test_steps_that_write():
    """The equivalents of what changes its arguments."""
    params, grads = lists(2)
    before = [p.clone() for p in params]
    options = {"lr": 0.1, "weight_decay": 0.2, "noise": 0.0}
    theirs = plain(ef.optim.decay_noise_step, {"params": before, "grads": grads, "torch": torch, **options})
    ef.optim.decay_noise_step(params, grads, **options)
    torch.testing.assert_close(params, theirs)
    copies = [p.clone() for p in params]
    ef.ops.step_lookahead(params, grads, 0.3)
    plain(ef.ops.step_lookahead, {"params": copies, "grads": grads, "alpha": 0.3, "torch": torch})
    torch.testing.assert_close(params, copies)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["sign", "gaussian"])
def test_random_directions_of_a_tape(kind, dtype):
    model, x = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 3)).to(dtype), X.to(dtype)
    model.unused = torch.nn.Parameter(torch.ones(2, dtype=dtype))
    with ef.capture(model) as tape:
        tape.backward(model(x).square().sum(1))
    names = {"tape": tape, "philox": ef.reference.philox, "k": 9, "seed": 5, "kind": kind, "torch": torch}
    tolerance = dict(rtol=1e-10, atol=1e-10) if (dtype, kind) == (torch.float64, "sign") else dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tape.project_random(9, seed=5, kind=kind), plain(ef.Tape.project_random, names), **tolerance)


@pytest.mark.parametrize("ours, theirs, options", [
    (ef.optim.ProjectedMomentum, torch.optim.SGD, {"momentum": 0.9}),
    (ef.optim.ProjectedAdamW, torch.optim.AdamW, {"weight_decay": 0.1}),
])  # fmt: skip
def test_without_directions_optimisers_are_torchs(ours, theirs, options):
    params, grads = lists(2)
    copies = [p.clone() for p in params]
    mine, other = ours(params, lr=0.1, **options), theirs(copies, lr=0.1, **options)
    for _ in range(3):
        mine.step(grads, [])
        for p, g in zip(copies, grads):
            p.grad = g
        other.step()
    torch.testing.assert_close(params, copies)


def test_every_equivalent_has_a_case():
    found = {f"{room}.{name}" for room in ("ops", "weights", "tasks", "metrics") for name in getattr(ef, room).__all__
             if "Equivalent to: ``" in (inspect.getdoc(getattr(getattr(ef, room), name)) or "")}  # fmt: skip
    assert found == set(CASES) | {"ops.step_lookahead"}
