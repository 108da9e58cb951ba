"""Philox4x32-10 against the known answers published with Random123 (kat_vectors), its stream, and the directions read off its blocks."""

import math

import pytest
import torch

from entangle_fast.reference import philox

# counter words, key words, answer: lines "philox4x32 10" of Random123's kat_vectors
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


def block(c, k):
    """Salmon et al. 2011, section 4.3, on Python's integers."""
    low = 2**32 - 1
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = (q >> 32 ^ c[1] ^ k[0], q & low, p >> 32 ^ c[3] ^ k[1], p & low)
        k = (k[0] + 0x9E3779B9 & low, k[1] + 0xBB67AE85 & low)
    return c


def halves(x):
    """An int64 as two words, low first."""
    return x & 2**32 - 1, x >> 32 & 2**32 - 1


def defined(j, e, numel, seed, offset, kind):
    """The definition of a direction's entry, one at a time."""
    each = {"sign": 128, "gaussian": 4}[kind]
    words, at = block((*halves(j // each * numel + e), *halves(offset)), halves(seed)), j % each
    if kind == "sign":
        return -1.0 if words[at // 32] >> at % 32 & 1 else 1.0
    u, v = (((w >> 8) + 0.5) / 2**24 for w in words[at // 2 * 2 :][:2])
    return math.sqrt(-2 * math.log(u)) * (math.sin if at % 2 else math.cos)(2 * math.pi * v)


@pytest.mark.parametrize("counter, key, answer", KNOWN)
def test_known_answers(counter, key, answer):
    assert block(counter, key) == answer
    index, offset, seed = counter[0] | counter[1] << 32, counter[2] | counter[3] << 32, key[0] | key[1] << 32
    signed = [v - (1 << 64) if v >= 1 << 63 else v for v in (index, offset, seed)]  # as int64 carries them
    words = philox._blocks(torch.tensor(signed[0]), signed[2], signed[1])
    assert tuple(w.item() for w in words) == answer


def test_any_part_of_the_stream_is_the_same():
    whole = philox.words(50, 9, 3)
    assert whole.tolist() == [w for i in range(13) for w in block((i, 0, 3, 0), (9, 0))][:50]
    for start, count in ((0, 1), (1, 7), (3, 9), (4, 4), (17, 33)):
        assert torch.equal(philox.words(count, 9, 3, start), whole[start : start + count])
        assert torch.equal(philox.normal(count, 9, 3, start), philox.normal(50, 9, 3)[start : start + count])
    assert not torch.equal(philox.words(50, 9, 4), whole) and not torch.equal(philox.words(50, 8, 3), whole)


@pytest.mark.parametrize("kind", ["sign", "gaussian"])
@pytest.mark.parametrize("seed, offset", [(0, 0), (-5, 2**40 + 3), (2**63 - 1, -1)])
def test_directions_are_as_defined(kind, seed, offset):
    k, numel = 260, 3
    found = philox.directions(k, numel, seed, offset, kind)
    want = torch.tensor([[defined(j, e, numel, seed, offset, kind) for e in range(numel)] for j in range(k)])
    torch.testing.assert_close(found, want, rtol=0, atol=0 if kind == "sign" else 1e-5)
    for fewer in (0, 1, 31, 33, 127, 128, 129):
        assert torch.equal(philox.directions(fewer, numel, seed, offset, kind), found[:fewer])


@pytest.mark.parametrize("kind", ["sign", "gaussian"])
def test_some_elements_of_a_large_weight(kind):
    numel, elements = 2**40, torch.tensor([[0, 2**32 - 1, 2**32], [2**34 + 3, 2**40 - 1, 5]])
    drawn = list(philox.each_direction(130, elements, numel, 9, 3, kind))
    for j in (0, 3, 4, 31, 32, 127, 128, 129):
        want = torch.tensor([[defined(j, int(e), numel, 9, 3, kind) for e in row] for row in elements])
        torch.testing.assert_close(drawn[j], want, rtol=0, atol=0 if kind == "sign" else 1e-5)
    assert list(philox.each_direction(0, elements, numel, 9)) == []


def test_moments():
    for x in (philox.normal(200_000, 1).double(), philox.directions(40, 5000, 1, kind="gaussian").flatten().double()):
        for power, want in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
            spread = math.sqrt(math.prod(range(1, 2 * power, 2)) / len(x))
            assert abs(x.pow(power).mean().item() - want) < 5 * spread
        assert x.isfinite().all()


@pytest.mark.parametrize("kind", ["sign", "gaussian"])
def test_directions_are_independent(kind):
    """No mean, no correlation of directions, of neighbouring elements, or of neighbours across both, beyond 5 standard deviations."""
    k, numel = 200, 20_000
    d = philox.directions(k, numel, 7, kind=kind).double()
    assert abs(d.mean().item()) * math.sqrt(k * numel) < 5
    assert (d.mean(1).abs() * math.sqrt(numel)).max() < 5 and (d.mean(0).abs() * math.sqrt(k)).max() < 5.5
    pairs = (d @ d.T / math.sqrt(numel)).fill_diagonal_(0)
    assert pairs.abs().max() < 5.5 and 0.95 < pairs.square().sum() / (k * (k - 1)) < 1.05  # 19900 of them: 5.5 instead of 5
    for step in (1, 2, 3, 4, 32, 128):
        shifted = d[:, step:] @ d[:, :-step].T / math.sqrt(numel - step)
        assert shifted.abs().max() < 5.7  # 40000 of them


@pytest.mark.parametrize("kind", ["sign", "gaussian"])
def test_projected_inner_products_are_unbiased(kind):
    generator, k = torch.Generator().manual_seed(0), 4096
    x, y = torch.randn(2, 300, generator=generator, dtype=torch.float64)
    d = philox.directions(k, 300, 3, kind=kind).double()
    each = (d @ x) * (d @ y)
    assert abs(each.mean() - x @ y) < 5 * each.std() / math.sqrt(k)
    assert each.std() < 1.2 * math.sqrt(x.square().sum() * y.square().sum() + (x @ y) ** 2)
