"""What the config file of a job may say: its tables and their keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .config_reading import ConfigError


def _method_table() -> Mapping[str, type]:
    from entangle_fast.methods import METHODS  # late: methods sit above config

    return METHODS


@dataclass(kw_only=True)
class TaskConfig:
    """What is unlearned. forget: class names, as many as you like.

    labels: "super" for superclasses, "fine" for the data set's own; adjacency: how the adjacent
    classes are found; path: folder of the data, where they do not come with a package.
    """

    forget: list[str]
    dataset: Literal["fashion_mnist", "cifar10", "cifar100", "image_folder"] = "fashion_mnist"
    path: str | None = None
    labels: Literal["super", "fine"] = "super"
    adjacency: Literal["label", "knn"] = "label"

    def __post_init__(self) -> None:
        if not self.forget:
            raise ConfigError('got no class, needs at least one, as in forget = ["Sneaker"]', key=("forget",))
        if self.path is None and self.dataset != "fashion_mnist":
            raise ConfigError(
                f'missing; {self.dataset} needs the folder of its files, as in path = "data/{self.dataset}"',
                key=("path",),
            )


@dataclass(kw_only=True)
class ModelConfig:
    """factory: "package.module:callable", called with kwargs; weights: its safetensors file, if any.

    The module is one that is installed, or a file beside the config file, or in the current folder: looked for in this order.
    """

    factory: str
    weights: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*", self.factory):
            raise ConfigError(
                f'got {self.factory!r}, needs package.module:callable, as in "torchvision.models:resnet18"',
                key=("factory",),
            )


@dataclass(kw_only=True)
class RunOptions:
    """out: run folder; the *_every are in steps, 0 is never; threads 0 leaves torch's choice."""

    out: str = "runs/run"
    seed: int = 0
    progress: bool = True
    checkpoint_every: int = 50
    eval_every: int = 10
    threads: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("seed", "checkpoint_every", "eval_every", "threads"):
            if (value := getattr(self, name)) < 0:
                raise ConfigError(f"got {value}, needs 0 or more", key=(name,))


@dataclass(kw_only=True)
class RunConfig:
    """A whole job. `method` is the dataclass that `name` picks from entangle_fast.methods.METHODS."""

    task: TaskConfig
    model: ModelConfig
    method: Any = field(metadata={"table": _method_table})
    run: RunOptions = field(default_factory=RunOptions)
