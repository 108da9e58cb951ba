"""The plain supervised loop, and the small things around a model that every room above needs."""
import contextlib
import math
import random

import numpy as np
import torch
import torch.nn.functional as F

from ..ops import check


@contextlib.contextmanager
def in_mode(model, train):
    """Put `model` in train (True) or eval (False) mode for a while, then give every module its own mode back.

    Module by module, since a model in train mode may hold BatchNorms that were frozen in eval mode.
    """
    before = {module: module.training for module in model.modules()}
    model.train(train)
    try:
        yield model
    finally:
        for module, training in before.items():
            module.training = training


@contextlib.contextmanager
def draws_undone(device):
    """Give the global generators of torch (the CPU's and the device's), numpy and Python the states back that they had before."""
    python, numpy = random.getstate(), np.random.get_state(legacy=False)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def device_of(model):
    """The device of the model's first parameter; the CPU for a model without any."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


PINNED = {"cuda"}  # devices that fetch from pinned memory while the host goes on
A_BATCH = 1 << 26  # bytes; of more the copy takes longer than the wait, and torch keeps the memory that it has pinned


def sent(x, device):
    """`x` on `device`. The host does not wait for a batch: `x.to(device)` would, for all the work that is queued there."""
    if x.device.type == "cpu" and torch.device(device).type in PINNED and x.nbytes <= A_BATCH:
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def batch_order(n, seed, epoch):
    """The order in which an epoch visits n samples: a permutation (n,) int64, a pure function of its arguments."""
    return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(n))


def refuse_zero_eps(parameters, eps=1e-8):
    """Raise ValueError where Adam's eps is 0 in a parameter's dtype: it would divide by zero, and leave NaN in the weights."""
    for dtype in {p.dtype for p in parameters}:
        if torch.tensor(eps, dtype=dtype) == 0:
            raise ValueError(f"model: its parameters are {dtype}, in which Adam's eps of {eps} is 0; needs a wider range: model.float() "
                             "or model.bfloat16()")


def learning_rate(step, total, peak, warmup=0.1):
    """One cycle: linear up to `peak` over the first `warmup` share of `total` steps, then a cosine towards 0."""
    rising = max(1, round(total * warmup))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step + 1 - rising) / (total + 1 - rising)))


def fit(model, x, y, *, epochs, lr, batch_size, seed, weight_decay=0.0, optimizer="adam", momentum=0.9,
        augment=None, progress=None, on_step=None):
    """Train `model` in place on in-memory tensors with cross-entropy; returns the mean loss of each epoch (floats).

    x          (n, ...) inputs; y (n,) int64 labels; on any device, batches go to the model's.
    lr         the peak of one cycle (see `learning_rate`).
    batch_size the most samples in a batch; an epoch is cut into batches whose sizes differ by one at most, so that no
               lone sample reaches a BatchNorm.
    seed       >= 0; fixes the batch orders (see `batch_order`) and dropout. The global random state is left as found.
    optimizer  "adam" or "sgd" (`momentum` is SGD's). `weight_decay` is the L2 term of either.
    augment    (x, generator) -> x, applied to each batch.
    progress   called after each epoch as progress(epoch, epochs, mean_loss), epoch from 1.
    on_step    called after each update as on_step(step, loss), step from 1; a true return value ends the training.

    The model trains in train mode; each module's previous mode is restored.
    Raises FloatingPointError naming the step when a loss is not finite (that step is not taken), ValueError for
    arguments out of range.
    """
    parameters = _check(model, x, y, epochs, lr, batch_size, seed, optimizer)
    if optimizer == "adam":
        stepper = torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay)
    else:
        stepper = torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)
    device = device_of(model)
    per_epoch = math.ceil(len(x) / batch_size)
    step, history = 0, []
    with in_mode(model, True), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for epoch in range(epochs):
            total, seen, stop = 0.0, 0, False
            for rows in batch_order(len(x), seed, epoch).tensor_split(per_epoch):
                for group in stepper.param_groups:
                    group["lr"] = learning_rate(step, epochs * per_epoch, lr)
                batch = sent(x[sent(rows, x.device)], device)
                if augment is not None:
                    batch = augment(batch, torch.Generator().manual_seed(1_000_003 * seed + step))
                loss = F.cross_entropy(model(batch), sent(y[sent(rows, y.device)], device))
                step += 1
                value = loss.item()
                if not math.isfinite(value):
                    raise FloatingPointError(f"the loss is {value} at step {step} (epoch {epoch + 1} of {epochs}, "
                                             f"lr peak {lr}); lower lr, or look for non-finite inputs or weights")
                stepper.zero_grad(set_to_none=True)
                loss.backward()
                stepper.step()
                total, seen = total + value * len(rows), seen + len(rows)
                if on_step is not None and on_step(step, value):
                    stop = True
                    break
            history.append(total / seen)
            if progress is not None:
                progress(epoch + 1, epochs, history[-1])
            if stop:
                break
    stepper.zero_grad(set_to_none=True)
    return history


def _check(model, x, y, epochs, lr, batch_size, seed, optimizer):
    """Refuse arguments out of range; returns the trainable parameters."""
    if len(x) == 0 or y.shape != (len(x),):
        raise ValueError(f"x, y: got {len(x)} samples and labels of shape {tuple(y.shape)}; "
                         "needs at least one sample, and labels of shape (n,)")
    if y.dtype != torch.int64:
        raise ValueError(f"y: got {y.dtype}, needs int64; pass y.long()")
    for name, value, least in (("epochs", epochs, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
        if not check.whole(value) or value < least:
            raise ValueError(f"{name}: got {value!r}, needs a whole number >= {least}")
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr: got {lr!r}, needs a finite number > 0")
    if optimizer not in ("adam", "sgd"):
        raise ValueError(f"optimizer: got {optimizer!r}, needs 'adam' or 'sgd'")
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("model: has no parameter that requires a gradient; call requires_grad_(True) on some")
    if optimizer == "adam":
        refuse_zero_eps(parameters)
    return parameters
