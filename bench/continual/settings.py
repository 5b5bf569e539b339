"""The settings of the continual benchmark.

Learning rates, the head of the encoder, the distillation settings and the draws of recall were chosen on validation
rows. Steps, batch size and ranks were chosen for their cost and are not tuned.
"""

from bench.continual.arms import Settings
from readapt.continual.learn import Method

RANKS = ((0, 10), (1, 5), (2, 4))
"""Rank reduction to 47 % of the method's ranks over ten stages and 58 % over four. The paper keeps 84 % over ten."""
MAX_RESIDUAL, REST_RANK = 0.02, 4
"""Distillation to 46 % of the method's ranks over ten stages and 55 % over four."""


def settings_for(subject: str, steps: int) -> Settings:
    """Return the settings for a kind of subject."""
    if subject == "encoder":
        method = Method(steps=steps, batch_rows=24, learning_rate=1e-3)
        return Settings(method, RANKS, max_residual=MAX_RESIDUAL, rest_rank=REST_RANK, plain_learning_rate=1e-3)
    method = Method(steps=steps, batch_rows=24, learning_rate=3e-3, magnitude_learning_rate=1e-2)
    return Settings(method, RANKS, max_residual=MAX_RESIDUAL, rest_rank=REST_RANK, plain_learning_rate=3e-3)
