import numpy as np
import pytest
import torch
from PIL import Image

from entangle_fast.tasks import image_folder


def pixels(seed, shape=(6, 5, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def root(tmp_path):
    for split, n in (("train", 3), ("test", 2)):
        for c, name in enumerate(("car", "cat", "dog", "lorry")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(pixels(10 * c + i)).save(tmp_path / split / name / f"{i}.png")
    (tmp_path / "train" / "cat" / ".hidden").write_text("no image")
    return tmp_path


def with_superclasses(root, text='[superclasses]\npet = ["cat", "dog"]\nvehicle = ["car", "lorry"]\n'):
    (root / "superclasses.toml").write_text(text)
    return root


def test_loads_pixels_and_labels(root):
    task = image_folder(root, forget="cat")
    assert task.class_names == ("car", "cat", "dog", "lorry") and task.labels == "fine"
    assert task.train_x.shape == (12, 3, 6, 5) and task.train_y.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert torch.equal(task.train_x[4], torch.from_numpy(pixels(11)).permute(2, 0, 1))


def test_superclasses(root):
    task = image_folder(with_superclasses(root), forget="cat")
    assert task.superclass_names == ("pet", "vehicle") and task.superclass_of.tolist() == [1, 0, 0, 1]
    assert [f.unique().tolist() for f in task.split().train_fine] == [[1], [2], [0, 3]]


def test_grey_and_resized(root):
    Image.fromarray(pixels(0, (9, 9, 3))).save(root / "train" / "car" / "0.png")
    with pytest.raises(ValueError, match=r"pass size="):
        image_folder(root, forget="cat")
    assert image_folder(root, forget="cat", size=(4, 8), mode="L").train_x.shape == (12, 1, 4, 8)


def test_corrupt_files_are_named(root):
    path = root / "train" / "dog" / "1.png"
    for raw in (path.read_bytes()[:60], b"not an image", b""):
        path.write_bytes(raw)
        with pytest.raises(ValueError, match="1.png: no usable image"):
            image_folder(root, forget="cat")


def test_nothing_is_passed_over(root):
    Image.fromarray(np.zeros((6, 5), np.uint16)).save(root / "train" / "dog" / "deep.png")
    with pytest.raises(ValueError, match="deep.png: no usable image .more than 8 bits"):
        image_folder(root, forget="cat")
    (root / "train" / "dog" / "deep.png").unlink()
    (root / "train" / "dog" / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="notes.txt: no usable image"):
        image_folder(root, forget="cat")


@pytest.mark.parametrize("text, message", [
    ('[superclasses]\npet = ["cat", "dog"]', "in no superclass: car, lorry"),
    ('[superclasses]\npet = ["cat", "dog", "car", "lorry", "cow"]', "without a folder: cow"),
    ('[superclasses]\npet = ["cat", "dog", "cat"]\nvehicle = ["car", "lorry"]', "twice: cat"),
    ("pet = 1", "needs a table"),
    ("[superclasses\n", "needs a table"),
    ("superclasses = 3", "needs a table"),
])
def test_superclasses_that_do_not_cover_each_class_once(root, text, message):
    with pytest.raises(ValueError, match=f"superclasses.toml: .*{message}"):
        image_folder(with_superclasses(root, text), forget="cat")


def test_wrong_folders(root, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder 'train'"):
        image_folder(tmp_path / "nowhere", forget="cat")
    with pytest.raises(ValueError, match="mode: got 'CMYK'"):
        image_folder(root, forget="cat", mode="CMYK")
    (root / "test" / "cow").mkdir()
    with pytest.raises(ValueError, match="has cow, which train has not"):
        image_folder(root, forget="cat")


def test_no_images(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match="has no image"):
        image_folder(tmp_path, forget="cat")
