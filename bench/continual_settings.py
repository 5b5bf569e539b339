"""The settings of the continual benchmark.

The learning rates and the encoder's head were compared on validation rows; steps, batch, ranks and the threshold of
distillation were chosen for their cost, and have not been tuned.
"""

from bench.continual_arms import Settings
from readapt.continual.learn import Method

RANKS = ((0, 10), (1, 6), (2, 4))
"""Rank reduction to 48 % of the method's ranks over ten stages, 60 % over four; the paper's own keeps 84 % of ten."""


def settings_for(subject: str, steps: int) -> Settings:
    """The settings for a kind of subject."""
    if subject == "encoder":
        method = Method(steps=steps, batch_rows=24, learning_rate=1e-3)
        return Settings(method, RANKS, max_residual=0.5, plain_learning_rate=1e-3)
    method = Method(steps=steps, batch_rows=24, learning_rate=3e-3, magnitude_learning_rate=1e-2)
    return Settings(method, RANKS, max_residual=0.5, plain_learning_rate=3e-3)
