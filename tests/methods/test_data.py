"""Batches whose order is a pure function of the seed."""

import pytest
import torch
from small import data, sets
from torch.utils.data import IterableDataset, TensorDataset

from entangle_fast.methods.data import Data, SampleSet


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
