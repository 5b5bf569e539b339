"""The optimiser of a training run: AdamW, the learning rate and the pull to an anchor.

torch.optim keeps one step count and one rate per tensor: each adapter would need its own optimiser, some ten kernels a
step. Here each adapter is a row of a matrix, with its own step count and rate, and all of them share those kernels.

The schedules are those of ReLoRA (arXiv 2606.02606). A strong pull comes first. It keeps what a good start knows while
the optimiser's moments settle. A weak pull follows, which lets the adapter improve. A good start needs no warm-up: it
would waste the steps in which most of the recovery happens.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MAX_GRADIENT_NORM = 1.0
BETA_FIRST = 0.9
BETA_SECOND = 0.999
EPSILON = 1e-8


def clip_(gradients_AZ: Tensor, max_norm: float) -> None:
    """Scale each row whose norm is above `max_norm` down to it, in place."""
    norms_A1 = torch.linalg.vector_norm(gradients_AZ, dim=1, keepdim=True)
    gradients_AZ.mul_((max_norm / (norms_A1 + 1e-6)).clamp(max=1.0))


def adamw_(
    values_AZ: Tensor,
    gradients_AZ: Tensor,
    first_AZ: Tensor,
    second_AZ: Tensor,
    num_steps_A: Sequence[int],
    rates_A: Sequence[float],
) -> None:
    """Take one step of AdamW without weight decay (arXiv 1711.05101), in place.

    `first_AZ` and `second_AZ` are the moments. `num_steps_A` counts the steps of each adapter, this one included.
    """
    first_AZ.lerp_(gradients_AZ, 1 - BETA_FIRST)
    second_AZ.mul_(BETA_SECOND).addcmul_(gradients_AZ, gradients_AZ, value=1 - BETA_SECOND)
    # rate / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps), with both corrections as one number per row
    roots = [(1 - BETA_SECOND**steps) ** 0.5 for steps in num_steps_A]
    shares = [rate * root / (1 - BETA_FIRST**n) for rate, root, n in zip(rates_A, roots, num_steps_A, strict=True)]
    roots_A1 = torch.tensor(roots, device=values_AZ.device)[:, None]
    shares_A1 = torch.tensor(shares, device=values_AZ.device)[:, None]
    values_AZ.sub_(shares_A1 * first_AZ / second_AZ.sqrt().add_(EPSILON * roots_A1))


def learning_rate(step: int, total: int, peak: float, warmup_steps: int = 0) -> float:
    """Return the rate of step `step` in [0, total).

    It climbs linearly to `peak` over `warmup_steps`, then falls to zero along a cosine.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total - warmup_steps)
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def pull(step: int, total: int, strong: float, weak: float, strong_fraction: float) -> float:
    """Return the share of the way back to the anchor that a step at the peak learning rate goes.

    theta <- theta - pull * (rate / peak) * (theta - anchor). The pull is decoupled from the gradient like AdamW's
    weight decay, so Adam does not rescale it. It fades with the rate: otherwise it would outweigh the small gradients
    of the last steps and undo what was learned.
    """
    return strong if step < strong_fraction * total else weak
