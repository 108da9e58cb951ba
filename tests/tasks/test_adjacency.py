import pytest
import torch
from pretend import DEVICE, pretended
from torch import nn
from torch.utils.data import Subset, TensorDataset

import entangle_fast as ef
from entangle_fast.tasks import adjacency, agreement, by_knn, by_label, embed, split_by_knn


def brute_force(f, r, k):
    """Scores by the definition: distances in a loop, ties by index."""
    scores = [0] * len(r)
    for a in f.tolist():
        distances = [sum((p - q) ** 2 for p, q in zip(a, b)) for b in r.tolist()]
        for j in sorted(range(len(r)), key=lambda j: (distances[j], j))[:k]:
            scores[j] += 1
    return scores


@pytest.mark.parametrize("block", [1, 40, 1 << 22])
@pytest.mark.parametrize("f, r, k", [(7, 30, 5), (1, 1, 1), (12, 9, 9), (3, 50, 1)])
def test_scores_are_those_of_the_definition(monkeypatch, block, f, r, k):
    monkeypatch.setattr(adjacency, "_BLOCK", block)
    generator = torch.Generator().manual_seed(f * r)
    # whole numbers: many exact ties
    a, b = (torch.randint(-3, 4, (n, 2), generator=generator).float() for n in (f, r))
    found = by_knn(a, b, k, top=0.2)
    assert found.scores.tolist() == brute_force(a, b, k)
    assert found.scores.sum() == f * k
    best = sorted((j for j in range(r) if found.scores[j] > 0), key=lambda j: (-found.scores[j], j))
    assert found.indices.tolist() == best[:-(-r // 5)]


def test_far_from_the_origin_loses_no_digits():
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(5, 3, generator=generator).double(), torch.randn(40, 3, generator=generator).double()
    assert torch.equal(by_knn(a, b, 3).scores, by_knn(a + 1e6, b + 1e6, 3).scores)


def test_a_sample_in_no_list_is_never_adjacent():
    found = by_knn(torch.zeros(3, 1), torch.arange(10.0)[:, None], k=2, top=1.0)
    assert found.indices.tolist() == [0, 1]


@pytest.mark.parametrize("fields, message", [
    ({"embed_forget": torch.zeros(0, 2)}, "embed_forget: got shape"),
    ({"embed_retain": torch.zeros(4, 3)}, "embed_retain: got 3 features, embed_forget has 2"),
    ({"embed_retain": torch.full((4, 2), torch.nan)}, "embed_retain: got non-finite"),
    ({"k": 5}, "k: got 5, needs 1 to 4"),
    ({"k": 0}, "k: got 0"),
    ({"top": 0.0}, "top: got 0.0"),
    ({"top": 1.5}, "top: got 1.5"),
])
def test_by_knn_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        by_knn(**{"embed_forget": torch.zeros(3, 2), "embed_retain": torch.zeros(4, 2), "k": 2, **fields})


def test_by_label():
    mask = by_label(torch.tensor([0, 1, 2, 3, 1]), (0, 3), torch.tensor([0, 0, 1, 1]))
    assert mask.tolist() == [False, True, True, False, True]


def test_agreement():
    adjacent = torch.tensor([True, True, True, False, False, False, False, False])
    assert agreement(torch.tensor([0, 5]), adjacent) == (0.5, 1 / 3, 3 / 8)
    with pytest.raises(ValueError, match="0 indices"):
        agreement(torch.tensor([], dtype=torch.int64), adjacent)


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3), nn.BatchNorm1d(3))
    net.train()
    net[4].eval()
    return net


def hooks(net):
    return sum(len(m._forward_pre_hooks) for m in net.modules())


def test_embed_takes_the_last_linear_layers_input_and_leaves_the_model_as_found(model):
    x = torch.randn(7, 4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    features = embed(model, x, batch_size=3)
    torch.testing.assert_close(features, torch.relu(model[0](x)).detach())
    assert not features.requires_grad
    torch.testing.assert_close(embed(model, x, layer="4"), model[3](torch.relu(model[0](x))).detach())
    assert [m.training for m in model.modules()] == modes and hooks(model) == 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_embed_cleans_up_after_an_error(model):
    modes = [m.training for m in model.modules()]
    with pytest.raises(RuntimeError):
        embed(model, torch.randn(7, 5))
    assert [m.training for m in model.modules()] == modes and hooks(model) == 0


def test_embed_takes_what_goes_into_a_layer_that_writes_to_it():
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)), torch.randn(6, 4)
    torch.testing.assert_close(embed(net, x, layer="1"), net[0](x).detach(), rtol=0, atol=0)


