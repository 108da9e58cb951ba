"""What capture leaves behind (nothing), what it costs (no weight gradient), and in which dtypes it holds."""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracle import agree, flat, per_sample, tape_of
from torch.utils.flop_counter import FlopCounterMode
from zoo import ZOO

import entangle_fast as ef


def fingerprint(model):
    """Everything that a user could notice: attributes, hooks, flags, gradients, bits."""
    found = {}
    for name, m in model.named_modules():
        hooks = {k: dict(v) for k, v in vars(m).items() if "hooks" in k and isinstance(v, dict)}
        found[name] = (sorted(vars(m)), hooks, m.training, type(m).forward, "forward" in vars(m))
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        found[name] = (id(p), p.requires_grad, p.grad, sorted(vars(p)), p._backward_hooks, p._version)
    return found, {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt, ef.CaptureError])
@pytest.mark.parametrize("name", ["resnet_block", "gpt2_tied", "vit_token_repeat", "weight_norm_parametrization"])
def test_the_model_is_left_as_found(name, error):
    case = ZOO[name]()
    batch = case.batch(3)
    before, bits = fingerprint(case.model)
    want = case.losses(case.model, batch)
    try:
        with ef.capture(case.model) as tape:
            losses = case.losses(case.model, batch)
            if error is not None:
                raise error
            tape.backward(losses)
            tape.gram()
        tape.combine(torch.ones(3).double())
    except BaseException as raised:
        assert type(raised) is error
    after, same = fingerprint(case.model)
    assert after == before
    assert all(torch.equal(bits[k], same[k]) for k in bits)
    assert torch.equal(case.losses(case.model, batch), want)
    copy.deepcopy(case.model)
    assert not torch.overrides._get_current_function_mode_stack()
    agree(case)  # and a new capture works


def test_grad_of_earlier_work_stays(generator):
    case = ZOO["mlp"]()
    case.losses(case.model, case.batch(3)).sum().backward()
    before = [p.grad.clone() for p in case.model.parameters()]
    tape_of(case, case.batch(3)).gram()
    assert all(torch.equal(p.grad, g) for p, g in zip(case.model.parameters(), before))


@pytest.mark.parametrize("name", ["mlp", "resnet_block", "conv_2d_grouped_inside", "gpt2_untied", "llama", "mha", "checkpointed"])
def test_losses_are_the_same_bits(name):
    case = ZOO[name]()
    batch = case.batch(4)
    want = case.losses(case.model, batch)
    with ef.capture(case.model):
        got = case.losses(case.model, batch)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["mlp", "resnet_block", "gpt2_untied", "llama", "mha", "conv_2d_depthwise_inside"])
def test_no_weight_gradient_is_formed(name):
    """Captured forward and backward: exactly the FLOPs of forward and input gradients."""
    case = ZOO[name]()
    batch = case.batch(4)
    with FlopCounterMode(display=False) as counter, ef.capture(case.model) as tape:
        tape.backward(case.losses(case.model, batch))
    captured = counter.get_total_flops()
    parts = [k for k in counter.get_flop_counts()["Global"]]
    assert parts
    with FlopCounterMode(display=False) as counter:
        losses = case.losses(case.model, batch)
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        losses.sum().backward()
    full = counter.get_total_flops()
    # leave the inputs' gradients: the same backward with the weights frozen, and inputs of every layer still needed
    for p in case.model.parameters():
        p.grad = None
        if p.dim() > 1:
            p.requires_grad_(False)
    leaves = {k: v.requires_grad_() if v.is_floating_point() else v for k, v in batch.items()}
    with FlopCounterMode(display=False) as counter:
        case.losses(case.model, leaves).sum().backward()
    frozen = counter.get_total_flops() - forward
    assert captured < forward + full
    assert captured <= forward + frozen


@pytest.mark.parametrize(
    "name", ["mlp", "resnet_block", "norms_partly_trainable", "gpt2_tied", "llama", "mha_cross", "lora", "vit_token_repeat"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_errs_no_more_than_autograd(name, dtype):
    exact = ZOO[name]()
    batch = exact.batch(4)
    want = flat(per_sample(exact, batch))
    exact.model.to(dtype)
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    theirs = flat(per_sample(exact, batch))
    ours = flat(tape_of(exact, batch).per_sample())
    assert (ours - want).norm() <= 2 * (theirs - want).norm()


@pytest.mark.parametrize("name", ["mlp", "resnet_block", "gpt2_tied", "llama", "mha", "scalars_and_gates", "norms", "lora_merged"])
def test_autocast(name):
    case = ZOO[name]()
    batch = case.batch(4)
    want = flat(per_sample(case, batch))
    case.model.float()
    batch = {k: v.float() if v.is_floating_point() else v for k, v in batch.items()}
    plain = case.losses
    seen = []

    def losses(net, b):
        with torch.autocast("cpu", torch.bfloat16):
            out = plain(net, b)
        seen.append(out.dtype)
        return out

    case.losses = losses
    theirs = flat(per_sample(case, batch))
    tape = tape_of(case, batch)
    assert seen[0] == seen[1]
    ours = flat(tape.per_sample())
    slack = 4 if name == "norms" else 2  # under autocast a norm is split from its scale: one more rounding
    assert (ours - want).norm() <= slack * (theirs - want).norm() + 1e-3 * want.norm()
    torch.testing.assert_close(tape.gram().double(), ours @ ours.T, rtol=3e-2, atol=3e-2 * (ours @ ours.T).abs().max().item())


def test_check_capture():
    case = ZOO["mlp"]()
    batch = case.batch(4)
    assert ef.check_capture(case.model, lambda: case.losses(case.model, batch)) < 1e-12
    with pytest.raises(ef.CaptureError, match="disagrees"):
        net = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Dropout(0.5))
        ef.check_capture(net, lambda: F.mse_loss(net(torch.ones(4, 6)), torch.zeros(4, 6), reduction="none").sum(1))
