"""The gradient search: an (alpha, beta) of its own for each module, which no search by trial could afford.

The fused delta is linear in its coefficients, so they are trained like weights, all else frozen: some steps of Adam on
one half of the search rows, kept inside the box and near their mean, stopped where the other half gets no better.
Shape letters: S modules; the 2 are alpha and beta.
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
PULL_TO_MEAN = 0.1  # nats for a unit of mean squared distance
EVAL_EVERY, PATIENCE = 5, 2


def refine(objective: FusionObjective, found: SearchResult) -> SearchResult:
    """Goes on from a search's best point for up to `refine_steps`; back to `found` where that is no better.

    What the gradient sees is what the search scores: the sum as it ships, or uncut. Whether the end is better
    is measured as `objective` measures, on the rows that the gradient has not seen.
    """
    fit_rows, stop_rows = objective.rows[::2], objective.rows[1::2]
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
    """The point of the lowest loss on `stop_rows` among those on the way, the start's among them."""
    stacks = objective.stacks
    pairs_S2 = torch.cat([stack.pairs([start]) for stack in stacks.values()]).requires_grad_()
    low_2, high_2 = _box(objective, pairs_S2)
    optimizer = torch.optim.Adam([pairs_S2], lr=LEARNING_RATE)
    best_loss, best_S2, num_worse = float("inf"), pairs_S2.detach().clone(), 0
    for step in range(objective.config.refine_steps + 1):
        if step % EVAL_EVERY == 0 or step == objective.config.refine_steps:
            with torch.no_grad():
                stop_loss = float(_loss(objective, pairs_S2, stop_rows))
            num_worse = 0 if stop_loss < best_loss else num_worse + 1
            if stop_loss < best_loss:
                best_loss, best_S2 = stop_loss, pairs_S2.detach().clone()
            if num_worse == PATIENCE:
                break
        optimizer.zero_grad()
        spread = (pairs_S2 - pairs_S2.mean(0)).square().mean()
        (_loss(objective, pairs_S2, fit_rows) + PULL_TO_MEAN * spread).backward()
        optimizer.step()
        with torch.no_grad():
            pairs_S2.clamp_(low_2, high_2)
    return point_of(list(stacks), [(alpha, beta) for alpha, beta in best_S2.tolist()])


def _loss(objective: FusionObjective, pairs_S2: Tensor, rows: Sequence[Encoded]) -> Tensor:
    pairs = dict(zip(objective.stacks, pairs_S2.split(1), strict=True))
    with installed(objective.model, objective.deltas(pairs)):
        return sum_losses(objective.model, rows, 1)[0] / count_labels(rows)


def _box(objective: FusionObjective, like: Tensor) -> tuple[Tensor, Tensor]:
    bounds = Space(objective.config).bounds().values()
    low_2, high_2 = like.new_tensor(list(bounds)).T
    return low_2, high_2
