"""One unlearning run as numbered steps that can be stopped, saved and continued to the bit."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .. import ops
from .data import Data, SampleSet
from .training import in_mode

Loss = Callable[[Tensor, Tensor], Tensor]


def sample_cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    """Per-sample cross-entropy (n,) of class logits; the default loss of every method."""
    return ops.sample_loss(output, y)


def per_sample(losses, n: int, output=None) -> Tensor:
    """What a loss gave for n samples, or an error that says what it should give: (n,), with a gradient where ``output`` has one."""
    if not isinstance(losses, Tensor):
        raise TypeError(f"loss: gave a {type(losses).__name__} for {n} samples; needs a tensor ({n},), one loss per sample: "
                        f"{ops.check.losses_mend(losses)}")  # fmt: skip
    if losses.shape != (n,):
        mend = ".squeeze(1)" if losses.shape == (n, 1) else "reduction='none'"
        raise ValueError(f"loss: gave shape {tuple(losses.shape)} for {n} samples; needs one per sample, ({n},), not reduced: {mend}")
    if not losses.is_floating_point():
        raise ValueError(f"loss: gave {losses.dtype} losses; needs real floating-point ones: .float(), or .real where they are complex")
    if isinstance(output, Tensor) and output.requires_grad and not losses.requires_grad:
        raise ValueError("loss: gave losses without a gradient; needs them computed from the output with torch: no .detach(), .item(), "
                         "numpy or torch.no_grad on the way")  # fmt: skip
    return losses


def _brought(loss: Loss, device: torch.device) -> Loss:
    """The loss with its losses on this device: the caller's may compute them elsewhere."""

    def at_home(output, y):
        losses = loss(output, y)
        return losses.to(device) if isinstance(losses, Tensor) else losses

    return at_home


def square(tensors: Sequence[Tensor]) -> Tensor:
    """‖x‖² over many tensors, 0-d float64, in one pass."""
    return ops.step_gram([tensors])[0, 0]


def shorten(tensors: Sequence[Tensor], norm: float) -> None:
    """Scale down, in place and all alike, to this norm at most."""
    scale = (norm / square(tensors).sqrt().clamp(min=1e-30)).clamp(max=1.0)
    torch._foreach_mul_(tensors, scale.to(tensors[0].dtype))


class NonFinite(FloatingPointError):
    """A loss or a weight became NaN or infinite; the step was not taken and the model is as it was before it."""


