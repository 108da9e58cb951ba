"""A task from a folder of image files: train/<class>/* and test/<class>/*."""
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .image_classes import ImageClasses


def image_folder(root, *, forget, labels=None, size=None, mode="RGB"):
    """Load root/train/<class>/* and root/test/<class>/* as an `ImageClasses` task; classes are train's folders, sorted.

    Superclasses come from root/superclasses.toml, where there is one:

        [superclasses]
        pet = ["cat", "dog"]
        vehicle = ["car", "lorry"]

    labels  "super" or "fine"; None: "super" where there are superclasses, else "fine".
    Every file in a class's folder is read, in any format that Pillow knows; only hidden files (.name) are passed over.

    size    (height, width) to resize to (bilinear); None: images must all have one size.
    mode    "RGB" (3 channels) or "L" (1).
    Raises FileNotFoundError for missing folders, ValueError for a file that is no usable image (named), sizes
    that differ, classes of test that train lacks, and superclasses that do not cover each class once.
    """
    root = Path(root)
    if mode not in ("RGB", "L"):
        raise ValueError(f"mode: got {mode!r}, needs 'RGB' or 'L'")
    for split in ("train", "test"):
        if not (root / split).is_dir():
            raise FileNotFoundError(f"root: {root} has no folder {split!r}; needs train/<class>/ and test/<class>/")
    names = _folders(root / "train")
    if not names:
        raise ValueError(f"root: {root / 'train'} has no class folders; needs train/<class>/")
    strangers = sorted(set(_folders(root / "test")) - set(names))
    if strangers:
        raise ValueError(f"root: {root / 'test'} has {', '.join(strangers)}, which train has not; add them there or "
                         "remove them")
    superclass_names, superclass_of = _superclasses(root / "superclasses.toml", names)
    (train_x, train_y), (test_x, test_y) = (_read(root / split, names, size, mode) for split in ("train", "test"))
    return ImageClasses(
        train_x, train_y, test_x, test_y, class_names=names, superclass_names=superclass_names,
        superclass_of=superclass_of, labels=labels or ("super" if superclass_names else "fine"), forget=forget,
        source=f"images, {root}")


class _Images(Dataset):
    """(x (C, H, W) uint8, y) of each path; y is the place of its folder's name in `names`."""

    def __init__(self, paths, names, size, mode):
        self.paths, self.size, self.mode = paths, size, mode
        self.labels = [names.index(path.parent.name) for path in paths]
        self.shape = None

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        from PIL import Image
        try:
            with Image.open(self.paths[i]) as image:
                if image.mode.startswith(("I", "F")):  # Pillow would clip them
                    raise ValueError("more than 8 bits a channel; save it with 8")
                image = image.convert(self.mode)
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and more
            raise ValueError(f"{self.paths[i]}: no usable image ({error}); mend or remove it") from error
        if self.size is not None:
            image = image.resize((self.size[1], self.size[0]), Image.Resampling.BILINEAR)
        x = torch.from_numpy(np.array(image))
        x = x.unsqueeze(0) if self.mode == "L" else x.permute(2, 0, 1)
        self.shape = self.shape or x.shape
        if x.shape != self.shape:
            raise ValueError(f"{self.paths[i]}: is {tuple(x.shape)}, {self.paths[0]} is {tuple(self.shape)}; "
                             "pass size=(height, width)")
        return x, self.labels[i]


def _folders(path):
    return tuple(sorted(p.name for p in path.iterdir() if p.is_dir()))


def _read(folder, names, size, mode):
    paths = sorted(p for name in _folders(folder) for p in (folder / name).iterdir() if not p.name.startswith("."))
    if not paths:
        raise ValueError(f"root: {folder} has no image; needs {folder.name}/<class>/<file>")
    batches = list(DataLoader(_Images(paths, names, size, mode), batch_size=256, num_workers=0))
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def _superclasses(path, names):
    """Names of superclasses and (classes,) fine class -> superclass; ((), None) without the file."""
    if not path.is_file():
        return (), None
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))["superclasses"]
        members = {group: list(classes) for group, classes in table.items()}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: got {error!r}; needs a table [superclasses] with lines name = [\"class\", …]"
                         ) from error
    listed = [name for classes in members.values() for name in classes]
    wrong = {"twice": {n for n in listed if listed.count(n) > 1}, "without a folder": set(listed) - set(names),
             "in no superclass": set(names) - set(listed)}
    if any(wrong.values()):
        said = "; ".join(f"{what}: {', '.join(sorted(map(str, which)))}" for what, which in wrong.items() if which)
        raise ValueError(f"{path}: {said}; needs each class folder once")
    groups = tuple(members)
    return groups, torch.tensor([next(i for i, g in enumerate(groups) if name in members[g]) for name in names])
