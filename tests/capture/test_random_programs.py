"""Random programs: exact, or refused by name; never silent, never another error."""

import pytest
import torch
from oracle import close
from random_programs import Program

import entangle_fast as ef

HOW = ("strict", "general", "functional", "streamed", "checkpointed")


def gradients(program: Program) -> torch.Tensor | None:
    """(n, P) by autograd, one sample at a time; None where plain torch refuses the program."""
    weights = list(program.weights.values())
    try:
        rows = [torch.autograd.grad(loss, weights, retain_graph=True, materialize_grads=True) for loss in program(program.x)]
    except RuntimeError:
        return None
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def tape_of(program: Program, how: str, w: torch.Tensor):
    watched = dict(program.weights) if how == "functional" else program
    size = {"batch_size": program.n} if how == "functional" else {}
    options = {"stream": ("gram", "sqnorms", "combine"), "weights": w} if how == "streamed" else {}
    with ef.capture(watched, batch_dim=program.batch_dim, strict=how != "general", **size) as tape:
        losses = program(program.x)
        tape.backward(losses, **options)
    return tape, losses


def exact(program: Program, how: str) -> bool | None:
    """None: no program.  False: refused."""
    g = gradients(program) if program.drawn else None
    if g is None or g.abs().max() < 1e-6:
        return None
    program.checkpointed = how == "checkpointed"
    w = torch.linspace(-1, 2, program.n).double()
    try:
        tape, losses = tape_of(program, how, w)
        gram, sqnorms, mean = tape.gram(), tape.sqnorms(), tape.combine() if how == "streamed" else tape.combine(w)
    except (ef.CaptureError, ValueError, TypeError):
        return False
    program.checkpointed = False
    close(losses, program(program.x), 1e-9, "losses")
    close(gram, g @ g.T, 1e-8, "gram")
    close(sqnorms, g.square().sum(1), 1e-8, "sqnorms")
    size = g.abs().max().item()
    assert (torch.cat([d.flatten() for d in mean]) - w @ g).abs().max() <= 1e-8 * size, "combine"
    return True


def run(how: str, programs: int, seed: int) -> None:
    found = {True: 0, False: 0}
    while sum(found.values()) < programs:
        seed += 1
        program = Program(seed)
        try:
            result = exact(program, how)
        except Exception as error:
            pytest.fail(f"{how}, Program({seed}): {type(error).__name__}: {error}\n{program.text}")
        if result is not None:
            found[result] += 1
    assert found[True] > programs // 4, found  # refusing everything is no way out


@pytest.mark.parametrize("how", HOW)
def test_some(how):
    run(how, 80, 1000 * HOW.index(how))


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_many(how):
    run(how, 4000, 100_000 * (1 + HOW.index(how)))
