"""Philox4x32-10 against the known answers published with Random123 (kat_vectors), and its stream."""

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


@pytest.mark.parametrize("counter, key, answer", KNOWN)
def test_known_answers(counter, key, answer, monkeypatch):
    block, offset, seed = counter[0] | counter[1] << 32, counter[2] | counter[3] << 32, key[0] | key[1] << 32
    signed = [v - (1 << 64) if v >= 1 << 63 else v for v in (block, offset, seed)]  # as int64 carries them
    real = torch.arange  # the last block of all: start + 1 does not fit
    monkeypatch.setattr(torch, "arange", lambda a, b, **k: torch.full((b - a,), a, **k) if a == signed[0] else real(a, b, **k))
    words = philox._blocks(signed[0], 1, signed[2], signed[1], None)
    assert tuple(w.item() for w in words) == answer


def test_any_part_of_the_stream_is_the_same():
    whole = philox.words(50, 9, 3)
    for start, count in ((0, 1), (1, 7), (3, 9), (4, 4), (17, 33)):
        assert torch.equal(philox.words(count, 9, 3, start), whole[start : start + count])
        assert torch.equal(philox.normal(count, 9, 3, start), philox.normal(50, 9, 3)[start : start + count])
        assert torch.equal(philox.sign(count, 9, 3, start), philox.sign(50, 9, 3)[start : start + count])
    assert not torch.equal(philox.words(50, 9, 4), whole) and not torch.equal(philox.words(50, 8, 3), whole)


def test_rows_that_begin_anywhere():
    starts = torch.tensor([0, 5, 2**34 + 3, 12])
    for kind, draw in (("sign", philox.sign), ("gaussian", philox.normal)):
        for width in (1, 4, 6):
            drawn = philox.rows(starts, width, 9, 3, kind)
            assert torch.equal(drawn, torch.stack([draw(width, 9, 3, int(s)) for s in starts]))
    assert philox.rows(starts, 0, 9).shape == (4, 0) and philox.rows(starts[:0], 5, 9).shape == (0, 5)


def test_moments():
    x = philox.normal(200_000, 1).double()
    for power, want in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        spread = math.sqrt(math.prod(range(1, 2 * power, 2)) / len(x))
        assert abs(x.pow(power).mean().item() - want) < 5 * spread
    assert abs(philox.sign(200_000, 1).mean().item()) < 5 / math.sqrt(200_000)
    assert x.isfinite().all()
