"""The search objective over the fused start: loss of (alpha, beta) on a fixed subset of held-out rows.

The search itself (Ray Tune with HyperOpt) is in `on_ray`; here is all that it needs to know about the problem.
Three corners of the plane are known candidates and always among the trials.
"""

import math
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.adapter_files import Adapter
from cluster.config import SearchConfig
from cluster.errors import InvalidDataError
from readapt.data import Encoder, Row
from readapt.evaluate import Evaluator
from readapt.fuse import Fusion
from readapt.lora import LoraWeights

COPY, UNDO, BARE = (1.0, 0.0), (1.0, -1.0), (0.0, 0.0)
CORNERS = (COPY, UNDO, BARE)


@dataclass(frozen=True)
class Trial:
    """One candidate and its loss on the search rows; inf where the loss was not a number."""

    alpha: float
    beta: float
    loss: float


@dataclass(frozen=True)
class SearchResult:
    """The best candidate and all that were tried, in order."""

    alpha: float
    beta: float
    loss: float
    trials: tuple[Trial, ...]


class FusionObjective:
    """Loss on fixed rows of `alpha * task + beta * evolution` at the task's own ranks: the adapter that would ship.

    The same rows in the same order for every candidate, so that candidates differ by their merit alone. Uses `lora`
    on `model` and leaves the last candidate there.
    """

    def __init__(
        self, model: Any, lora: LoraWeights, task: Adapter, evolution: Adapter, rows: Sequence[Row], encoder: Encoder
    ):
        self._lora = lora
        self._fusion = Fusion(task, evolution)
        self._evaluator = Evaluator(model, encoder, rows, "exact_match")

    def adapter(self, alpha: float, beta: float) -> Adapter:
        """The candidate itself."""
        return self._fusion.at(alpha, beta)

    def loss(self, alpha: float, beta: float) -> float:
        """Mean loss in nats per completion token; inf where it is not a number."""
        self._lora.load(self.adapter(alpha, beta))
        loss = self._evaluator.loss()
        return loss if math.isfinite(loss) else math.inf


def space(config: SearchConfig) -> dict[str, tuple[float, float]]:
    """(low, high) of each coefficient, by name."""
    return {"alpha": (0.0, config.alpha_max), "beta": (config.beta_min, config.beta_max)}


def try_points(objective: FusionObjective, points: Iterable[tuple[float, float]]) -> SearchResult:
    """Scores the given points one after the other."""
    return best_of([Trial(alpha, beta, objective.loss(alpha, beta)) for alpha, beta in points])


def best_of(trials: Sequence[Trial]) -> SearchResult:
    """The trial of the lowest loss; among equals the earliest."""
    best = min(trials, key=lambda trial: trial.loss)
    return SearchResult(best.alpha, best.beta, best.loss, tuple(trials))


def subset(rows: Sequence[Row], num_rows: int, seed: int) -> list[Row]:
    """At most `num_rows` rows, in turn from each distinct completion, so that rare labels are there too."""
    shuffled = random.Random(seed).sample(list(rows), len(rows))
    by_completion: dict[str, list[Row]] = defaultdict(list)
    for row in shuffled:
        by_completion[row.completion].append(row)
    turns = [(turn, row) for group in by_completion.values() for turn, row in enumerate(group)]
    return [row for _, row in sorted(turns, key=lambda pair: pair[0])][:num_rows]


def split_valid(rows: Sequence[Row], config: SearchConfig) -> tuple[list[Row], list[Row]]:
    """Validation rows for the search and, disjoint from them, for the gate, which gets at least half.

    InvalidDataError where fewer than two distinct rows leave nothing for one of them.
    """
    distinct = list(dict.fromkeys(rows))
    if len(distinct) < 2:
        raise InvalidDataError("search and gate need at least two different validation rows")
    chosen = subset(distinct, min(config.subset_rows, len(distinct) // 2), config.seed)
    seen = set(chosen)
    return chosen, [row for row in rows if row not in seen]