class Process(ABC):
    """A method at work on a model. Subclasses say how many steps there are and what one does.

    Args:
        config: the method's dataclass.  model: changed in place.  data: the three sets.
        loss: (output, y) → per-sample losses (n,).  seed: everything random is a function of it.
    """

    def __init__(self, config, model: nn.Module, data: Data, loss: Loss = sample_cross_entropy, seed: int = 0):
        self.config, self.model, self.data, self.seed = config, model, data, seed
        self.params = [p for p in model.parameters() if p.requires_grad]
        if not self.params:
            raise ValueError("model: no trainable parameter; set requires_grad_(True) on those that shall be changed")
        if len({p.device for p in self.params}) > 1 or len({p.dtype for p in self.params}) > 1:
            kinds = sorted({f"{p.dtype} on {p.device}" for p in self.params})
            raise ValueError(f"model: parameters are {', '.join(kinds)}; need one dtype on one device: model.to(...)")
        self.loss = _brought(loss, self.params[0].device)
        self.done = 0
        self.stopped = False  # a method may end before its last step
        self._unread: list[tuple[Tensor, Callable[[bool], None]]] = []  # on the device, and who is told

    # ---- what a method says ----

    @property
    @abstractmethod
    def stages(self) -> list[tuple[str, int]]:
        """(name, steps) in order."""

    @abstractmethod
    def take_step(self, stage: str, k: int) -> dict:
        """Step k of a stage; returns what to record, numbers or 0-d tensors."""

    def enter(self, stage: str) -> None:  # noqa: B027  most methods have nothing to do here
        """Called before the first step of a stage."""

    def state(self) -> dict[str, Tensor]:
        """Tensors beside the model's that the next step depends on."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:  # noqa: B027  nor any state
        """Take back what state() gave, ``done`` being set already."""

    def facts(self) -> dict:
        """What the run as a whole can report at its end."""
        return {}

    # ---- what all methods share ----

    @property
    def total(self) -> int:
        return sum(steps for _, steps in self.stages)

    def where(self) -> tuple[str, int]:
        """Stage and step within it of the next step."""
        k = self.done
        for name, steps in self.stages:
            if k < steps:
                return name, k
            k -= steps
        return "done", 0

    def step(self) -> dict:
        stage, k = self.where()
        with self._asking(), in_mode(self.model, False):  # BatchNorm statistics stay frozen, as in the paper
            if k == 0:
                self.enter(stage)
            row = self.take_step(stage, k)
        self.done += 1
        return {"stage": stage, "step": self.done, **row}

    def losses(self, x: Tensor, y: Tensor, name: str) -> Tensor:
        """Per-sample losses (n,) of a batch; ``name`` is the set they come from (see checked)."""
        return self.checked(self.loss(self.model(x), y), len(y), name)

    def checked(self, losses: Tensor, n: int, name: str) -> Tensor:
        """The losses, of the right shape; whether they are finite is noted."""
        self.note_finite(per_sample(losses, n), name, "loss")
        return losses

    def ask(self, flag: Tensor, answer: Callable[[bool], None]) -> None:
        """Have a 0-d bool read with all the others: settle tells ``answer``. The host waits once a step, not once a question."""
        self._unread.append((flag, answer))

    def note_finite(self, values: Tensor | Sequence[Tensor], name: str, what: str) -> None:
        """These must be finite: settle says so. values: a tensor, or many, read once for their sum of squares."""
        values = values if isinstance(values, Tensor) else square(values)
        self.ask(torch.isfinite(values.detach()).all(), partial(self._refuse_unless, f"{what} on the {name} set"))

    def must_be_finite(self, values: Tensor | Sequence[Tensor], name: str, what: str) -> None:
        """These, and all that was noted since the last call, or NonFinite."""
        self.note_finite(values, name, what)
        self.settle()

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """What is asked inside is read at the end, and by nobody later where something raised."""
        try:
            yield
            self.settle()
        finally:
            self._unread.clear()

    def settle(self) -> None:
        """Wait for the device and give the answers, in the order of the questions: NonFinite for the first thing that was not finite.
        Every step calls it before it changes anything."""
        unread, self._unread = self._unread, []
        if unread:
            flags, answers = zip(*unread)
            for flag, answer in zip(torch.stack(flags).tolist(), answers):
                answer(flag)

    def _refuse_unless(self, what: str, finite: bool) -> None:
        if not finite:
            stage, k = self.where()
            raise NonFinite(
                f"{stage}, step {k + 1} of {dict(self.stages).get(stage, 0)}: non-finite {what}; the model is as it was "
                "before this step; lower the learning rate, or look for non-finite inputs"
            )

    def gradient(self, weighted: Tensor, name: str | None = "training") -> list[Tensor]:
        """∇ Σ_i w_i ℓ_i: weights known before the backward need no per-sample gradient, just this one.

        Noted with the losses, ``name`` being the set it comes from; None where the step's own Gram will tell.
        """
        found = torch.autograd.grad(weighted, self.params, allow_unused=True)
        # finite losses can have gradients that are not, and a step with those cannot be taken back
        found = [torch.zeros_like(p) if g is None else g for p, g in zip(self.params, found)]
        if name is not None:
            self.note_finite(found, name, "gradient")
        return found

    @torch.no_grad()
    def all_losses(self, samples: SampleSet) -> Tensor:
        """Losses of a whole set in its own order, (n,)."""
        with self._asking(), in_mode(self.model, False):
            parts = [self.losses(x, y, samples.name) for _, x, y in samples.chunks()]
        return torch.cat(parts)

