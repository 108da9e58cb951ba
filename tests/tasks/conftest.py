import pytest
import torch

from entangle_fast.tasks import ImageClasses


@pytest.fixture
def make_task():
    """A task of six classes in three superclasses, four training and two test images each; keywords replace fields."""
    def make(**fields):
        generator = torch.Generator().manual_seed(0)
        task = {"train_x": torch.randint(0, 256, (24, 2, 4, 4), generator=generator, dtype=torch.uint8),
                "train_y": torch.arange(6).repeat(4),
                "test_x": torch.randint(0, 256, (12, 2, 4, 4), generator=generator, dtype=torch.uint8),
                "test_y": torch.arange(6).repeat(2),
                "class_names": ("cat", "dog", "fox", "car", "lorry", "oak"),
                "superclass_names": ("animal", "vehicle", "tree"),
                "superclass_of": torch.tensor([0, 0, 0, 1, 1, 2]), "forget": "fox"}
        return ImageClasses(**{**task, **fields})
    return make
