"""A GPU that is not there: tensors that say they are on another device and hold their numbers on the CPU.

``pretended`` makes one: torch's operations run on it as they would on a GPU, in the order of the calls, with the CPU's numbers.
Those that mix it with the CPU raise, as on a GPU; ``waits`` lists what makes the host wait: copies from and to memory that is not
pinned, numbers for Python, sizes that the data decide, solvers that look at their errors. An operation of ours is one kernel that
waits for nothing, but for a look-ahead without a capacity.

The device is torch's "lazy", the one whose backward runs without a library for it.
"""

import contextlib
import traceback

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from entangle_fast import dispatch
from entangle_fast.methods import training

DEVICE = torch.device("lazy")
WAITING = {
    "_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount",
    "histc", "_linalg_eigh", "_linalg_svd", "_linalg_det", "linalg_eig", "linalg_lstsq", "linalg_qr",
}  # fmt: skip
BY_INDEX = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}


class There(Tensor):
    """A tensor of that device; ``held`` has its numbers."""

    fake_mode = None  # what ops.step.apart knows tensors without memory by

    @staticmethod
    def __new__(cls, held: Tensor):
        how = dict(strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=DEVICE)
        return Tensor._make_wrapper_subclass(cls, held.shape, **how)

    def __init__(self, held: Tensor):
        self.held = held

    def __repr__(self):
        return f"There({self.held!r})"

    def tolist(self):
        return self.cpu().tolist()

    def data_ptr(self):
        return self.held.data_ptr()

    def untyped_storage(self):
        return self.held.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func}: outside of `pretended`")


class _Made(TorchFunctionMode):
    """torch.tensor builds on the CPU and copies, where no dispatch mode sees it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and kwargs.get("device") is not None:
            to = kwargs.pop("device")
            return func(*args, **kwargs).to(to)
        return func(*args, **kwargs)


class Device(TorchDispatchMode):
    """``waits``: what has made the host wait, and where."""

    def __init__(self):
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func.overloadpacket.__name__
        to, theirs, mine = kwargs.get("device"), [], []
        _mapped(lambda x: (theirs if isinstance(x, There) else mine).append(x), (args, kwargs))
        if not theirs and to != DEVICE:
            return func(*args, **kwargs)
        leaves = name == "_to_copy" and to is not None and to != DEVICE
        self._look(name, args, kwargs, theirs, mine, leaves)
        if to is not None:
            kwargs["device"] = torch.device("cpu")
        if torch.Tag.inplace_view in func.tags:
            _resize(func, args, kwargs)
        known = {id(x.held): x for x in theirs}
        args, kwargs = _mapped(lambda x: x.held if isinstance(x, There) else x, (args, kwargs))
        out = func(*args, **kwargs)
        return out if leaves else _mapped(lambda x: known[id(x)] if id(x) in known else There(x), out)

    def _look(self, name, args, kwargs, theirs, mine, leaves) -> None:
        if name in ("_to_copy", "copy_"):
            source = args[-1] if name == "copy_" else args[0]
            between = leaves or bool(mine)
            if between and not (source.dim() == 0 and name == "copy_") and not getattr(source, "pinned", False):
                self._wait(f"{name} {'from' if isinstance(source, There) else 'to'} the device")
        elif name in BY_INDEX:
            for x in args[1]:
                if x is not None and (x.dtype in (torch.bool, torch.uint8) or not isinstance(x, There)):
                    self._wait(f"{name} by {'a mask' if isinstance(x, There) else 'what is on the CPU'}")
            mine = [x for x in (args[0], *args[2:3]) if not isinstance(x, There)]
        elif name in WAITING or name == "repeat_interleave" and kwargs.get("output_size") is None:
            self._wait(name)
        elif name == "step_lookahead" and (len(args) < 4 or args[3] is None):
            self._wait("step_lookahead without a capacity")
        if name not in ("_to_copy", "copy_") and any(x.dim() or name in ("cat", "stack") for x in mine):
            there = ", ".join(f"{tuple(x.shape)} on {x.device}" for x in (*theirs, *mine))
            raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but got {there}")

    def _wait(self, what: str) -> None:
        ours = [f"{f.filename.rpartition('/')[2]}:{f.lineno}" for f in traceback.extract_stack() if "entangle_fast/" in f.filename]
        self.waits.append(f"{what} ({' < '.join(ours[:-4:-1])})")


def _mapped(f, tree):
    """f of every tensor in nested lists, tuples and dicts."""
    if isinstance(tree, Tensor):
        return f(tree)
    if isinstance(tree, (tuple, list)):
        return type(tree)([_mapped(f, x) for x in tree])
    return {k: _mapped(f, x) for k, x in tree.items()} if isinstance(tree, dict) else tree


def _resize(func, args, kwargs) -> None:
    """What changes the sizes of a tensor in place changes those that it shows too."""
    before = torch._C._meta_in_tls_dispatch_include()
    with no_dispatch():
        torch._C._set_meta_in_tls_dispatch_include(True)
        try:
            func(*args, **kwargs)
        finally:
            torch._C._set_meta_in_tls_dispatch_include(before)


def _pinned(x: Tensor) -> Tensor:
    x = x.clone()
    x.pinned = True
    return x


@contextlib.contextmanager
def pretended():
    """The device, for as long as the ``with`` lasts; its tensors are of no use afterwards."""
    autocast = torch.is_autocast_enabled
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_choose", lambda op, args: dispatch.Explanation(op, "triton"))
        patch.setattr(training, "PINNED", {DEVICE.type})
        patch.setattr(Tensor, "pin_memory", _pinned)
        patch.setattr(torch, "is_autocast_enabled", lambda device="cpu": device != DEVICE.type and autocast(device))
        patch.setattr("torch.nn.utils.clip_grad._device_has_foreach_support", lambda device: True)
        patch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
        with Device() as device, _Made():
            yield device


def moved(model: nn.Module) -> nn.Module:
    """The model's parameters and buffers on that device, in place."""
    with torch.no_grad():
        return model.to(DEVICE)
