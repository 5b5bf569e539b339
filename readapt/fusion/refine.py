"""The gradient search: a separate (alpha, beta) for each module, which would take too many trials otherwise.

The fused delta is linear in its coefficients, so they are trained like weights while everything else is frozen: a few
steps of Adam on one half of the search rows, inside the box and near their mean. They stop when the other half no
longer improves.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from readapt.fusion.coefficients import installed
from readapt.fusion.objective import FusionObjective, SearchResult, Trial, count_labels, sum_losses
from readapt.fusion.points import Point, Space, point_of
from readapt.training.data import Encoded

LEARNING_RATE = 0.05
PULL_TO_MEAN = 0.1  # nats per unit of mean squared distance
EVAL_EVERY = 5  # steps
PATIENCE = 2  # evaluations without a lower loss, then the search stops


def refine(objective: FusionObjective, found: SearchResult) -> SearchResult:
    """Continue from a search's best point for up to `refine_steps`. Return to it if the new point is not better.

    The gradient is that of what the search scores: the sum as it ships, or uncut. `objective` compares the two points
    on the rows that the gradient has not seen.
    """
    fit_rows = objective.rows[::2]
    stop_rows = objective.rows[1::2]
    if objective.config.refine_steps == 0 or not stop_rows:
        return found
    point = _descend(objective, found.point, fit_rows, stop_rows)
    before, after = objective.losses([found.point, point], stop_rows)
    [loss] = objective.losses([point])
    trials = (*found.trials, Trial(point, loss))
    return SearchResult(point, loss, trials) if after < before else replace(found, trials=trials)


def _descend(
    objective: FusionObjective, start: Point, fit_rows: Sequence[Encoded], stop_rows: Sequence[Encoded]
) -> Point:
    """Return the point with the lowest loss on `stop_rows` of the start and those evaluated on the way."""
    pairs_M2 = torch.cat([terms.pairs([start]) for terms in objective.terms.values()]).requires_grad_()
    low_2, high_2 = _box(objective, pairs_M2)
    optimizer = torch.optim.Adam([pairs_M2], lr=LEARNING_RATE)
    best_loss = float("inf")
    best_M2 = pairs_M2.detach().clone()
    num_worse = 0  # evaluations in a row without a lower loss
    for step in range(objective.config.refine_steps + 1):
        if step % EVAL_EVERY == 0 or step == objective.config.refine_steps:
            with torch.no_grad():
                stop_loss = float(_loss(objective, pairs_M2, stop_rows))
            num_worse = 0 if stop_loss < best_loss else num_worse + 1
            if stop_loss < best_loss:
                best_loss = stop_loss
                best_M2 = pairs_M2.detach().clone()
            if num_worse == PATIENCE:
                break
        optimizer.zero_grad()
        spread = (pairs_M2 - pairs_M2.mean(0)).square().mean()
        (_loss(objective, pairs_M2, fit_rows) + PULL_TO_MEAN * spread).backward()
        optimizer.step()
        with torch.no_grad():
            pairs_M2.clamp_(low_2, high_2)
    return point_of(list(objective.terms), [(alpha, beta) for alpha, beta in best_M2.tolist()])


def _loss(objective: FusionObjective, pairs_M2: Tensor, rows: Sequence[Encoded]) -> Tensor:
    pairs = dict(zip(objective.terms, pairs_M2.split(1), strict=True))
    with installed(objective.model, objective.deltas(pairs)):
        return sum_losses(objective.model, rows, 1)[0] / count_labels(rows)


def _box(objective: FusionObjective, like: Tensor) -> tuple[Tensor, Tensor]:
    bounds = Space(objective.config).bounds().values()
    low_2, high_2 = like.new_tensor(list(bounds)).T
    return low_2, high_2
