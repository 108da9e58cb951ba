"""The specification: every operation in plain torch, any dtype up to float64, and the backend of last resort.

Each function has the name and the arguments of its schema in ``csrc/schema.inc``.
Low-precision input (bfloat16, float16) is accumulated in float32 and the result is float32;
float32 and float64 stay what they are.
"""

from .combine import combine, combine_conv, combine_embedding
from .gram import gram, gram_conv, gram_embedding, gram_layers
from .project import project, project_conv, project_embedding, project_random, project_random_conv, project_random_embedding
from .sample_loss import (
    linear_sample_loss,
    linear_sample_loss_backward,
    sample_loss,
    sample_loss_backward,
)
from .sqnorm import sqnorm, sqnorm_conv, sqnorm_embedding
from .step import step_adamw, step_gram, step_lookahead, step_lookahead_undo, step_project, step_update
from .w2 import w2_features, w2_moments, w2_sorted

__all__ = [
    "combine", "combine_conv", "combine_embedding",
    "gram", "gram_conv", "gram_embedding", "gram_layers",
    "linear_sample_loss", "linear_sample_loss_backward",
    "project", "project_conv", "project_embedding", "project_random", "project_random_conv", "project_random_embedding",
    "sample_loss", "sample_loss_backward",
    "sqnorm", "sqnorm_conv", "sqnorm_embedding",
    "step_adamw", "step_gram", "step_lookahead", "step_lookahead_undo", "step_project", "step_update",
    "w2_features", "w2_moments", "w2_sorted",
]  # fmt: skip
