"""What torch refuses without a capture is refused inside one: nothing is converted in silence."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import entangle_fast as ef

LAYERS = [(nn.Linear(8, 3), (4, 8)), (nn.Conv1d(2, 3, 3), (4, 2, 8)), (nn.LayerNorm(8), (4, 8)), (nn.GroupNorm(2, 8), (4, 8))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
@pytest.mark.parametrize("layer, shape", LAYERS, ids=lambda x: type(x).__name__)
def test_an_input_of_another_dtype(layer, shape, dtype):
    x = (5 * torch.randn(shape)).to(dtype)
    with pytest.raises(RuntimeError):
        layer(x)
    with pytest.raises((ef.CaptureError, RuntimeError)), ef.capture(layer):
        layer(x)


def test_autocast_converts():
    layer = nn.Linear(8, 3)
    with torch.autocast("cpu", torch.bfloat16), ef.capture(layer) as tape:
        out = layer(torch.randn(4, 8))
        tape.backward(out.float().square().sum(1))
    assert out.dtype == torch.bfloat16 and tape.gram().isfinite().all()


@pytest.mark.parametrize("bias", [(3,), (3, 1), (1,)])
def test_autocast_of_addmm_casts_what_is_added(bias):
    x, params = torch.randn(4, 8), {"w": torch.randn(3, 8, requires_grad=True), "b": torch.randn(bias, requires_grad=True)}

    def forward():
        return torch.addmm(params["b"], x, params["w"].T) if bias == (3,) else torch.addmm(params["b"], params["w"], x.T).T

    with torch.autocast("cpu", torch.bfloat16):
        plain = forward()
        with ef.capture(params, batch_size=4) as tape:
            out = forward()
            tape.backward(out.float().square().sum(1))
    assert out.dtype == plain.dtype == torch.bfloat16
    product = (x @ params["w"].T).abs().max().item()  # it is rounded here before anything is added
    torch.testing.assert_close(out, plain, rtol=0.016, atol=torch.finfo(out.dtype).eps * product)


def drawn(*shapes):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for shape in shapes]


# parameters' shapes, and a product of x (4, 5, 8) with them
PRODUCTS = {
    "linear": ([(3, 8), (3,)], F.linear),
    "linear, a vector": ([(8,)], F.linear),
    "linear, of one": ([(3, 1)], lambda x, w: F.linear(x[..., :1], w)),
    "matmul": ([(8, 3)], torch.matmul),
    "matmul, a vector": ([(8,)], torch.matmul),
    "matmul, weight first": ([(3, 8)], lambda x, w: w @ x.mT),
    "mm": ([(8, 3)], lambda x, w: torch.mm(x[:, 0], w)),
    "mv": ([(8,)], lambda x, w: torch.mv(x[:, 0], w)),
    "linalg.matmul": ([(8, 3)], torch.linalg.matmul),
    "einsum": ([(3, 8)], lambda x, w: torch.einsum("nti,oi->nto", x, w)),
    "einsum, nothing added up": ([(3,)], lambda x, w: torch.einsum("nti,o->ntio", x, w)),
    "einsum, of one": ([(3, 1)], lambda x, w: torch.einsum("nti,oi->nto", x[..., :1], w)),
    "addmm": ([(3,), (8, 3)], lambda x, b, w: torch.addmm(b, x[:, 0], w, beta=2)),
    "addmm, a bias alone": ([(5,)], lambda x, b: torch.addmm(b, x[:, 0], torch.ones(8, 5))),
    "addmv": ([(1,), (8,)], lambda x, b, w: torch.addmv(b, x[:, 0], w)),
    "addmv, a bias alone": ([()], lambda x, b: b.addmv(x[:, 0], torch.ones(8))),
    "baddbmm": ([(8,)], lambda x, b: torch.baddbmm(b[:5], x, x.mT)),
    "addr": ([(3,), (3,)], lambda x, b, w: torch.addr(b, x[:, 0, 0], w)),
    "outer": ([(3,)], lambda x, w: torch.outer(x[:, 0, 0], w)),
    "inner": ([(3, 8)], torch.inner),
    "inner, of one": ([(3, 1)], lambda x, w: torch.inner(x[..., :1], w)),
    "inner, 0-d": ([()], torch.inner),
    "tensordot": ([(8, 3)], lambda x, w: torch.tensordot(x, w, 1)),
    "tensordot, nothing added up": ([(3,)], lambda x, w: torch.tensordot(x, w, 0)),
    "chain_matmul": ([(8, 3), (3, 2)], lambda x, w, v: torch.chain_matmul(x[:, 0], w, v)),
    "multi_dot": ([(8, 3), (3, 2)], lambda x, w, v: torch.linalg.multi_dot([x[:, 0], w, v])),
    "vecdot": ([(8,)], torch.linalg.vecdot),
    "conv1d": ([(3, 5, 3), (3,)], F.conv1d),
    "convolution": ([(3, 5, 3), (3,)], lambda x, w, b: torch.convolution(x, w, b, [1], [0], [1], False, [0], 1)),
    "prelu": ([(5,)], torch.prelu),
    "bmm": ([(8, 3)], lambda x, w: torch.bmm(x, w.expand(len(x), 8, 3))),
    "attention": ([(5, 8)], lambda x, k: F.scaled_dot_product_attention(x, k.expand(len(x), 5, 8), x)),
    "bilinear": ([(2, 8, 8)], lambda x, w: F.bilinear(x, x, w)),
}


@pytest.mark.filterwarnings("ignore:torch.chain_matmul is deprecated", "ignore:There is a performance drop")
@pytest.mark.parametrize("name", PRODUCTS)
def test_autocast_rounds_what_it_rounds_without_a_capture(name):
    """On a CPU it leaves mv, addmv, addr, outer, convolution and products of einsum that add nothing up in float32."""
    shapes, forward = PRODUCTS[name]
    x, *values = drawn((4, 5, 8), *shapes)
    params = {str(i): v.requires_grad_() for i, v in enumerate(values)}
    with torch.autocast("cpu", torch.bfloat16):
        plain = forward(x, *params.values())
        with ef.capture(params, batch_size=4, strict=name != "bilinear") as tape:
            out = forward(x, *params.values())
            tape.backward(out.float().square().flatten(1).sum(1) if out.dim() > 1 else out.float().square())
    assert out.dtype == plain.dtype
    eps = torch.finfo(plain.dtype).eps
    torch.testing.assert_close(out, plain, rtol=4 * eps, atol=4 * eps * plain.abs().max().item())


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("name", ["einsum, nothing added up", "einsum, of one"])
def test_products_that_add_nothing_up_promote(name, cast):
    """As activations are under autocast: of 16 bits, where the parameter has 32."""
    shapes, forward = PRODUCTS[name]
    x, w = drawn((4, 5, 8), *shapes)
    x, w = x.bfloat16(), w.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        plain = forward(x, w)
        with ef.capture({"w": w}, batch_size=4) as tape:
            out = forward(x, w)
            tape.backward(out.square().flatten(1).sum(1))
    assert out.dtype == plain.dtype == torch.float32 and torch.equal(out, plain)
    want = torch.stack([torch.autograd.grad(forward(x[i : i + 1], w).square().sum(), w)[0].flatten() for i in range(4)])
    torch.testing.assert_close(tape.gram(), want @ want.T)
