"""Groups of parameters, their options and gradients."""

import pytest
import torch
from optimising import BOTH, flat, tensors

from entangle_fast.optim import ProjectedAdamW, ProjectedMomentum
from entangle_fast.reference import philox


def grouped(make, **second):
    """The same optimiser on all parameters at once, and on two groups of them."""
    whole, parts = tensors(0), tensors(0)
    return whole, make(whole), parts, make([{"params": parts[:2]}, {"params": parts[2:], **second}])


@pytest.mark.parametrize("make", [lambda p: ProjectedAdamW(p), lambda p: ProjectedMomentum(p, lr=0.1)])
def test_the_span_is_one_over_all_groups(make):
    whole, one, parts, two = grouped(make)
    for k in range(3):
        g, a, b = (tensors(10 * k + i) for i in (1, 2, 3))
        torch.testing.assert_close(one.step(g, [a, b]), two.step(g, [a, b]), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(whole, parts, rtol=1e-10, atol=1e-12)


def test_groups_have_their_own_options():
    whole, one, parts, two = grouped(lambda p: ProjectedMomentum(p, lr=0.1), lr=0.3, weight_decay=0.5)
    g, d = tensors(1), tensors(2)
    one.step(g, [d])
    assert "step_norm" not in two.step(g, [d])
    torch.testing.assert_close(whole[:2], parts[:2])
    torch.testing.assert_close(parts[2], 0.85 * tensors(0)[2] - 0.3 * two.buffers[2])
    with pytest.raises(ValueError, match=r"directions\[0\]: 2 tensors for 3 parameters"):
        two.step(g, [d[:2]])
    before = flat(parts)
    with pytest.raises(ValueError, match=r"grads\[2\]"):  # of the second group: the first one's step must not have been taken
        two.step([*g[:2], torch.ones(7)])
    assert torch.equal(flat(parts), before)
    two.param_groups[1]["momentum"] = 0.5
    with pytest.raises(ValueError, match=r"momentum: groups have \[0.5, 0.9\]"):
        two.step(g, [d])


def test_groups_draw_their_own_noise():
    params = [torch.zeros(64), torch.zeros(64)]
    adamw = ProjectedAdamW([{"params": params[:1]}, {"params": params[1:], "noise": 0.25}], lr=0.0, noise=0.5, seed=7)
    adamw.step([torch.zeros(64), torch.zeros(64)])
    torch.testing.assert_close(params[0], 0.5 * philox.normal(64, 7, 1))
    torch.testing.assert_close(params[1], 0.25 * philox.normal(64, 7 + 2**32, 1))


@pytest.mark.parametrize("make", [lambda p: ProjectedAdamW(p), lambda p: ProjectedMomentum(p, lr=0.1)])
def test_what_stands_in_grad_is_stepped_and_the_rest_left_alone(make):
    given, held = tensors(0), tensors(0)
    g, d = tensors(1), tensors(2)
    held[0].grad, held[2].grad = g[0], g[2]
    mine, theirs = make([given[0], given[2]]), make(held)
    torch.testing.assert_close(mine.step([g[0], g[2]], [[d[0], d[2]]]), theirs.step(directions=[d]))
    torch.testing.assert_close([given[0], given[2]], [held[0], held[2]], rtol=0, atol=0)
    assert torch.equal(held[1], tensors(0)[1])
    theirs.zero_grad()
    with pytest.raises(ValueError, match="grads: got none, and no parameter has a .grad"):
        theirs.step()


@pytest.mark.parametrize("options, message", [
    ({"lr": "a"}, "lr: got str; needs a number"), ({"lr": -1.0}, "lr: got -1.0; needs a finite number >= 0"),
    ({"weight_decay": torch.nan}, "weight_decay: got nan"), ({"ridge": -1.0}, "ridge: got -1.0"), ({"ridge": None}, "ridge: got None"),
])  # fmt: skip
@pytest.mark.parametrize("make", [ProjectedAdamW, ProjectedMomentum])
def test_options_are_checked(make, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make(tensors(0), **{"lr": 0.1} | options)
    optimizer = make(tensors(0)[:1], lr=0.1)
    if "ridge" not in options:
        with pytest.raises((ValueError, TypeError), match=message):
            optimizer.add_param_group({"params": tensors(0)[1:], **options})
    with pytest.raises(ValueError, match="params: got one of torch.int64"):
        optimizer.add_param_group({"params": [torch.zeros(3, dtype=torch.int64)]})
    assert len(optimizer.param_groups) == 1 and len(optimizer.state) == 1


@BOTH
def test_a_wrong_option_of_the_second_group_leaves_the_first(make):
    params = tensors(0)
    mine = make([{"params": params[:1]}, {"params": params[1:]}])
    for name, value in (("lr", "a"), ("lr", torch.nan), ("weight_decay", None), ("betas", 0.9), ("noise", -1.0)):
        if (before := mine.param_groups[1].get(name)) is not None:
            mine.param_groups[1][name] = value
            with pytest.raises((ValueError, TypeError), match=f"^{name}: got"):
                mine.step(tensors(1))
            mine.param_groups[1][name] = before
    torch.testing.assert_close(params, tensors(0), rtol=0, atol=0)


@BOTH
@pytest.mark.parametrize("option", [{"nesterov": True}, {"maximize": True}, {"ridge": 1.0}, {"seed": 1}, {"project": "gradient"}])
def test_an_option_that_groups_do_not_have_is_refused(make, option):
    with pytest.raises(ValueError, match=f"{next(iter(option))}: got .* for a group"):
        make([{"params": tensors(0)} | option])


@BOTH
def test_memory_and_devices_are_looked_at_from_the_start(make):
    whole, spread = torch.zeros(6), torch.zeros(1).expand(3)
    for groups in ([{"params": whole[:4]}, {"params": whole[3:]}], [{"params": whole}, {"params": spread}], [whole[:4], whole[2:]]):
        with pytest.raises(ValueError, match=r"params\[1\]: .*share"):
            make(groups)
    with pytest.raises(ValueError, match="params: on cpu and meta"):
        make([{"params": torch.zeros(2)}, {"params": torch.zeros(2, device="meta")}])
    with torch.device("meta"):
        mine = make([whole])
    assert {x.device.type for x in mine.state[whole].values()} == {"cpu"}
    with torch.inference_mode():
        mine = make([whole])
    mine.step([torch.ones(6)])


@BOTH
def test_gradients_of_every_kind(make):
    g, groups = tensors(1), lambda p: [{"params": p[:1]}, {"params": p[1:]}]
    for split in (list, groups):
        given, listed = tensors(0), tensors(0)
        make(split(given)).step((x for x in g), ((x for x in d) for d in [tensors(2)]))
        make(listed).step(g, [tensors(2)])
        torch.testing.assert_close(given, listed, rtol=1e-12, atol=1e-14)
        mine = make(split(given))
        for wrong, error, message in (
            (g[:2], ValueError, "grads: 2 tensors for 3 parameters"), ([], ValueError, "grads: 0 tensors for 3"),
            ([x.numpy() for x in g], TypeError, r"grads\[0\]: got numpy.ndarray; needs a torch.Tensor: torch.from_numpy"),
            ([*g[:2], g[2].to_sparse()], ValueError, r"grads\[2\]: torch.sparse_coo; needs a dense one"),
        ):  # fmt: skip
            with pytest.raises(error, match=message):
                mine.step(wrong)
        torch.testing.assert_close(given, listed, rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match="grads: 0 tensors for 0 parameters"):
        make([{"params": []}]).step([])
    for coef in (torch.ones(1, dtype=torch.complex64), torch.ones(1, dtype=torch.int64)):
        with pytest.raises(ValueError, match="coef: dtype"):
            mine.step(g, [tensors(2)], coef)


@BOTH
def test_a_direction_alone_and_a_model_are_named(make):
    g = tensors(1)
    mine = make(tensors(0))
    for direction in (g, flat(g).view(1, -1)):
        with pytest.raises(TypeError, match=r"directions\[0\]: got a tensor; needs a list of 3 like params: give directions=\[direction\]"):
            mine.step(g, direction)
    with pytest.raises(TypeError, match="params: got Sequential; needs tensors, such as model.parameters"):
        make(torch.nn.Sequential(torch.nn.Linear(2, 2)))
