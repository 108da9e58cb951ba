"""PGU: forget with steps that leave every layer's response to retain inputs alone.

Hoang, Rana, Gupta, Venkatesh, "Learn to Unlearn for Deep Neural Networks: Minimizing Unlearning Interference with
Gradient Projection", WACV 2024, arXiv 2312.04095 (methods.md §4). From the authors' code [code]:

    C = Σ a aᵀ over a layer's inputs (Conv2d: unfolded patches);  C = U diag(s²) Uᵀ
    M = the leading columns of U up to a share of Σ s ;  gradient of W:  ∇W − (∇W M) Mᵀ ;  all else (biases, norms) fixed
    loss per forget sample:  −log(1 + offset − p_y) − w·entropy

With ℓ = −log p_y the first term is −log(1 + offset − e^−ℓ): a reweighting of the losses, so any loss with e^−ℓ < 1 will
do. [ours]: the entropy term is left out, C is summed over the retain samples themselves (the authors take the forget
set's part out of the C of all data), the learning rate is constant.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .sgd import SgdOptions, SgdProcess, positive

PATCHES = 1 << 23  # most numbers of unfolded patches held at once


@dataclass
class Pgu(SgdOptions):
    """Configuration; no retain sample is used after the bases are made, so that adjacent samples whose inputs lie outside
    them are not protected, and the run stops by itself once the forget set is forgotten.

    Args:
        share: of the sum of a layer's singular values that its protected inputs hold, in (0, 1).
        offset: > 0, bounds a sample's loss and gradient.
    """

    name = "pgu"
    lr: float = 0.2
    momentum: float = 0.0
    stop_at: float | None = 0.05
    share: float = 0.9
    offset: float = 0.05

    def __post_init__(self):
        positive(self, "epochs", "lr", "batch", "offset")
        if not 0 < self.share < 1:
            raise ValueError(f"share: got {self.share}; needs a number in (0, 1)")

    def start(self, model, data, loss, seed):
        return _Pgu(self, model, data, loss, seed)


class _Pgu(SgdProcess):
    def __init__(self, config, model, data, loss, seed):
        super().__init__(config, model, data, loss, seed)
        self.layers = projectable(model)
        self.bases: dict[int, Tensor] = {}  # parameter's number → M, (groups, d, rank)

    def enter(self, stage):
        with second_moments(self.layers) as moments, torch.no_grad():
            for _, x, _ in itertools.chain(*(s.chunks() for s in self.data.retain)):
                self.model(x)
        for i, p in enumerate(self.params):
            if id(p) in moments:
                self.must_be_finite(moments[id(p)], "retain", "input of a layer")
                self.bases[i] = leading(moments[id(p)], self.config.share).to(p.dtype)
        if not self.bases:
            raise ValueError("model: no Linear or Conv2d was called; PGU changes the weights of no other layer")

    def objective(self, k, row):
        losses = self.batch_losses(self.data.forget, k, self.config.batch, row)
        return -torch.log1p(self.config.offset - torch.exp(-losses)).mean()

    def direction(self, k, row):
        found = []
        for i, g in enumerate(super().direction(k, row)):
            if i in self.bases:
                m = self.bases[i]
                rows = g.reshape(m.shape[0], -1, m.shape[1])  # (groups, out / groups, d)
                found.append((rows - rows @ m @ m.mT).view_as(g))
            else:
                found.append(torch.zeros_like(g))
        return found

    def state(self):
        return super().state() | {f"basis.{i}": m for i, m in self.bases.items()}

    def load(self, state):
        super().load(state)
        self.bases = {int(k.split(".")[1]): m.to(self.params[0].device) for k, m in state.items() if k.startswith("basis.")}

    def facts(self):
        """Rank of each layer's protected inputs, and their dimension."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        return {"protected": {names[id(self.params[i])]: [m.shape[2], m.shape[1]] for i, m in self.bases.items()}}


def projectable(model: nn.Module) -> list[nn.Module]:
    """Linear and Conv2d layers whose weight trains and belongs to such layers alone; refuses a model without any."""
    kinds = (nn.Linear, nn.Conv2d)
    # a table of embeddings, say, that is a Linear's weight too: that use would not be protected
    shared = {id(p) for m in model.modules() for n, p in m.named_parameters(recurse=False) if not (isinstance(m, kinds) and n == "weight")}
    layers = [m for m in model.modules() if isinstance(m, kinds) and m.weight.requires_grad and id(m.weight) not in shared]
    if not layers:
        raise ValueError("model: no Linear or Conv2d with a trainable weight of its own; PGU changes the weights of no other layer")
    return layers


@contextlib.contextmanager
def second_moments(layers: list[nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Σ a aᵀ of the inputs that pass through the layers inside the ``with``: id of the weight → (groups, d, d) float64."""
    found: dict[int, Tensor] = {}

    def look(layer, args):
        for a in inputs(layer, args[0].detach()):
            part = (a.mT @ a).double()
            found[id(layer.weight)] = found[id(layer.weight)] + part if id(layer.weight) in found else part

    handles = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def inputs(layer: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """What a layer's weight is multiplied with, piece by piece: (groups, vectors, d)."""
    if isinstance(layer, nn.Linear):
        yield x.reshape(1, -1, x.shape[-1])
        return
    x = x if x.dim() == 4 else x.unsqueeze(0)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)  # "same" and "valid" resolved
    height, width = (
        (size - d * (k - 1) - 1) // s + 1 for size, d, k, s in zip(x.shape[2:], layer.dilation, layer.kernel_size, layer.stride)
    )
    each = layer.weight[0].numel() * layer.groups * height * width
    for part in x.split(max(1, PATCHES // each)):
        patches = F.unfold(part, layer.kernel_size, dilation=layer.dilation, stride=layer.stride)
        yield patches.unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


def leading(moment: Tensor, share: float) -> Tensor:
    """The eigenvectors that hold ``share`` of the sum of the singular values: (groups, d, d) → (groups, d, rank).

    The authors' count: those whose running sum stays within the share, and one more; the largest rank of the groups.
    """
    values, vectors = torch.linalg.eigh(moment)
    s = values.clamp(min=0).sqrt().flip(-1)
    rank = int(((s.cumsum(-1) <= share * s.sum(-1, keepdim=True)).sum(-1) + 1).clamp(max=s.shape[-1]).max())
    return vectors.flip(-1)[..., :rank].contiguous()