def test_embed_takes_an_input_given_by_name():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(input=2 * x)

    x = torch.randn(6, 4)
    assert torch.equal(embed(Net(), x), 2 * x)


def test_embed_refuses(model):
    with pytest.raises(ValueError, match="layer: got 'nope'"):
        embed(model, torch.randn(2, 4), layer="nope")
    with pytest.raises(ValueError, match="has no nn.Linear"):
        embed(nn.ReLU(), torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"shape \(2, 5, 4\).*after pooling"):
        embed(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 5, 4))
    with pytest.raises(ValueError, match="data: got no samples"):
        embed(model, torch.randn(0, 4))

    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(4, 4)

        def forward(self, x):
            return x

    with pytest.raises(ValueError, match="does not call 'spare'"):
        embed(Unused(), torch.randn(2, 4))


def test_lists_are_no_longer_than_what_is_looked_for():
    generator = torch.Generator().manual_seed(2)
    for r, k in ((1, 1), (7, 1), (15, 2), (199, 20), (400, 20)):
        a, b = (torch.randn(n, 3, generator=generator) for n in (6, r))
        assert torch.equal(by_knn(a, b).scores, by_knn(a, b, k).scores)
    b = torch.arange(30.0)[:, None]
    assert by_knn(torch.full((1, 1), 25.2), b).indices.tolist() == [24, 25, 26]  # with lists of 20 the first of them would be chosen


def sets(n=64):
    generator = torch.Generator().manual_seed(4)
    return [(torch.randn(m, 4, generator=generator), torch.randint(3, (m,), generator=generator)) for m in (20, n)]


@pytest.mark.parametrize("options", [{}, {"k": 3, "top": 0.3}, {"layer": "0", "batch_size": 7}])
def test_split_by_knn_is_what_by_knn_finds(model, options):
    forget, (x, y) = sets()
    layer = options.get("layer")
    found = by_knn(embed(model, forget[0], layer), embed(model, x, layer), options.get("k"), options.get("top", 0.10))
    rows = found.indices.sort().values
    others = torch.tensor([i for i in range(64) if i not in rows.tolist()])
    split = split_by_knn(model, forget, (x, y), **options)
    assert split._fields == ("forget", "adjacent", "remote") and split.forget is forget
    for part, chosen in ((split.adjacent, rows), (split.remote, others)):
        assert torch.equal(part[0], x[chosen]) and torch.equal(part[1], y[chosen])
    read = split_by_knn(model, TensorDataset(*forget), TensorDataset(x, y), **options)
    assert isinstance(read.adjacent, Subset) and isinstance(read.forget, TensorDataset)
    assert (read.adjacent.indices, read.remote.indices) == (rows.tolist(), others.tolist())


@pytest.mark.parametrize("form", [lambda *pair: pair, TensorDataset])
def test_split_by_knn_is_what_unlearn_takes(model, form):
    split = split_by_knn(model, *(form(*pair) for pair in sets(12)))  # fewer than 20
    result = ef.unlearn(model, **split._asdict(), method=ef.FineTune(epochs=1), progress=False)
    assert set(result.after) == {"forget", "adjacent", "remote", "per_class"}


def test_split_by_knn_refuses(model):
    forget, retain = sets()
    for r in (1, 2):
        with pytest.raises(ValueError, match=f"top: got 1.0, which makes all {r} retain samples adjacent; needs some left for remote"):
            split_by_knn(model, forget, tuple(t[:r] for t in retain), top=1.0)
    with pytest.raises(ValueError, match="k: got 65, needs 1 to 64"):
        split_by_knn(model, forget, retain, k=65)
    with pytest.raises(ValueError, match="retain: got no samples"):
        split_by_knn(model, forget, tuple(t[:0] for t in retain))
    with pytest.raises(ValueError, match="forget: got list; needs"):
        split_by_knn(model, [1, 2, 3], retain)


@pytest.mark.parametrize("labels, table", [(DEVICE, DEVICE), (DEVICE, "cpu"), ("cpu", DEVICE)])
def test_labels_and_their_hierarchy_may_be_on_any_device(labels, table):
    fine, superclass_of = torch.tensor([0, 1, 2, 1]), torch.tensor([0, 0, 1])
    with pretended():
        near = by_label(fine.to(labels), [0], superclass_of.to(table))
        assert near.device == torch.device(labels) and near.tolist() == [False, True, False, True]
