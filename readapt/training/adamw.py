"""AdamW on the rows of a matrix, each row an adapter with a step count and a rate of its own.

torch.optim has one step count and rate a tensor, which is one optimiser and some ten kernels an adapter; on rows it is
some ten kernels in all. Shape letters: K adapters, N values of one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

BETA_FIRST, BETA_SECOND, EPSILON = 0.9, 0.999, 1e-8


def clip_(gradients_KN: Tensor, max_norm: float) -> None:
    """Shortens each row whose norm is above `max_norm`."""
    norms_K1 = torch.linalg.vector_norm(gradients_KN, dim=1, keepdim=True)
    gradients_KN.mul_((max_norm / (norms_K1 + 1e-6)).clamp(max=1.0))


def adamw_(
    values_KN: Tensor,
    gradients_KN: Tensor,
    first_KN: Tensor,
    second_KN: Tensor,
    num_steps_K: Sequence[int],
    rates_K: Sequence[float],
) -> None:
    """One step of AdamW without weight decay (arXiv 1711.05101), in place; `num_steps_K` count it already."""
    first_KN.lerp_(gradients_KN, 1 - BETA_FIRST)
    second_KN.mul_(BETA_SECOND).addcmul_(gradients_KN, gradients_KN, value=1 - BETA_SECOND)
    # rate / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps), the corrections gathered in two numbers a row
    roots = [(1 - BETA_SECOND**steps) ** 0.5 for steps in num_steps_K]
    shares = [rate * root / (1 - BETA_FIRST**n) for rate, root, n in zip(rates_K, roots, num_steps_K, strict=True)]
    roots_K1, shares_K1 = (torch.tensor(numbers, device=values_KN.device)[:, None] for numbers in (roots, shares))
    values_KN.sub_(shares_K1 * first_KN / second_KN.sqrt().add_(EPSILON * roots_K1))
