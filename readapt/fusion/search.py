"""The search for the fused start: the (alpha, beta) of `alpha * T + beta * E` with the lowest loss on held-out rows.

The method is that of ReLoRA (arXiv 2606.02606), with hyperopt's TPE as the Bayesian optimiser. It tries the corners of
the plane first (the copy, the undone update, the bare base), then a few random points, then what its model of the
losses suggests. Candidates come in rounds, and a round is scored in few forward passes. `find` scores rounds in this
process; `on_ray` spreads them over a cluster. Both ask and tell a `BayesianSearch`. `refine` may improve its result.
"""

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from itertools import islice, zip_longest
from typing import Any

import hyperopt
import numpy as np
from hyperopt.fmin import generate_trial

from cluster.config.readapt import SearchConfig
from cluster.errors import InvalidDataError, TrainingError
from readapt.fusion.objective import FusionObjective, SearchResult, Trial, best_of
from readapt.fusion.points import CORNERS, Point, Space
from readapt.fusion.refine import refine
from readapt.training.data import Row


class BayesianSearch:
    """One adapter's search. `ask` returns rounds of candidates; `tell` takes their losses, in any order of rounds.

    Deterministic: the same losses in the same order lead to the same candidates.
    """

    def __init__(self, config: SearchConfig, space_groups: tuple[str, ...] = ()):
        self._space = Space(config, space_groups)
        self._config = config
        self._left = max(config.trials, len(CORNERS))
        self._first: list[Point] = list(CORNERS)
        self._trials: list[Trial] = []
        self._num_pending = 0
        box = self._space.bounds().items()
        self._domain = hyperopt.Domain(None, {name: hyperopt.hp.uniform(name, *bounds) for name, bounds in box})
        self._told = hyperopt.Trials()
        self._random = np.random.default_rng(config.seed)
        # hyperopt would try 20 random points before it uses its model of the losses: most of the trials.
        self._num_random = (self._left - len(CORNERS)) // 3

    @property
    def can_ask(self) -> bool:
        """Whether `ask` has candidates left."""
        return self._left > 0

    @property
    def is_over(self) -> bool:
        """Whether the losses of all candidates have been told."""
        return self._left == self._num_pending == 0

    def ask(self) -> list[Point]:
        """Return the next round: `config.batch` candidates, or fewer in the last round."""
        points = [self._next() for _ in range(min(self._config.batch, self._left))]
        self._left -= len(points)
        self._num_pending += len(points)
        return points

    def tell(self, points: Sequence[Point], losses: Sequence[float] | None) -> None:
        """Take a round's losses; None means that it could not be scored."""
        self._num_pending -= len(points)
        for point, loss in zip(points, losses or [], strict=losses is not None):
            self._trials.append(Trial(point, loss))
            self._told.insert_trial_doc(self._document(point, loss))
        self._told.refresh()

    def result(self) -> SearchResult:
        """Return the best point so far. TrainingError if no round could be scored."""
        if not self._trials:
            raise TrainingError("the search for (alpha, beta) has no result: every round of candidates failed")
        return best_of(self._trials)

    def _next(self) -> Point:
        if self._first:
            return self._first.pop(0)
        [document] = hyperopt.tpe.suggest(
            self._told.new_trial_ids(1),
            self._domain,
            self._told,
            int(self._random.integers(2**31 - 1)),
            n_startup_jobs=len(CORNERS) + self._num_random,
            verbose=False,
        )
        return self._space.point({name: float(value) for name, [value] in document["misc"]["vals"].items()})

    def _document(self, point: Point, loss: float) -> dict[str, Any]:
        """Return a candidate and its loss as hyperopt stores them."""
        [trial_id] = self._told.new_trial_ids(1)
        document: dict[str, Any] = generate_trial(trial_id, self._space.coordinates(point))
        status = hyperopt.STATUS_OK if math.isfinite(loss) else hyperopt.STATUS_FAIL
        return document | {"state": hyperopt.JOB_STATE_DONE, "result": {"loss": loss, "status": status}}


def find(objective: FusionObjective) -> SearchResult:
    """Run the whole search in this process: the Bayesian search, then the refinement if the config asks for it."""
    search = BayesianSearch(objective.config, objective.groups)
    while search.can_ask:
        points = search.ask()
        search.tell(points, objective.losses(points))
    return refine(objective, search.result())


def subset(rows: Sequence[Row], num_rows: int, seed: int) -> list[Row]:
    """Return at most `num_rows` rows, in turn from each distinct completion, so that rare labels are included."""
    shuffled = random.Random(seed).sample(list(rows), len(rows))
    by_completion: dict[str, list[Row]] = defaultdict(list)
    for row in shuffled:
        by_completion[row.completion].append(row)
    turns = zip_longest(*(group[:num_rows] for group in by_completion.values()))
    return list(islice((row for turn in turns for row in turn if row is not None), num_rows))


def split_valid(rows: Sequence[Row], config: SearchConfig) -> tuple[list[Row], list[Row]]:
    """Divide validation rows between the search and the gate, which gets at least half. They share no row.

    InvalidDataError if there are fewer than two distinct rows.
    """
    distinct = list(dict.fromkeys(rows))
    if len(distinct) < 2:
        raise InvalidDataError("search and gate need at least two different validation rows; add rows (or prompts)")
    chosen = subset(distinct, min(config.subset_rows, len(distinct) // 2), config.seed)
    seen = set(chosen)
    return chosen, [row for row in rows if row not in seen]
