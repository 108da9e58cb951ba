"""A small model for the demo, and models and weights by name."""
from __future__ import annotations

import difflib
import importlib
import pickle
from pathlib import Path

import torch
from torch import nn

from ..ops import check
from ..storage import CheckpointError, load_tensors


class SmallCNN(nn.Module):
    """Two convolutions with BatchNorm, two linear layers: 105,572 parameters for 28x28x1 and four classes.

    Input (n, in_channels, image_size, image_size) float32, output (n, num_classes) logits. `head` is the last layer,
    so 64 features are its embedding. image_size needs to be a multiple of 4.
    """

    def __init__(self, num_classes, in_channels=1, image_size=28):
        super().__init__()
        if image_size < 4 or image_size % 4:
            raise ValueError(f"image_size: got {image_size}, needs a multiple of 4; resize the images")
        # pooling before BatchNorm and ReLU: a quarter of their work
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 16, 3, padding=1), nn.MaxPool2d(2), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1), nn.MaxPool2d(2), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Flatten())
        self.hidden = nn.Linear(32 * (image_size // 4) ** 2, 64)
        self.head = nn.Linear(64, num_classes)

    def forward(self, x):
        return self.head(torch.relu(self.hidden(self.features(x))))


MODELS = {"small_cnn": SmallCNN}


@check.kinds
def load_model(name: str, **kwargs) -> nn.Module:
    """Make a model: a name in `MODELS`, or "package.module:factory", which is imported and called with kwargs.

    Raises ValueError for an unknown name, TypeError when the factory gives no nn.Module; errors of the import and of
    the factory itself pass through.

    >>> import entangle_fast as ef
    >>> ef.tasks.load_model("torch.nn:Linear", in_features=4, out_features=2)
    Linear(in_features=4, out_features=2, bias=True)
    """
    if ":" in name:
        module_name, _, attribute = name.partition(":")
        module = importlib.import_module(module_name)
        if not hasattr(module, attribute):
            near = difflib.get_close_matches(attribute, dir(module), n=1)
            file = f" ({module.__file__})" if getattr(module, "__file__", None) else ""  # it may hide the one that was meant
            raise ValueError(f"name: got {name!r}, but {module_name}{file} has no {attribute!r}"
                             + (f"; the nearest is {near[0]!r}" if near else ""))
        factory = getattr(module, attribute)
    elif name in MODELS:
        factory = MODELS[name]
    else:
        raise ValueError(f"name: got {name!r}, needs one of {', '.join(MODELS)}, or 'package.module:factory'")
    model = factory(**kwargs)
    if not isinstance(model, nn.Module):
        raise TypeError(f"name: {name!r} gave a {type(model).__name__}, needs a torch.nn.Module")
    return model


@check.kinds
def load_weights(model: nn.Module, path) -> nn.Module:
    """Load a state dict into `model`, in place: ``.safetensors``, or a torch file (read with weights_only=True).

    A torch file may hold the state dict itself or have it under "state_dict". Values are cast to the model's
    floating-point dtype. Returns the model.
    Raises ValueError naming the keys that are missing, not the model's, or of another shape or kind, FileNotFoundError, and
    CheckpointError for a file that cannot be read; the model is then unchanged.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        state = load_tensors(path)
    else:
        state = _load_torch(path)
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"path: {path} holds no state dict (name -> tensor); save model.state_dict()")
    own = model.state_dict()
    faults = {
        "missing": [name for name in own if name not in state],
        "not the model's": [name for name in state if name not in own],
        "of another shape or kind": [
            f"{name} (file {tuple(state[name].shape)} {state[name].dtype}, "
            f"model {tuple(own[name].shape)} {own[name].dtype})"
            for name in own if name in state and (
                state[name].shape != own[name].shape
                or state[name].is_floating_point() != own[name].is_floating_point())]}
    if any(faults.values()):
        said = "; ".join(f"{what}: {', '.join(names)}" for what, names in faults.items() if names)
        raise ValueError(f"path: {path} does not fit the model: {said}. Make the model as it was when it was saved")
    model.load_state_dict(state)
    return model


def _load_torch(path):
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a torch file of tensors alone, or damaged; save model.state_dict(), by torch.save or as "
                              "safetensors: it is read with weights_only, other objects could run code") from error  # fmt: skip
