"""Models that capture has to cover, small, in float64 unless a test casts them.

ZOO: name → function that builds an oracle.Case. Batches are drawn so that sizes differ (n=4 or 3, t=5, …), the traps
where they coincide live in test_coincidences.py.
"""

import zoo_images
from zoo_parts import ZOO, Via, lively, simple, squares, tokens, weight
from zoo_tokens import POSITIONS, ViT

__all__ = ["POSITIONS", "ZOO", "Via", "ViT", "lively", "simple", "squares", "tokens", "weight", "zoo_images"]
