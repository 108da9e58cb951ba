"""Which retain samples are entangled with the forget set: by label hierarchy, or by neighbours in an embedding."""
from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..methods.data import Samples, SampleSet, answers, unlabelled
from ..methods.training import device_of
from ..ops import check
from .sets import Triple, check_labels

_BLOCK = 1 << 22  # distances held at once: 32 MiB in float64
LISTED = 20  # nearest neighbours of a forget sample that count, where there are retain samples enough


class Neighbours(NamedTuple):
    """indices (m,) int64, best first; scores (r,) int64: in how many forget samples' lists each retain sample is."""

    indices: torch.Tensor
    scores: torch.Tensor


class Agreement(NamedTuple):
    """How well a choice of samples matches another: shares in [0, 1]. base_rate: the precision of a blind choice."""

    precision: float
    recall: float
    base_rate: float


@check.kinds
def by_label(fine: Tensor, forget, superclass_of: Tensor) -> Tensor:
    """Adjacent by label hierarchy: fine classes that share a superclass with a forget class and are not forgotten.

    fine           (n,) int64 fine labels
    forget         indices of the forgotten fine classes
    superclass_of  (classes,) int64, fine class -> superclass
    Returns (n,) bool. Raises ValueError for labels that are not (n,) int64, or outside [0, classes).

    >>> import torch, entangle_fast as ef
    >>> ef.tasks.by_label(torch.tensor([0, 1, 2, 1]), [0], superclass_of=torch.tensor([0, 0, 1]))
    tensor([False,  True, False,  True])
    """
    check.samples("superclass_of", superclass_of)
    check_labels("fine", fine, superclass_of)
    check.require(superclass_of.dim() == 1, f"superclass_of: got shape {tuple(superclass_of.shape)}; needs (classes,)")
    forgotten = torch.zeros_like(superclass_of, dtype=torch.bool)
    forgotten[torch.as_tensor(forget, dtype=torch.int64, device=forgotten.device)] = True
    near = torch.isin(superclass_of, superclass_of[forgotten]) & ~forgotten
    return near.to(fine.device)[fine]


