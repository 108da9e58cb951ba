import dataclasses

import pytest
import torch
from pretend import DEVICE, moved, pretended

from entangle_fast.tasks import Triple


def test_split_by_label(make_task):
    task = make_task()
    sets = task.split()
    assert [f.unique().tolist() for f in sets.train_fine] == [[2], [0, 1], [3, 4, 5]]
    assert [f.unique().tolist() for f in sets.test_fine] == [[2], [0, 1], [3, 4, 5]]
    assert [y.unique().tolist() for _, y in sets.train] == [[0], [0], [1, 2]]
    assert sorted(torch.cat(sets.train_index).tolist()) == list(range(24))  # nothing lost, nothing twice
    x, y = task.train_set()
    for (part_x, part_y), index in zip(sets.train, sets.train_index):
        assert torch.equal(part_x, x[index]) and torch.equal(part_y, y[index])
    assert sets.num_classes == task.num_classes == 3 and sets.label_names == ("animal", "vehicle", "tree")
    assert all(getattr(sets, name) is getattr(sets.train, name) for name in Triple._fields)
    assert len(sets.retain[0]) == len(sets.retain[1]) == 20


def test_fine_labels(make_task):
    sets = make_task(labels="fine").split()
    assert all(torch.equal(y, f) for (_, y), f in zip(sets.train, sets.train_fine))
    assert sets.num_classes == 6


def test_normalised_by_the_training_data(make_task):
    task = make_task()
    x, _ = task.train_set()
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(2), atol=1e-5, rtol=0)
    assert task.train_x.dtype == torch.uint8  # the task's own data stay as they are


def test_a_constant_channel_gives_no_nan(make_task):
    x = torch.full((24, 2, 4, 4), 7, dtype=torch.uint8)
    assert torch.equal(make_task(train_x=x).train_set()[0], torch.zeros(24, 2, 4, 4))


def test_given_moments_are_used(make_task):
    task = make_task(mean=torch.zeros(2), std=torch.ones(2))
    torch.testing.assert_close(task.test_set()[0], task.test_x / 255)


def test_forget_by_name_index_and_list(make_task):
    assert make_task(forget=2).forget == make_task(forget=["fox"]).forget == (2,)
    task = make_task(forget=["fox", 3])
    assert task.forget == (2, 3)
    assert [f.unique().tolist() for f in task.split().train_fine] == [[2, 3], [0, 1, 4], [5]]
    assert dataclasses.replace(task, forget="cat").forget == (0,)


def test_split_by_knn(make_task):
    # the embedding is the mean grey: retained samples as dark as the forget class are adjacent
    train_x, test_x = (torch.full((n, 2, 4, 4), 200, dtype=torch.uint8) for n in (24, 12))
    train_x[torch.arange(6).repeat(4) == 2] = 10
    train_x[[4, 9]] = 20
    test_x[torch.arange(6).repeat(2) == 2] = 10
    test_x[5] = 20
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(32, 3))
    task = make_task(train_x=train_x, test_x=test_x)
    sets = task.split("knn", model=model, k=1, top=0.10)
    assert sets.train_index.adjacent.tolist() == [4]  # ties go to the lower index
    assert task.split("knn", model=model, k=2, top=0.10).train_index.adjacent.tolist() == [4, 9]
    assert sets.test_index.adjacent.tolist() == [5]
    assert sorted(torch.cat(sets.train_index).tolist()) == list(range(24))


