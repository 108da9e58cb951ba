"""The operations: validate, then dispatch. Also reachable as ``torch.ops.entangle_fast.<name>``."""

from . import registration  # noqa: F401  fakes and derivatives, registered on import
from .combine import combine, combine_conv, combine_embedding
from .gram import gram, gram_conv, gram_embedding, gram_layers
from .project import project, project_conv, project_embedding, project_random, project_random_conv, project_random_embedding
from .sample_loss import linear_sample_loss, sample_loss
from .sqnorm import sqnorm, sqnorm_conv, sqnorm_embedding
from .step import step_adamw, step_gram, step_lookahead, step_lookahead_undo, step_project, step_update
from .w2 import w2_features, w2_moments, w2_sorted

__all__ = [
    "combine", "combine_conv", "combine_embedding",
    "gram", "gram_conv", "gram_embedding", "gram_layers",
    "linear_sample_loss", "sample_loss",
    "project", "project_conv", "project_embedding", "project_random", "project_random_conv", "project_random_embedding",
    "sqnorm", "sqnorm_conv", "sqnorm_embedding",
    "step_adamw", "step_gram", "step_lookahead", "step_lookahead_undo", "step_project", "step_update",
    "w2_features", "w2_moments", "w2_sorted",
]  # fmt: skip