@check.kinds
def by_knn(embed_forget: Tensor, embed_retain: Tensor, k: int | None = None, top: float = 0.10) -> Neighbours:
    """Adjacent by neighbours: the `top` share of retain samples that are in most forget samples' lists of k nearest.

    embed_forget (f, d), embed_retain (r, d): floating point, finite. Distance is Euclidean, in float64.
    k: default 20, or ceil(top * r) where that is fewer: in lists longer than what is looked for, ties would decide (ours).
    Source: Cheng et al. 2026 (arXiv 2603.26569), appendix, as a third-party summary gives it.

    Ties go to the lower index, in the lists and in the ranking. A sample that is in no list is never adjacent, so
    fewer than ceil(top * r) may come back. Never holds f x r distances. Returns `Neighbours`.
    Raises ValueError for shapes that do not match, non-finite values, k not in 1..r, top not in (0, 1].

    >>> import torch, entangle_fast as ef
    >>> ef.tasks.by_knn(torch.tensor([[0.0], [0.2]]), torch.tensor([[5.0], [0.1], [9.0], [0.3]]), k=2, top=0.5).indices
    tensor([1, 3])
    """
    for name, e in (("embed_forget", embed_forget), ("embed_retain", embed_retain)):
        if e.dim() != 2 or len(e) == 0 or not e.is_floating_point():
            raise ValueError(f"{name}: got shape {tuple(e.shape)} and {e.dtype}; needs (n, d) floating point, n > 0")
        if not torch.isfinite(e).all():
            raise ValueError(f"{name}: got non-finite values; look at the model's weights and inputs")
    f, r = embed_forget.double(), embed_retain.double()
    if f.shape[1] != r.shape[1]:
        raise ValueError(f"embed_retain: got {r.shape[1]} features, embed_forget has {f.shape[1]}; "
                         "needs as many: embed both with the same layer")
    if not 0 < top <= 1:
        raise ValueError(f"top: got {top}, needs a share in (0, 1]")
    wanted = math.ceil(top * len(r))
    k = min(LISTED, wanted) if k is None else k
    if not 1 <= k <= len(r):
        raise ValueError(f"k: got {k}, needs 1 to {len(r)} (the number of retain samples)")
    # centred, so that |a|^2 - 2ab + |b|^2 does not cancel; by a power of two, so that equal distances stay equal
    mean = r.mean(0)
    grid = 2.0 ** math.ceil(math.log2(max((r - mean).abs().max().item(), torch.finfo(r.dtype).eps)))
    centre = (mean / grid).round() * grid
    f, r = f - centre, r - centre
    norms = r.square().sum(1)
    scores = torch.zeros(len(r), dtype=torch.int64, device=r.device)
    for rows in f.split(max(1, _BLOCK // len(r))):
        distance = norms - 2 * rows @ r.T  # + |row|^2, which does not change a row's order
        kth = distance.topk(k, dim=1, largest=False).values[:, -1:]
        nearer, level = distance < kth, distance == kth
        room = k - nearer.sum(1, keepdim=True)
        scores += (nearer | level & (level.cumsum(1, dtype=torch.int32) <= room)).sum(0)
    order = scores.argsort(descending=True, stable=True)[:wanted]
    return Neighbours(order[scores[order] > 0], scores)


@check.kinds
def agreement(indices: Tensor, adjacent: Tensor) -> Agreement:
    """Precision and recall of chosen samples against a label hierarchy's answer.

    indices   (m,) int64, the chosen retain samples (from `by_knn`)
    adjacent  (r,) bool, who is adjacent by label (from `by_label`), over the same retain samples
    Returns `Agreement`. Raises ValueError when nothing was chosen or nobody is adjacent.

    >>> import torch, entangle_fast as ef
    >>> ef.tasks.agreement(torch.tensor([1, 3]), torch.tensor([False, True, True, False]))
    Agreement(precision=0.5, recall=0.5, base_rate=0.5)
    """
    check.samples("adjacent", adjacent)
    check.require(adjacent.dim() == 1 and adjacent.dtype == torch.bool,
                  f"adjacent: got {adjacent.dtype} of shape {tuple(adjacent.shape)}; needs bool (r,)")  # fmt: skip
    check_labels("indices", indices, adjacent)
    if len(indices) == 0 or not adjacent.any():
        raise ValueError(f"indices, adjacent: got {len(indices)} indices and {int(adjacent.sum())} adjacent samples; "
                         "needs at least one of each")
    hits = int(adjacent[indices].sum())
    return Agreement(hits / len(indices), hits / int(adjacent.sum()), int(adjacent.sum()) / len(adjacent))


@check.kinds
def embed(model: nn.Module, data: Tensor | Samples, layer: str | None = None, batch_size: int = 512) -> Tensor:
    """Features of samples: what goes into the model's last nn.Linear, or into the module named `layer`.

    data  x (n, ...), (x, y) tensors, or a map-style Dataset of such pairs, read in batches; labels are not looked at
    Returns (n, d) on the CPU, in the model's dtype. "Last" is in the order of registration.
    The model runs in eval mode without gradients and is left as found, also after an error.
    Raises ValueError when there is no such layer, when the forward pass does not call it, when data is empty or cannot be
    read, and when what goes into the layer is not (n, d).

    Equivalent to: ``model[:-1](data)`` for a Sequential whose last module is linear

    >>> import torch, entangle_fast as ef
    >>> ef.tasks.embed(torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)), torch.randn(6, 5)).shape
    torch.Size([6, 8])
    """
    samples = unlabelled("data", data, device_of(model))
    modules = dict(model.named_modules())
    if layer is None:
        layer = next((n for n in reversed(modules) if isinstance(modules[n], torch.nn.Linear)), None)
        if layer is None:
            raise ValueError("model: has no nn.Linear; pass layer=, the name of the module whose input to take")
    if layer not in modules:
        raise ValueError(f"layer: got {layer!r}, which is no module of the model; needs a name of named_modules()")
    inputs = []

    def take(out, y):
        if not inputs:
            raise ValueError(f"layer: the forward pass does not call {layer!r}; pass a layer that it calls")
        features = inputs[-1]
        inputs.clear()
        if features.dim() != 2 or len(features) != len(y):
            raise ValueError(f"layer: the input of {layer!r} has shape {tuple(features.shape)}, needs ({len(y)}, d); pass a layer after "
                             "pooling")
        return features

    def keep(module, args, kwargs):
        inputs[:] = [(*args, *kwargs.values())[0].clone()]  # the layer may write to it

    handle = modules[layer].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        return answers(model, samples, take, batch_size)
    finally:
        handle.remove()


@check.kinds
def split_by_knn(
    model: nn.Module, forget: Samples, retain: Samples, *, k: int | None = None, top: float = 0.10, layer: str | None = None,
    batch_size: int = 512,
) -> Triple:
    """Cut the retain samples into adjacent and remote ones by their neighbours in the model's own embedding.

    forget, retain  disjoint sets, each (x, y) tensors or a map-style Dataset of such pairs, read in batches
    k, top          of `by_knn`.  layer, batch_size  of `embed`
    Returns `Triple` (forget, adjacent, remote), for ``ef.unlearn(model, **split._asdict())``: forget as it was given; adjacent and
    remote in retain's order, tensors of tensors (copies), Subsets of a Dataset. Only embeddings are held meanwhile.
    Raises ValueError as `embed` and `by_knn`, and when no sample would be left to be remote.

    >>> import torch, entangle_fast as ef
    >>> x, y, model = torch.randn(60, 4), torch.arange(60) % 2, torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    >>> split = ef.tasks.split_by_knn(model, (x[:20], y[:20]), (x[20:], y[20:]), top=0.25)
    >>> [(name, len(y)) for name, (_, y) in split._asdict().items()]
    [('forget', 20), ('adjacent', 10), ('remote', 30)]
    """
    sets = [SampleSet(name, data, device_of(model)) for name, data in (("forget", forget), ("retain", retain))]
    found = by_knn(*(embed(model, samples, layer, batch_size) for samples in sets), k, top)
    kept = sets[1]
    near = torch.zeros(len(kept), dtype=torch.bool).index_fill_(0, found.indices, True)
    if near.all():
        raise ValueError(f"top: got {top}, which makes all {len(kept)} retain samples adjacent; needs some left for remote: lower it, or "
                         "give more retain samples")
    return Triple(forget, *(kept.part(rows.nonzero()[:, 0]) for rows in (near, ~near)))
