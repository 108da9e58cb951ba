"""Batches whose order is a pure function of the seed."""

import pytest
import torch
from small import data, sets
from torch.utils import data as loading
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from entangle_fast.methods.data import Data, SampleSet, measured_sets, unlabelled


def test_a_pass_visits_every_sample_once_and_the_next_in_another_order():
    s = SampleSet("forget", sets()["forget"], "cpu", 0)
    passes = [torch.cat([s.rows(k, 6) for k in range(10)])[20 * e : 20 * (e + 1)] for e in range(3)]
    assert all(p.sort().values.tolist() == list(range(20)) for p in passes)
    assert not torch.equal(passes[0], passes[1]) and not torch.equal(passes[1], passes[2])


def test_a_batch_is_a_function_of_its_number_alone():
    s = SampleSet("forget", sets()["forget"], "cpu", 3)
    later = s.rows(17, 6)
    assert torch.equal(SampleSet("forget", sets()["forget"], "cpu", 3).rows(17, 6), later)
    assert not torch.equal(SampleSet("forget", sets()["forget"], "cpu", 4).rows(17, 6), later)
    assert len(s.rows(5, 100)) == 20  # never more than there are


def test_tensors_and_datasets_give_the_same_batches():
    pair = sets()["remote"]
    held, read = SampleSet("remote", pair, "cpu", 0), SampleSet("remote", TensorDataset(*pair), "cpu", 0)
    assert all(torch.equal(a, b) for a, b in zip(held.batch(3, 8), read.batch(3, 8)))


CHOOSES = {
    "SubsetRandomSampler": dict(sampler=loading.SubsetRandomSampler([1, 2, 3])),
    "WeightedRandomSampler": dict(sampler=loading.WeightedRandomSampler([1.0] * 20, 20)),
    "RandomSampler": dict(sampler=loading.RandomSampler(range(20), num_samples=5)),
    "list": dict(batch_sampler=[[1, 2], [3]]),
    "collate_fn": dict(collate_fn=lambda samples: samples),
}


@pytest.mark.parametrize("what", CHOOSES)
def test_a_loader_whose_choice_would_be_dropped_is_refused(what):
    with pytest.raises(ValueError, match=f"forget: got a DataLoader.*{what}"):
        SampleSet("forget", DataLoader(TensorDataset(torch.randn(20, 2), torch.zeros(20)), **CHOOSES[what]), "cpu")


@pytest.mark.parametrize("how", [
    {}, dict(shuffle=True, batch_size=3), dict(batch_size=None), dict(drop_last=True, batch_size=3),
])  # fmt: skip
def test_a_loader_of_all_samples_is_its_data_set(how):
    pair = torch.randn(20, 2), torch.zeros(20)
    assert torch.equal(SampleSet("forget", DataLoader(TensorDataset(*pair), **how), "cpu").take(torch.arange(20))[0], pair[0])


def test_augmented_draws_are_a_function_of_seed_and_batch():
    def jitter(x, generator):
        return x + torch.randn(x.shape, generator=generator)

    one, two = (Data.of(**sets(), device="cpu", seed=s, augment=jitter) for s in (0, 0))
    for name in ("forget", "adjacent", "remote"):
        a, b = getattr(one, name), getattr(two, name)
        assert torch.equal(a.batch(4, 8)[1], b.batch(4, 8)[1]) and not torch.equal(a.batch(4, 8)[1], a.batch(5, 8)[1])
        assert torch.equal(next(a.chunks())[1], sets()[name][0])  # evaluation sees the samples themselves


def test_chunks_cover_a_set_in_its_own_order():
    s = data().remote
    assert torch.cat([rows for rows, _, _ in s.chunks(7)]).tolist() == list(range(44))
    assert torch.equal(torch.cat([x for _, x, _ in s.chunks(7)]), s.tensors[0])


@pytest.mark.parametrize("wrap", [lambda x, y: (x, y), TensorDataset])
def test_labels_and_parts_of_a_set(wrap):
    x, y = sets()["remote"]
    given = wrap(x, y)
    s = SampleSet("remote", given, "cpu")
    assert torch.equal(s.labels(), y)
    rows = torch.tensor([7, 3])
    part = s.part(rows)
    assert isinstance(part, tuple if given is not s.dataset else Subset)
    again = SampleSet("other", SampleSet("mine", part, "cpu"), "cpu")
    assert again.name == "mine" and len(again) == 2  # whose name it was stays in errors
    assert all(torch.equal(a, t[rows]) for a, t in zip(again.take(torch.arange(2)), (x, y)))
    with pytest.raises(ValueError, match="batch_size: got 0; needs a whole number >= 1"):
        next(s.chunks(0))


