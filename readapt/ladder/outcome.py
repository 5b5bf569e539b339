"""What a ladder reports: one record per rung it tried, the first adapter that passed the gate, and the best one."""

from collections.abc import Callable
from dataclasses import dataclass

from cluster.adapters.files import Adapter
from readapt.training.training_run import CurvePoint, TrainingResult


@dataclass(frozen=True)
class Attempt:
    """One rung: what it cost, its best quality, and the evaluations made on it.

    `energy` is set for transplants only: the smallest share of a module's map that its rank holds, 0 to 1. If the rung
    failed, `error` says why and the quality is 0.
    """

    rung: str
    quality: float
    seconds: float
    curve: tuple[CurvePoint, ...] = ()
    energy: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Ready:
    """The first checkpoint that passed the gate, `seconds` after the climb began."""

    rung: str
    step: int
    seconds: float
    quality: float
    adapter: Adapter


@dataclass(frozen=True)
class Outcome:
    """The end of a climb. `adapter` is the one to ship if `accepted`, otherwise the best of those tried.

    `alpha` and `beta` are those of the fused start. A copy and a transplant have (1, 0), scratch has (0, 0).
    `reference` is the quality the gate compared with: the old adapter's, or that of scratch training if the gate was
    lowered to it. `copy_quality` is None if the copy was not tried.
    """

    rung: str
    adapter: Adapter
    alpha: float
    beta: float
    quality: float
    copy_quality: float | None
    reference: float
    attempts: tuple[Attempt, ...]
    accepted: bool
    ready: Ready | None


def attempts_by_rung(result: TrainingResult, rung: Callable[[int], str]) -> list[Attempt]:
    """Split a training run from a start into attempts; `rung` names the rung of a step."""
    attempts: list[Attempt] = []
    rung_started_s = 0.0
    for name in dict.fromkeys(rung(point.step) for point in result.curve if point.step > 0):
        points = tuple(point for point in result.curve if point.step > 0 and rung(point.step) == name)
        attempts.append(Attempt(name, max(p.quality for p in points), points[-1].seconds - rung_started_s, points))
        rung_started_s = points[-1].seconds
    return attempts
