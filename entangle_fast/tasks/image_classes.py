"""The task of forgetting whole classes of images."""
from __future__ import annotations

import difflib
from dataclasses import dataclass, field

import torch

from ..ops import check
from .adjacency import by_knn, by_label, embed
from .sets import NoneAdjacent, Sets, Triple, check_labels


@check.kinds
@dataclass
class ImageClasses:
    """Images with fine classes, maybe grouped in superclasses, and the fine classes to forget.

    train_x, test_x   (N, C, H, W) uint8
    train_y, test_y   (N,) int64, fine classes
    class_names       names of the fine classes
    forget            fine classes to forget: a name or an index, or a list of them; kept as a tuple of indices
    superclass_names  names of the superclasses; () when there are none
    superclass_of     (len(class_names),) int64, fine class -> superclass; needed with superclass_names
    labels            what the model predicts: "super" or "fine"
    mean, std         per channel, in units of [0, 1] images; measured on train_x when None. A constant channel has
                      std 1.
    source            where the data came from, for reports

    Raises ValueError for shapes, dtypes, labels and names that do not fit.
    """

    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor
    class_names: tuple
    forget: tuple = field(kw_only=True)
    superclass_names: tuple = ()
    superclass_of: torch.Tensor | None = None
    labels: str = "super"
    mean: torch.Tensor | None = None
    std: torch.Tensor | None = None
    source: str = ""

    def __post_init__(self):
        self.class_names, self.superclass_names = tuple(self.class_names), tuple(self.superclass_names)
        for split, x, y in (("train", self.train_x, self.train_y), ("test", self.test_x, self.test_y)):
            if x.dim() != 4 or x.dtype != torch.uint8 or len(x) == 0:
                raise ValueError(f"{split}_x: got shape {tuple(x.shape)} and {x.dtype}; "
                                 "needs (N, C, H, W) uint8, N > 0")
            check_labels(f"{split}_y", y, self.class_names)
            if len(x) != len(y):
                raise ValueError(f"{split}_y: got {len(y)} labels for {len(x)} images; needs one each")
        if self.train_x.shape[1:] != self.test_x.shape[1:]:
            raise ValueError(f"test_x: got images of {tuple(self.test_x.shape[1:])}, train_x has "
                             f"{tuple(self.train_x.shape[1:])}; needs the same (C, H, W)")
        if self.labels not in ("super", "fine"):
            raise ValueError(f"labels: got {self.labels!r}, needs 'super' or 'fine'")
        if self.superclass_names:
            if self.superclass_of is None or len(self.superclass_of) != len(self.class_names):
                got = None if self.superclass_of is None else len(self.superclass_of)
                raise ValueError(f"superclass_of: got {got} entries for {len(self.class_names)} classes; "
                                 "needs one each")
            check_labels("superclass_of", self.superclass_of, self.superclass_names)
        elif self.labels == "super":
            raise ValueError("labels: got 'super' without superclass_names; name the superclasses, "
                             "or pass labels='fine'")
        self.forget = self._indices(self.forget)
        if self.mean is None or self.std is None:
            self.mean, self.std = _moments(self.train_x)

    @property
    def label_names(self):
        """Names of what the model predicts."""
        return self.superclass_names if self.labels == "super" else self.class_names

    @property
    def num_classes(self):
        """How many classes the model predicts."""
        return len(self.label_names)

    def train_set(self):
        """All training samples: x (N, C, H, W) float32, normalised; y (N,) int64, what the model predicts."""
        return self._samples(self.train_x, self.train_y)

    def test_set(self):
        """All test samples, as `train_set`."""
        return self._samples(self.test_x, self.test_y)

    def split(self, adjacency="label", *, model=None, k=None, top=0.10, layer=None):
        """Cut train and test data into forget, adjacent and remote `Sets`.

        adjacency  "label": adjacent are the retained fine classes that share a superclass with a forgotten one.
                   "knn": see `by_knn`, in the embedding of `model` at `layer` (see `embed`); the train and the test
                   data are cut each by its own neighbours, with the same k (where one is given) and top.
        Raises ValueError when a set comes out empty, or superclasses or the model are missing; of its kind NoneAdjacent where "knn"
        would help.
        """
        if adjacency not in ("label", "knn"):
            raise ValueError(f"adjacency: got {adjacency!r}, needs 'label' or 'knn'")
        if adjacency == "knn" and model is None:
            raise ValueError("model: got None, needs the trained model for adjacency='knn'")
        if adjacency == "label" and not self.superclass_names:
            raise NoneAdjacent("adjacency: got 'label' without superclasses", "pass adjacency='knn' and model=")
        parts = {}
        for name, x, fine in (("train", self.train_x, self.train_y), ("test", self.test_x, self.test_y)):
            if adjacency == "label":
                near = by_label(fine, self.forget, self.superclass_of)
            else:
                near = self._near_by_knn(name, x, fine, model, k, top, layer)
            gone = self._forgotten(fine)
            index = Triple(*(mask.nonzero()[:, 0] for mask in (gone, near, ~gone & ~near)))
            self._refuse_empty(name, index)
            parts[name] = Triple(*(self._samples(x[i], fine[i]) for i in index))
            parts[f"{name}_index"], parts[f"{name}_fine"] = index, Triple(*(fine[i] for i in index))
        return Sets(**parts, label_names=self.label_names, class_names=self.class_names)

    def _samples(self, x, fine):
        mean, std = (t.to(x.device).view(-1, 1, 1) for t in (self.mean, self.std))
        y = self.superclass_of.to(fine.device)[fine] if self.labels == "super" else fine.clone()
        return x.float().div_(255).sub_(mean).div_(std), y

    def _forgotten(self, fine):
        return torch.isin(fine, torch.tensor(self.forget, device=fine.device))

    def _near_by_knn(self, name, x, fine, model, k, top, layer):
        """(n,) bool: the samples that are adjacent by neighbours."""
        gone = self._forgotten(fine).cpu()  # where the features are
        self._refuse_empty(name, Triple(gone.nonzero(), None, (~gone).nonzero()))
        features = embed(model, self._samples(x, fine)[0], layer)
        near = torch.zeros(len(fine), dtype=torch.bool)
        near[(~gone).nonzero()[:, 0][by_knn(features[gone], features[~gone], k, top).indices]] = True
        return near.to(fine.device)

    def _refuse_empty(self, name, index):
        forgotten = ", ".join(self.class_names[i] for i in self.forget)
        for part, i in zip(Triple._fields, index):
            if i is not None and len(i) == 0:
                found = f"forget: got {forgotten}, which leaves the {part} set of the {name} data empty: "
                if part == "adjacent":
                    raise NoneAdjacent(f"{found}no retained class shares its superclass",
                                       "pass adjacency='knn' with model=, or forget fewer classes")
                mend = {"forget": f"the {name} data has no sample of it; forget a class that it has",
                        "remote": "no sample is left; forget fewer classes, or lower top"}[part]
                raise ValueError(found + mend)

    def _indices(self, forget):
        chosen = [forget] if isinstance(forget, (str, int)) else list(forget)
        if not chosen:
            raise ValueError("forget: got no class, needs at least one")
        indices = tuple(self._index(item) for item in chosen)
        if len(set(indices)) < len(indices):
            raise ValueError(f"forget: got {chosen}, which names a class twice; name each once")
        return indices

    def _index(self, item):
        if isinstance(item, str):
            if item in self.class_names:
                return self.class_names.index(item)
            folded = {name.casefold(): name for name in self.class_names}
            near = difflib.get_close_matches(item.casefold(), folded, n=1, cutoff=0)
            raise ValueError(f"forget: got {item!r}, which is no class; the nearest is {folded[near[0]]!r}")
        if not check.whole(item) or not 0 <= item < len(self.class_names):
            raise ValueError(f"forget: got {item!r}, needs a class name or an index from 0 to "
                             f"{len(self.class_names) - 1}")
        return int(item)


def _moments(x):
    """Mean and standard deviation per channel of x (N, C, H, W) uint8, in units of [0, 1]: exact, from a histogram."""
    grey = torch.arange(256, dtype=torch.float64, device=x.device) / 255
    counts = torch.stack([torch.bincount(c.reshape(-1), minlength=256) for c in x.unbind(1)]).double()
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ grey
    std = (share @ grey.square() - mean.square()).clamp(min=0).sqrt()
    return mean.float(), torch.where(std > 1e-6, std, 1.0).float()
