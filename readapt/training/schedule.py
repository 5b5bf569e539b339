"""Two schedules of one fine-tuning run: the cosine learning rate and the two-phase pull to the anchor.

The method of ReLoRA (arXiv 2606.02606): a strong pull first, which keeps what a good start knows while the optimiser's
moments settle, a weak one later, which lets the adapter refine. A warm start needs no warm-up: it would only spend
the steps in which most of the recovery happens.
"""

import math


def learning_rate(step: int, total: int, peak: float, warmup_steps: int = 0) -> float:
    """Rate of step `step` in [0, total): a linear climb to `peak` over `warmup_steps`, then a cosine down to zero."""
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total - warmup_steps)
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def pull(step: int, total: int, strong: float, weak: float, strong_fraction: float) -> float:
    """Share of the way back to the anchor that a step at the peak learning rate goes.

    theta <- theta - pull * (rate / peak) * (theta - anchor): decoupled from the gradient like AdamW's weight decay, so
    that Adam does not rescale it, and like it fading with the rate. A pull that did not fade would win over the last
    steps, whose gradients hardly count any more, and take back what was learned.
    """
    return strong if step < strong_fraction * total else weak
