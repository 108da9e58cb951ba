"""Optimiser steps over many tensors: projected momentum, projected AdamW, decay and noise, look-ahead with an exact undo.

Everything that a step decides stays on the device, the k×k solve too: a step never makes the host wait, and with up to 32
directions it can be captured into a CUDA graph; so can a look-ahead that is given a capacity.
"""

from .in_place import decay_noise_step, lookahead
from .projected_adamw import ProjectedAdamW
from .projected_momentum import ProjectedMomentum

__all__ = ["ProjectedAdamW", "ProjectedMomentum", "decay_noise_step", "lookahead"]