def test_x_alone_serves_who_reads_no_labels():
    x, y = sets()["remote"]
    for given in (x, (x, y), TensorDataset(x, y)):
        assert torch.equal(next(unlabelled("data", given, "cpu").chunks())[1], x)
    with pytest.raises(ValueError, match="data: got no samples"):
        unlabelled("data", x[:0], "cpu")
    with pytest.raises(ValueError, match=r"data: got x of shape \(\)"):
        unlabelled("data", x[0, 0], "cpu")


@pytest.mark.parametrize("shape", [(7,), (1, 28, 28), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
def test_overlap_is_found_whatever_the_sizes_of_the_sets(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x = (100 * torch.rand(300, *shape, generator=generator)).to(dtype)
    if shape == ():
        x = torch.arange(300).to(torch.int64)
    y = torch.arange(300) % 2
    parts = {"forget": (x[:1], y[:1]), "adjacent": (x[1:60], y[1:60]), "remote": (x[60:], y[60:])}
    Data.of(**parts, device="cpu", seed=0)
    parts["remote"] = (x[59:], y[59:])
    with pytest.raises(ValueError, match="remote: 1 of its samples are also in adjacent"):
        Data.of(**parts, device="cpu", seed=0)
    parts["remote"] = (torch.cat([x[60:], x[:1]]), torch.cat([y[60:], y[:1]]))
    with pytest.raises(ValueError, match="remote: 1 of its samples are also in forget"):
        Data.of(**parts, device="cpu", seed=0)
    parts["remote"] = (parts["remote"][0], torch.cat([y[60:], 1 - y[:1]]))  # the same sample with another label is another
    Data.of(**parts, device="cpu", seed=0)


def test_streams_are_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            yield torch.zeros(6), 0

    with pytest.raises(ValueError, match="forget: got Stream; needs .x, y. tensors or a map-style Dataset with a length"):
        SampleSet("forget", Stream(), "cpu", 0)


def digest(data):
    return SampleSet("forget", data, "cpu", 0).digest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool])
def test_every_byte_of_tensors_is_in_their_digest(dtype):
    x, y = (100 * torch.rand(9000, 2, 3)).to(dtype), torch.arange(9000) % 5
    one = digest((x, y))
    assert one == digest((x.clone(), y.clone())) == digest((x.transpose(1, 2).contiguous().transpose(1, 2), y)) and len(one) == 32
    assert one == digest(TensorDataset(x, y)) == digest(Subset(Subset(TensorDataset(x, y), range(9000)), range(9000)))
    changed, relabelled, order = x.clone(), y.clone(), torch.arange(9000)
    changed.view(torch.uint8)[8999, 1, 2] ^= 1
    relabelled[4500] += 1
    order[[7, 8]] = order[[8, 7]]
    others = [(changed, y), (x, relabelled), (x[order], y[order]), (x[:-1], y[:-1]), (x.flatten(1), y), (x, y.int())]
    found = [digest(other) for other in others]
    assert one not in found and len(set(found)) == len(found)
    assert digest(Subset(TensorDataset(x, y), order.tolist())) == found[2]


class Read(Dataset):
    """Samples that differ at each read, as augmented ones do; labels that are known without."""

    def __init__(self, targets):
        self.targets = targets

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        return torch.rand(6), self.targets[i]


def test_the_digest_of_a_dataset_needs_no_sample(monkeypatch):
    monkeypatch.setattr(Read, "__getitem__", None)
    one = digest(Read([0, 1, 2]))
    assert one == digest(Read([0, 1, 2])) == digest(Read(torch.tensor([0, 1, 2])))
    others = [Read([0, 1, 3]), Read([0, 1]), Subset(Read([0, 1, 2]), [0, 2]), Subset(Read([0, 1, 2]), [2, 0]), Read(["a", "b", "c"]),
              type("Other", (Read,), {})([0, 1, 2])]  # fmt: skip
    found = [digest(other) for other in others]
    assert one not in found and len(set(found)) == len(found)


@pytest.mark.parametrize("test, message", [
    (sets()["forget"], "test: got tuple; needs a tasks.Sets, or the three as in .'forget': .x, y."),
    ({"forget": sets()["forget"]}, "test: got .'forget'. without 'adjacent', 'remote'; needs"),
    ({"train": sets(), "test": sets()}, "test: got .'train', 'test'. without 'forget', 'adjacent', 'remote'; needs"),
    ({**sets(), "remote": sets()["remote"][0]}, "test.remote: got Tensor; needs"),
    ({**sets(), "remote": tuple(t.numpy() for t in sets()["remote"])}, "test.remote: got tuple of ndarray and ndarray; needs"),
    ({**sets(), "remote": (torch.zeros(0, 6), torch.zeros(0).long())}, "test.remote: got no samples; needs at least one"),
    ({**sets(), "remote": (torch.zeros(2, 6), torch.tensor(1))}, "test.remote: got x of shape .2, 6. and y of shape ..; needs a row"),
])  # fmt: skip
def test_sets_to_measure_on(test, message):
    with pytest.raises(ValueError, match=message):
        measured_sets(test, "cpu")


def test_what_sets_to_measure_on_may_be():
    assert measured_sets(None, "cpu") is None
    given = {name: TensorDataset(*pair) for name, pair in sets().items()}
    found = measured_sets({**given, "more": None}, "cpu")
    assert list(found) == ["forget", "adjacent", "remote"]
    assert all(torch.equal(a, b) for name, pair in sets().items() for a, b in zip(next(found[name].chunks())[1:], pair))


@pytest.mark.parametrize("items", [[(1.0, 2, 3)], [{"x": 1.0, "y": 2}], [("a", 1)], [1.0]])
def test_samples_that_are_no_pairs(items):
    class Items(Dataset):
        __len__ = lambda self: len(items)  # noqa: E731
        __getitem__ = lambda self, i: items[i]  # noqa: E731

    with pytest.raises(ValueError, match="forget: its batches are a .*; needs samples that are pairs .x, y."):
        SampleSet("forget", Items(), "cpu", 0).take(torch.tensor([0]))


class Items(Dataset):
    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        if isinstance(self.items[i], Exception):
            raise self.items[i]
        return self.items[i]


def test_samples_that_go_into_no_batch():
    of_shapes = "sample 2 is .Tensor .3,., int., sample 1 .Tensor .2,., int."
    for items, why in (([(object(), 1)] * 3, ".*object"), ([(torch.zeros(k), 0) for k in (9, 2, 3)], of_shapes)):
        with pytest.raises(ValueError, match=f"forget: its samples do not go into one batch: {why}.*; needs pairs .x, y. of tensors or"):
            SampleSet("forget", Items(*items), "cpu").take(torch.tensor([1, 2]))


def test_a_sample_that_cannot_be_read_is_named():
    samples = SampleSet("forget", Subset(Items((torch.zeros(2), 0), RuntimeError("mine"), (torch.zeros(2), 0)), [0, 2, 1]), "cpu")
    assert len(samples.take(torch.tensor([0, 1]))[1]) == 2
    with pytest.raises(ValueError, match="forget: sample 2 of its Subset raised RuntimeError: mine; .* every index from 0 to 2") as raised:
        samples.take(torch.tensor([0, 2]))
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_sets_by_name_where_one_is_needed():
    with pytest.raises(ValueError, match="data: got dict; .*: give one of its entries, 'forget', 'adjacent', 'remote'"):
        SampleSet("data", sets(), "cpu")


@pytest.mark.parametrize("given, mend", [
    ([(torch.zeros(2), 0)] * 3, "got list; .* Dataset: torch.stack the x, torch.tensor..... of the y, as a pair$"), ([1, 2, 3], "Dataset$"),
    ([], "Dataset$"), ((torch.zeros(3, 2), [0, 0, 0]), "got tuple of Tensor and list; .* Dataset: torch.tensor..... of a list$"),
])  # fmt: skip
def test_lists_say_how_to_make_tensors_of_them(given, mend):
    with pytest.raises(ValueError, match=f"forget: .*{mend}"):
        SampleSet("forget", given, "cpu")
