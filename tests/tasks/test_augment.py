import torch
import torch.nn.functional as F
from pretend import DEVICE, pretended

from entangle_fast.tasks import RandomShift


def test_every_image_is_shifted_by_its_own_draw():
    x, seed = torch.rand(20, 2, 5, 7), torch.Generator().manual_seed(3)
    found = RandomShift(2)(x, seed)
    where = torch.randint(25, (20,), generator=torch.Generator().manual_seed(3))
    padded = F.pad(x, [2] * 4, mode="replicate")
    wanted = [p[:, k // 5 : k // 5 + 5, k % 5 : k % 5 + 7] for p, k in zip(padded, where.tolist())]
    assert torch.equal(found, torch.stack(wanted)) and len(where.unique()) > 8


def test_a_shift_makes_no_host_wait():
    x = torch.rand(20, 2, 5, 7)
    with pretended() as device:
        there = x.to(DEVICE)
        device.waits.clear()
        found = RandomShift(1)(there, torch.Generator().manual_seed(3))
        assert not device.waits
        assert torch.equal(found.cpu(), RandomShift(1)(x, torch.Generator().manual_seed(3)))