@pytest.mark.parametrize("fields, message", [
    ({"forget": "Foxx"}, "forget: got 'Foxx', which is no class; the nearest is 'fox'"),
    ({"forget": []}, "forget: got no class"),
    ({"forget": 6}, "index from 0 to 5"),
    ({"forget": -1}, "index from 0 to 5"),
    ({"forget": ["fox", 2]}, "names a class twice"),
    ({"labels": "coarse"}, "labels: got 'coarse'"),
    ({"train_y": torch.arange(24)}, "train_y: got labels from 0 to 23, needs 0 to 5"),
    ({"test_y": torch.arange(12).float()}, "test_y: got labels of shape .* needs .* int64"),
    ({"test_y": torch.arange(6)}, "test_y: got 6 labels for 12 images"),
    ({"train_x": torch.zeros(24, 2, 4, 4)}, "train_x: got shape .* uint8"),
    ({"test_x": torch.zeros(12, 1, 4, 4, dtype=torch.uint8)}, "test_x: got images of"),
    ({"superclass_of": torch.zeros(3).long()}, "superclass_of: got 3 entries for 6"),
    ({"superclass_of": None}, "superclass_of: got None"),
    ({"superclass_of": torch.full((6,), 3)}, "superclass_of: got labels from 3 to 3, needs 0 to 2"),
    ({"superclass_names": ()}, "labels: got 'super' without superclass_names"),
])
def test_what_does_not_fit_is_refused(make_task, fields, message):
    with pytest.raises(ValueError, match=message):
        make_task(**fields)


def test_empty_sets_are_refused_with_the_mend(make_task):
    with pytest.raises(ValueError, match="adjacent set of the train data empty.*adjacency='knn'"):
        make_task(forget="oak").split()
    with pytest.raises(ValueError, match="remote set of the train data empty"):
        make_task(forget=["dog", "lorry", "oak"]).split()
    with pytest.raises(ValueError, match="remote set of the train data empty"):
        make_task(forget=list(range(6))).split("knn", model=torch.nn.Linear(4, 4))
    with pytest.raises(ValueError, match="forget set of the test data empty"):
        make_task(test_y=torch.tensor([0, 1, 3, 4, 5, 5] * 2)).split()
    with pytest.raises(ValueError, match="adjacency='knn'"):
        make_task(superclass_names=(), superclass_of=None, labels="fine").split()
    with pytest.raises(ValueError, match="model: got None"):
        make_task().split("knn")
    with pytest.raises(ValueError, match="adjacency: got 'near'"):
        make_task().split("near")


def test_sets_refuse_overlap_emptiness_and_bad_labels(make_task):
    sets = make_task().split()
    index = sets.train_index
    with pytest.raises(ValueError, match="train_index: 1 samples are in more than one set"):
        dataclasses.replace(sets, train_index=index._replace(forget=torch.cat([index.forget[:-1], index.remote[:1]])))
    empty = (torch.empty(0, 2, 4, 4), torch.empty(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="test.adjacent: got 0 samples"):
        dataclasses.replace(sets, test=sets.test._replace(adjacent=empty))
    with pytest.raises(ValueError, match="train.remote: got labels from 1 to 2, needs 0 to 1"):
        dataclasses.replace(sets, label_names=("animal", "vehicle"))
    with pytest.raises(ValueError, match="train.forget: got 4 samples, 4 labels, 1 fine"):
        dataclasses.replace(sets, train_fine=Triple(*(f[:1] for f in sets.train_fine)))


@pytest.mark.parametrize("labels", ["super", "fine"])
@pytest.mark.parametrize("adjacency", ["label", "knn"])
def test_images_may_be_on_any_device(make_task, labels, adjacency):
    task = make_task(labels=labels)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(32, 6))
    wanted = task.split(adjacency, model=model)
    with pretended():
        there = make_task(labels=labels, **{name: getattr(task, name).to(DEVICE) for name in ("train_x", "train_y", "test_x", "test_y")})
        found = there.split(adjacency, model=moved(model))
        for split in ("train", "test"):
            for (x, y), (a, b), rows, same in zip(*(getattr(s, split) for s in (found, wanted)),
                                                  *(getattr(s, f"{split}_index") for s in (found, wanted))):  # fmt: skip
                assert x.device == y.device == DEVICE and torch.equal(rows.cpu(), same)
                torch.testing.assert_close(x.cpu(), a)
                assert torch.equal(y.cpu(), b)
