"""What is wrong with losses, said before their backward begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..ops import check
from .errors import CaptureError
from .gradients import is_foreign, watch_nodes
from .place import Lost, Row

if TYPE_CHECKING:
    from .recorder import Recorder


def check_losses(recorder: Recorder, losses: Tensor) -> None:
    """(n,), one a sample in the samples' order, of parameters that were seen, every one of them by a rule; an error otherwise."""
    if recorder.begun:
        raise CaptureError("backward: this tape has had its backward; capture a new forward with ef.capture(model)")
    if not isinstance(losses, Tensor):
        raise TypeError(f"losses: got {type(losses).__name__}; needs a tensor (n,), one loss per sample: {check.losses_mend(losses)}")
    if losses.dim() != 1:
        got = "an already reduced loss" if losses.dim() == 0 else f"shape {tuple(losses.shape)}"
        raise ValueError(f"losses: got {got}; needs one loss per sample, (n,): use reduction='none'")
    if not recorder.sources or not recorder.params:
        raise CaptureError("model: no trainable parameter; set requires_grad_(True) on those that shall be captured")
    if not losses.requires_grad:
        raise CaptureError(
            "losses: they depend on no trainable parameter seen inside the `with`; compute them there, with torch, not under no_grad, "
            "and without .detach(), .item() or numpy() on the way"
        )
    if recorder.n is None:
        raise CaptureError("losses: no parameter met a batch inside this `with`; run the model's forward there")
    if len(losses) != recorder.n:
        raise ValueError(
            f"losses: {len(losses)} of them for a batch of {recorder.n}; need one per sample; for several batches concatenate their "
            "inputs before one forward; if the batch was guessed wrong, say ef.capture(model, batch_size=…), or batch_dim=1 where "
            "positions stand before samples"
        )
    if recorder.n == 0:
        raise ValueError("losses: an empty batch has no gradient; needs at least one sample")
    _refuse_leaks(recorder, losses)
    place = recorder.places.get(losses)
    if isinstance(place, Row) and recorder.n > 1:
        place = Lost(f"all of them are of sample {place.index}, which was picked")
    if isinstance(place, Lost):
        raise CaptureError(
            f"losses: they are not one per sample, in the samples' order: {place.why}; compute each sample's loss from its own "
            "activations alone, and leave the order as it is"
        )


def _refuse_leaks(recorder: Recorder, losses: Tensor) -> None:
    """A parameter that reached the loss past every rule (a custom autograd.Function) must not be dropped silently."""
    watched = {id(p): name for name, p in zip(recorder.names, recorder.params)}
    stack, seen, foreign, anchor = [losses.grad_fn], set(), [], None
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        anchor = node if variable is recorder.anchor else anchor
        if is_foreign(node):
            foreign.append(node)
        if type(node).__name__ == "CheckpointFunctionBackward":
            raise CaptureError(
                "activation checkpointing with use_reentrant=True hides its parameters; use "
                "torch.utils.checkpoint.checkpoint(…, use_reentrant=False)"
            )
        if variable is not None and id(variable) in watched:
            raise CaptureError(
                f"parameter {watched[id(variable)]!r} reaches the losses through code that capture cannot see (a custom "
                "autograd.Function, a scripted or compiled module: run it eagerly), through tensors that it does not take "
                "for part of the batch (not arguments of the model), or from outside the `with`; or freeze it"
            )
        stack += [parent for parent, _ in node.next_functions]
    if anchor is None:
        raise CaptureError("losses: they depend on no parameter that was seen inside this `with`; compute them there")
    if foreign and recorder.strict and recorder.n > 1:
        watch_nodes(recorder, foreign, seen, anchor)
