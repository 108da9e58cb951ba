"""The interception: every torch function that receives a watched tensor is served by a rule, or refused by name."""

from __future__ import annotations

import weakref

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import rules_attention, rules_conv, rules_elementwise, rules_embedding, rules_linear, rules_loss, rules_norm, rules_spelled
from .errors import CaptureError
from .gradients import watch_hook
from .remake import expose
from .sources import changes_in_place, function_name, tensors_in

RULES = {
    **rules_linear.RULES,
    **rules_conv.RULES,
    **rules_embedding.RULES,
    **rules_norm.RULES,
    **rules_elementwise.RULES,
    **rules_attention.RULES,
    **rules_loss.RULES,
    **rules_spelled.RULES,
}
# lookups decide for themselves: ids that are the same for every sample still meet the batch
_MEETS_BATCH = (F.embedding, torch.embedding, F.embedding_bag, torch.embedding_bag)
_BATCH_NORMS = (F.batch_norm, torch.batch_norm)
# through these a tensor can be written to without autograd's knowledge
_EXPOSES = {
    Tensor.data.__get__, Tensor.data.__set__, Tensor.numpy, Tensor.__array__, Tensor.data_ptr, Tensor.untyped_storage,
    Tensor.__dlpack__, Tensor.storage, Tensor._typed_storage, Tensor.__cuda_array_interface__.__get__,
}  # fmt: skip


class CaptureMode(TorchFunctionMode):
    """Active inside ``with ef.capture(model)``; rules write to its recorder."""

    def __init__(self, recorder):
        super().__init__()
        self._recorder = weakref.ref(recorder)  # no cycle: factors go when the tape goes

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        recorder = self._recorder()
        if func is torch.autograd.grad:
            with recorder.gradients_asked(kwargs.get("create_graph", len(args) > 4 and args[4])):
                return self._grad(*args, **kwargs) if recorder.recomputes else func(*args, **kwargs)
        if recorder.idle:
            return func(*args, **kwargs)
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            recorder.recomputes = True
        if func in _EXPOSES:
            expose(recorder, args[0])
        if func is Tensor.register_hook:
            return func(*self._hook(*args, **kwargs))
        if func in _BATCH_NORMS:
            rules_norm.refuse_batch_statistics(func, args, kwargs)
        inputs = tensors_in(args, kwargs)
        watched = [x for x in inputs if x in recorder.sources]
        if not watched or not torch.is_grad_enabled():
            out = func(*args, **kwargs)
        else:
            out = self._with_parameters(func, args, kwargs, inputs, watched)
        recorder.places.follow(func, args, kwargs, inputs, out)
        return out

    def _grad(self, outputs, inputs, *, grad_outputs, retain_graph, create_graph, allow_unused, is_grads_batched, materialize_grads, **_):
        """torch.autograd.grad, which hands itself to the mode: that would be off for the forwards that run again inside."""
        if is_grads_batched:
            raise CaptureError("torch.autograd.grad(…, is_grads_batched=True): capture has no rule for it under activation checkpointing; "
                               "ask for one gradient after the other")  # fmt: skip
        seeds = torch.autograd._tensor_or_tensors_to_tuple(grad_outputs, len(outputs))
        seeds = torch.autograd._make_grads(outputs, seeds, is_grads_batched=False)
        with self:
            found = torch.autograd.Variable._execution_engine.run_backward(
                outputs, seeds, create_graph if retain_graph is None else retain_graph, create_graph, inputs,
                allow_unreachable=bool(materialize_grads if allow_unused is None else allow_unused), accumulate_grad=False,
            )  # fmt: skip
        return tuple(torch.zeros_like(x, requires_grad=create_graph) if g is None and materialize_grads else g
                     for x, g in zip(inputs, found))  # fmt: skip

    def _hook(self, x: Tensor, hook):
        """A hook on a weight's gradient may look on (it sees what is pulled back through x), not change it; others are followed."""
        recorder = self._recorder()
        if x not in recorder.sources:
            return x, watch_hook(recorder, x, hook)
        what = f"{recorder.describe(x)}: a hook on its gradient (register_hook)"
        if recorder.sources[x].identity:
            raise CaptureError(f"{what} would not run: no weight gradient is formed; remove the hook, or freeze the parameter")
        recorder.sources[x].isometric = False  # nothing is contracted without passing here

        def look(g):
            if hook(g) is not None:
                raise CaptureError(f"{what} changes it; capture has no rule for that; remove the hook, or freeze the parameter")

        return x, look

    def _with_parameters(self, func, args, kwargs, inputs, watched):
        recorder = self._recorder()
        if torch._C._functorch.maybe_current_level() is not None:  # what stands in there are no samples that can be followed
            raise CaptureError(
                f"{recorder.describe(watched[0])}: torch's {function_name(func)}(…) on it inside torch.func.vmap, grad or another "
                "transform; capture has no rule for that; write it for the whole batch, or freeze the parameter with requires_grad_(False)"
            )
        batch_free = not any(recorder.carries_samples(x) for x in inputs)
        if changes_in_place(func) and isinstance(args[0], Tensor) and args[0] in recorder.sources:
            if not batch_free:
                raise CaptureError(
                    f"{recorder.describe(args[0])}: torch's {function_name(func)}(…) writes the batch into a tensor that was "
                    "computed from parameters alone; use the out-of-place form"
                )
            out = func(*args, **kwargs)
            recorder.sources.changed(args[0], inputs)
            return out
        rule = RULES.get(func)
        if rule is not None and not (batch_free and func not in _MEETS_BATCH):
            out = rule(recorder, func, args, kwargs)
            if out is not NotImplemented:
                return out
        if batch_free:
            if (out := rules_elementwise.repeat_over_batch(recorder, func, args, kwargs)) is not NotImplemented:
                return out
            out = func(*args, **kwargs)
            recorder.sources.derive(func, inputs, out, args)
            return out
        if recorder.strict:
            other = "" if function_name(func) in rules_elementwise.NO_VMAP else (
                ", or take the slower general path: ef.capture(model, strict=False)"
            )
            raise CaptureError(
                f"{recorder.describe(watched[0])}: no rule for torch's {function_name(func)}(…) on a parameter; freeze it with "
                f"requires_grad_(False){other}"
            )
        return rules_elementwise.through_vmap(recorder, func, args, kwargs)
