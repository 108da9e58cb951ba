"""ef.capture: who is watched and for how long; and the check of a capture against autograd."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..ops import check
from .errors import CaptureError
from .place import Place
from .recorder import Recorder
from .rules_norm import mixed_samples
from .sources import tensors_in
from .tape import Tape


@check.kinds
@contextlib.contextmanager
def capture(
    model: nn.Module | Mapping[str, Tensor], *, batch_size: int | None = None, batch_dim: int | None = None,
    strict: bool = True,
) -> Iterator[Tape]:  # fmt: skip
    """Watch the trainable parameters of a model while it runs; the model is neither wrapped nor changed.

    Args:
        model: a module, or a mapping of names to parameters for functional code.
        batch_size: number of samples; by default taken from the model's first tensor argument.
        batch_dim: the dimension of the model's inputs that counts samples: 0, or 1 where positions stand before samples.
            By default 1 for torch's own transformer layers with batch_first=False, 0 otherwise. From there on the
            samples are followed through every operation.
        strict: a trainable parameter in a function without a rule is an error that names it; with strict=False it
            goes through torch.func.vmap on a copy per sample (slower, more memory). An activation in a function that is not
            known to keep the samples apart, such as another library's, is an error too, and so is a hook, or a custom
            autograd.Function, that is seen to mix gradients of several samples; with strict=False they are taken to keep them apart.

    Yields: a Tape.

    Raises: CaptureError (no trainable parameter, BatchNorm in train mode, an unknown function, …). Of a model that checkpoints its
    activations a backward that is not the tape's may end in torch's CheckpointError: its forwards run again without the capture.

    On a GPU the host waits for nothing but two looks at indices, and for what strict=False maps: are rows of a trainable table that are
    the same for every sample (positions) all different, and are samples that are picked by a tensor in their order?

    >>> import torch, entangle_fast as ef
    >>> model = torch.nn.Linear(3, 2)
    >>> with ef.capture(model) as tape:
    ...     tape.backward(model(torch.randn(5, 3)).square().sum(1))
    >>> tape.gram().shape
    torch.Size([5, 5])
    """
    is_module = isinstance(model, nn.Module)
    if not is_module and not (isinstance(model, Mapping) and all(isinstance(p, Tensor) for p in model.values())):
        raise TypeError(f"model: got {type(model).__name__}; needs a torch.nn.Module, or a mapping of names to parameters")
    named, seen = {}, set()
    for name, p in model.named_parameters() if is_module else model.items():
        if p.requires_grad and id(p) not in seen:  # a mapping may name one tensor twice
            seen.add(id(p))
            named[name] = p
    if not named:
        raise CaptureError("model: no trainable parameter; set requires_grad_(True) on those that shall be captured")
    if hooked := [name for name, p in named.items() if p._backward_hooks]:
        raise CaptureError(
            f"parameter {hooked[0]!r}: a hook on its gradient (register_hook) would not run: no weight gradient is formed; remove the "
            "hook, or freeze it with requires_grad_(False)"
        )
    if seen & _CAPTURED:
        raise CaptureError("model: its parameters are being captured already; leave that `with` before another begins")
    batch_size, batch_dim = _whole("batch_size", batch_size), _whole("batch_dim", batch_dim)
    if batch_dim is None and is_module and _positions_first(model):
        batch_dim = 1
    recorder = Recorder(named, model.buffers() if is_module else (), batch_size=batch_size, batch_dim=batch_dim, strict=strict)
    hook = None
    try:  # an interrupt leaves nothing behind
        if is_module:
            hook = model.register_forward_pre_hook(_count_samples(recorder), with_kwargs=True)
        _CAPTURED.update(seen)
        recorder.active = True
        with recorder.mode:
            yield Tape(recorder)
    finally:
        recorder.active = False
        _CAPTURED.difference_update(seen)
        if hook is not None:
            hook.remove()


_CAPTURED: set[int] = set()  # ids of parameters inside a `with`: two tapes on one parameter would each miss the other's


def _whole(name: str, x) -> int | None:
    """Numpy's and 0-d tensors serve: they come of counting."""
    try:
        found = None if x is None else operator.index(x)
    except TypeError:
        raise TypeError(f"{name}: got {type(x).__name__}; needs a whole number, or None to find it by the input") from None
    if found is not None and found < 0:
        raise ValueError(f"{name}: got {found}; needs a whole number >= 0, or None to find it by the input")
    return found


def _positions_first(model: nn.Module) -> bool:
    kinds = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.TransformerEncoder,
             nn.TransformerDecoder, nn.Transformer)  # fmt: skip
    return isinstance(model, kinds) and not next(
        m.batch_first for m in model.modules() if isinstance(m, nn.MultiheadAttention))  # fmt: skip


def _count_samples(recorder: Recorder) -> Callable:
    """A forward pre-hook that notes the batch: its size, and the tensors that carry it."""

    def look(module, args, kwargs):
        for m in module.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and not isinstance(m, nn.modules.instancenorm._InstanceNorm) and m.training:
                raise mixed_samples(m.track_running_stats)  # before it counts this batch in its buffers
        for x in tensors_in(args, kwargs):
            if x.dim() == 0 or x in recorder.sources or recorder.places.get(x) is not None:
                continue
            axis = min(recorder.batch_dim or 0, x.dim() - 1)
            if recorder.n is None:
                recorder.n = x.shape[axis]
            place = recorder.places.guess(x) or (Place(axis) if x.shape[axis] == recorder.n else None)
            if place is None and recorder.n in x.shape[:2]:
                place = Place(x.shape.index(recorder.n))
            if place is not None:
                recorder.places.put(x, place)
                recorder.places.called = True

    return look


def check_capture(model: nn.Module, losses: Callable[[], Tensor], *, rtol: float = 1e-3, **options) -> float:
    """Does the tape of this model agree with autograd? One captured and one ordinary backward with random weights.

    Args:
        model: as for capture.  losses: computes the per-sample losses (n,) of one batch, called twice.
        rtol: largest accepted relative error.  options: of capture.

    Returns: the relative error.  Raises: CaptureError if it is larger than rtol.
    """
    if not callable(losses):
        raise TypeError(f"losses: got {type(losses).__name__}; needs a function that computes them: lambda: loss(model(x), y)")
    with capture(model, **options) as tape:
        values = losses()
        tape.backward(values)
    tape.sqnorms()  # the contraction that combine does not take
    w = torch.randn(len(values), generator=torch.Generator().manual_seed(0)).to(values)
    mine = tape.combine(w)
    theirs = torch.autograd.grad((w * losses()).sum(), tape.params, allow_unused=True)
    gap = sum((a - b).double().square().sum() for a, b in zip(mine, theirs) if b is not None)
    size = sum(b.double().square().sum() for b in theirs if b is not None)
    error = float((gap / size.clamp(min=1e-300)).detach().sqrt())
    if not error <= rtol:
        raise CaptureError(
            f"capture disagrees with autograd: relative error {error:.2e} > {rtol:.0e}; does the model mix samples, draw "
            "random numbers (dropout in train mode), or fold positions before samples? then say batch_dim=… or freeze it"
        )
    return error
