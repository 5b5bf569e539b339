"""What a campaign and its executor exchange: jobs in one direction, updates on them in the other."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from readapt.fusion.objective import SearchResult
from readapt.ladder.outcome import Outcome
from readapt.training.evaluate import Metric
from readapt.training.training_run import CurvePoint


@dataclass(frozen=True)
class AdapterJob:
    """One adapter to carry over. Small, because it names files instead of holding them.

    `version_id` is the new version's row in the registry. `data` are the folders of the adapter's rows: those of its
    first task, and those of each stage it has learned since. `task_key` is the blob of the old adapter, `evolution_key`
    that of the bases' evolution, or None if no linear module differs.
    """

    version_id: int
    adapter: str
    data: tuple[Path, ...]
    metric: Metric
    task_key: str
    evolution_key: str | None
    old_base: Path
    new_base: Path


@dataclass(frozen=True)
class RungReached:
    """One evaluation on the way, `seconds` after the job began."""

    rung: str
    point: CurvePoint
    seconds: float


@dataclass(frozen=True)
class AdapterResult:
    """A finished job.

    `outcome` comes without `ready`: it travels between processes, and one adapter is enough. `search` is what the
    search found, None if the ladder did not search. `seconds` are by stage, `golden` are the new adapter's golden
    completions. `setback` says why an adapter that passed its gate is rejected after all. `left_out` counts the rows
    that could not be used, by reason.
    """

    outcome: Outcome
    search: SearchResult | None
    seconds: dict[str, float]
    golden: tuple[dict[str, Any], ...] = ()
    setback: str | None = None
    left_out: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class JobFailure:
    """A job that ended with an error. `error` is for a person to read."""

    error: str


JobEnd = AdapterResult | JobFailure
JobUpdate = RungReached | JobEnd
JobUpdates = Generator[tuple[AdapterJob, JobUpdate] | None, None, None]


class Executor(Protocol):
    """Runs jobs somewhere. A campaign knows the registry but not Ray; Ray's executor knows Ray but not the registry."""

    def run(self, jobs: Iterator[AdapterJob]) -> JobUpdates:
        """Yield updates as they come: for each job any number of RungReached, then one AdapterResult or JobFailure.

        Draws a job from `jobs` only when it can begin, because drawing claims the job in the registry. Yields None at
        least every other second, so that the caller can close the generator.
        """
        ...
