"""Image augmentation for training batches, drawn from a generator that is given: the same draws for the same batch."""

import torch
import torch.nn.functional as F

from ..methods.training import sent


class RandomShift:
    """Move each image of a batch (n, C, H, W) by up to `pixels` in each direction, its edge repeated.

    >>> import torch, entangle_fast as ef
    >>> ef.tasks.RandomShift(2)(torch.rand(8, 3, 32, 32), torch.Generator().manual_seed(0)).shape
    torch.Size([8, 3, 32, 32])
    """

    def __init__(self, pixels=1):
        self.pixels = pixels

    def __call__(self, x, generator):
        k, (height, width) = 2 * self.pixels + 1, x.shape[2:]
        padded = F.pad(x, [self.pixels] * 4, mode="replicate")
        where = torch.randint(k * k, (len(x),), generator=generator)
        out = torch.empty_like(x)
        order = sent(where.argsort(stable=True), x.device)  # the images of each shift, on the device at once
        for shift, rows in enumerate(order.split(where.bincount(minlength=k * k).tolist())):
            top, left = divmod(shift, k)
            out[rows] = padded[rows, :, top : top + height, left : left + width]
        return out
