"""AdamW by rows, compared with torch's, and the schedules of a run."""

import pytest
import torch

from readapt.training.optimiser import adamw_, clip_, learning_rate, pull
from tests.worlds.precision import assert_near


def test_adamw_equals_torchs_with_a_count_and_a_rate_per_row() -> None:
    generator = torch.Generator().manual_seed(0)
    values, first, second = (torch.zeros(3, 50, dtype=torch.float64) for _ in range(3))
    values.normal_(generator=generator)
    theirs = [torch.nn.Parameter(row.clone()) for row in values]
    rates = [1e-2, 3e-3, 1e-1]
    optimizers = [torch.optim.AdamW([p], lr=r, weight_decay=0.0) for p, r in zip(theirs, rates, strict=True)]
    counts = [0, 0, 0]
    for step in range(12):
        gradients = torch.randn(3, 50, dtype=torch.float64, generator=generator) * torch.tensor([[9.0], [0.1], [1.0]])
        joined = 3 if step >= 4 else 2  # the third joins later
        for parameter, gradient, optimizer in list(zip(theirs, gradients, optimizers, strict=True))[:joined]:
            parameter.grad = gradient.clone()
            torch.nn.utils.clip_grad_norm_([parameter], 1.0)
            optimizer.step()
        counts = [count + (row < joined) for row, count in enumerate(counts)]
        mine = [t[:joined] for t in (values, gradients, first, second)]
        clip_(mine[1], 1.0)
        adamw_(*mine, counts[:joined], rates[:joined])
    assert_near(values, torch.stack([p.detach() for p in theirs]), multiple=16)  # rates are float32


def test_cosine_has_no_warmup_for_warm_starts() -> None:
    assert learning_rate(0, 100, 2.0) == 2.0
    assert learning_rate(50, 100, 2.0) == pytest.approx(1.0, rel=1e-12)
    assert 0.0 < learning_rate(99, 100, 2.0) < 0.001


def test_warmup_climbs_to_the_peak() -> None:
    rates = [learning_rate(step, 100, 2.0, warmup_steps=4) for step in range(100)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0], rel=1e-12)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_pull_is_strong_first_and_weak_later() -> None:
    strengths = [pull(step, 10, 0.5, 0.1, 0.3) for step in range(10)]
    assert strengths == [0.5] * 3 + [0.1] * 7
