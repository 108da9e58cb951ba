"""step(closure): torch's contract, beside what a step of ours has to say; and steps that are NaN by rule."""

import copy
import pickle

import pytest
import torch
from optimising import BOTH, flat, tensors

SLOPE = torch.arange(3.0)


def made(make):
    p = torch.nn.Parameter(torch.ones(3))
    mine = make([p])

    def closure():
        mine.zero_grad()
        loss = (p * SLOPE).sum()
        loss.backward()
        return loss

    return p, mine, closure


@BOTH
def test_a_closure_is_called_first_and_its_loss_returned(make):
    found = []
    for call in (lambda o, c: o.step(c), lambda o, c: o.step(closure=c), lambda o, c: o.step(c, [[torch.ones(3)]])):
        p, mine, closure = made(make)
        with torch.no_grad():
            loss = call(mine, closure)
        assert float(loss.detach()) == 3.0 and loss.requires_grad
        found.append(p.detach())
    q, r = torch.ones(3), torch.ones(3)
    make([q]).step([SLOPE])
    make([r]).step([SLOPE], [[torch.ones(3)]])
    torch.testing.assert_close(found, [q, q, r])


@BOTH
def test_facts_are_those_of_the_last_step(make):
    p, mine, closure = made(make)
    assert mine.facts == {}
    told = mine.step([SLOPE], [[torch.ones(3)]])
    assert mine.facts is told and float(told["removed"]) > 0
    mine.step(closure, [[torch.ones(3)]])
    assert mine.facts is not told and float(mine.facts["removed"]) > 0
    before = mine.facts
    with pytest.raises(ValueError):
        mine.step([SLOPE, SLOPE])
    assert mine.facts is before
    for twin in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        torch.testing.assert_close(twin.facts, before)
    assert "facts" not in mine.state_dict()


@BOTH
def test_closures_that_are_none(make):
    p, mine, closure = made(make)
    for call, error, message in (
        (lambda: mine.step([SLOPE], closure=closure), ValueError, "closure: got grads too; needs one of the two"),
        (lambda: mine.step(closure, closure=closure), ValueError, "closure: got two functions; needs one"),
        (lambda: mine.step(closure=3), TypeError, "closure: got int; needs a function"),
        (lambda: mine.step(lambda: None), ValueError, "grads: got none, and no parameter has a .grad"),
    ):
        with pytest.raises(error, match=message):
            call()
    assert torch.equal(p, torch.ones(3)) and mine.facts == {}


@BOTH
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_direction_that_is_not_finite_makes_the_step_nan(make, value):
    """As the docstrings say: all of it, not the one entry."""
    params, wrong = tensors(0), tensors(2)
    wrong[1][0] = value
    make(params).step(tensors(1), [tensors(3), wrong])
    assert flat(params).isnan().all()
