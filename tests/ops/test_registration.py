"""Every operation as torch sees it: opcheck, shapes of fake tensors, torch.compile."""

import pytest
import torch
from cases import OPS, arguments
from torch._subclasses.fake_tensor import FakeTensorMode

import entangle_fast as ef
from entangle_fast import dispatch, ops, reference


def op(name):
    return getattr(torch.ops.entangle_fast, name).default


def test_every_schema_has_a_case():
    assert sorted(OPS) == sorted(dispatch.ops())


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name):
    differentiable = not any(part in name for part in ("_backward", "step"))
    kinds = ["test_schema", "test_autograd_registration", "test_faketensor"]
    early = torch.__version__.startswith("2.11.") and name == "combine_conv"  # its convolution's double backward needs real sizes
    if name != "step_lookahead" and not early:  # torch cannot functionalise an in-place op that also returns lists
        kinds.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(op(name), arguments(grad=differentiable)[name], test_utils=kinds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", OPS)
def test_fake_is_like_real(name, dtype):
    if name == "step_lookahead":
        pytest.skip("the number of far elements depends on the data")
    args = arguments(dtype)[name]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = op(name)(*torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, args))
    real = op(name)(*args)
    for f, r in zip(*(torch.utils._pytree.tree_leaves(x) for x in (fake, real))):
        if isinstance(r, torch.Tensor):
            assert (f.shape, f.dtype, f.device, f.stride()) == (r.shape, r.dtype, r.device, r.stride())


@pytest.mark.parametrize("name", ["combine", "combine_conv", "combine_embedding"])
def test_fake_sums_with_float64_weights_are_float64(name):
    args = list(arguments()[name])
    args[2] = args[2].double()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = op(name)(*torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, args))
    assert fake.dtype == op(name)(*args).dtype == torch.float64


DIFFERENTIABLE = [name for name in OPS if not any(part in name for part in ("_backward", "step", "sample_loss"))]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_derivatives_are_those_of_the_reference_twice(name):
    def twice(function):
        args = arguments(torch.float64, grad=True)[name]
        given = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor) and x.is_floating_point()]
        for x in given:
            x.requires_grad_()
        out = function(*args)
        outputs = out if isinstance(out, tuple) else (out,)
        first = torch.autograd.grad(sum(x.square().sum() for x in outputs), given, create_graph=True)
        again = torch.autograd.grad(sum(x.square().sum() for x in first), given, allow_unused=True, materialize_grads=True)
        return *first, *again

    # normals are drawn in float32
    torch.testing.assert_close(twice(op(name)), twice(getattr(reference, name)), rtol=1e-5, atol=1e-6)


def test_sample_loss_has_a_second_derivative():
    logits, target = torch.randn(5, 7, dtype=torch.float64), torch.randint(0, 7, (5,))
    loss = op("sample_loss")
    assert torch.autograd.gradgradcheck(lambda x: loss(x, target, float("inf"), 0.1, -100, 0.05)[0], logits.requires_grad_())


def test_nothing_has_derivatives_of_zero():
    a, b = torch.randn(5, 6, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    for found in (op("combine")(a, b, torch.empty(0, 5)), op("project")(a, b, torch.empty(0, 4, 6)), op("gram")(a[:0], b[:0])):
        for x, grad in zip((a, b), torch.autograd.grad(found, (a, b), torch.ones_like(found))):
            assert torch.equal(grad, torch.zeros_like(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lookahead_with_a_capacity_is_of_a_known_size(dtype):
    args = (*arguments(dtype)["step_lookahead"], 3)
    torch.library.opcheck(op("step_lookahead"), args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        _, index, value = op("step_lookahead")(*torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, args))
    _, real, kept = op("step_lookahead")(*args)
    for f, r in ((index, real), (value, kept)):
        assert (f.shape, f.dtype, f.stride()) == (r.shape, r.dtype, r.stride()) and f.shape[0] == 3


def test_compile_without_a_graph_break():
    a, b = torch.randn(5, 3, 6), torch.randn(5, 3, 4)
    logits, target = torch.randn(5, 7, requires_grad=True), torch.randint(0, 7, (5,))

    def gram(a, b):
        return ef.ops.gram(a, b).sum(0)

    def loss(logits, target):
        return ef.ops.sample_loss(logits, target, clip=1.5, penalty=0.1)

    torch.testing.assert_close(torch.compile(gram, fullgraph=True, backend="aot_eager")(a, b), gram(a, b))
    got, want = torch.compile(loss, fullgraph=True, backend="aot_eager")(logits, target), loss(logits, target)
    torch.testing.assert_close(got, want)
    w = torch.randn(5)
    for x, y in zip(torch.autograd.grad(got, logits, w), torch.autograd.grad(want, logits, w)):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("name", sorted(ops.__all__))
def test_public_operations_have_a_docstring(name):
    assert getattr(ops, name).__doc__
