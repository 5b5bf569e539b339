"""Where one adapter is worked on: base models loaded once, then job after job. The same in a test and a Ray worker."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from cluster.adapter_files import Adapter, load_adapter
from cluster.blobs import BlobStore
from cluster.config import Fleet
from cluster.errors import ReloraError
from cluster.fleet import open_blobs
from readapt.data import Encoder, encoder_for, load_rows, load_task
from readapt.evaluate import Metric, judge
from readapt.ladder import Ladder, Outcome
from readapt.lora import LoraWeights, attach, load_base
from readapt.search import FusionObjective, SearchResult, split_valid
from readapt.train import CurvePoint

NUM_BASES_HELD = 2  # the new base and the one that the adapters come from

Search = Callable[["AdapterJob", FusionObjective], SearchResult]


@dataclass(frozen=True)
class AdapterJob:
    """One adapter to carry over; `version_id` is its row in the registry. Small: files are named, not held.

    `evolution_key` is None where the bases differ in no linear module.
    """

    version_id: int
    adapter: str
    data: Path
    metric: Metric
    task_key: str
    evolution_key: str | None
    old_base: Path
    new_base: Path


@dataclass(frozen=True)
class RungReached:
    """An evaluation on the way, `seconds` after the job was taken up."""

    rung: str
    point: CurvePoint
    seconds: float


@dataclass(frozen=True)
class Climbed:
    """The ladder's outcome, what the search saw on the way (None: it was not needed), and seconds by stage."""

    outcome: Outcome
    search: SearchResult | None
    seconds: dict[str, float]


@dataclass(frozen=True)
class JobFailed:
    """The adapter could not be carried over; `error` is for a person to read."""

    error: str


Report = RungReached | Climbed | JobFailed


class Executor(Protocol):
    """Runs jobs somewhere. The seam between the campaign, which knows the registry, and Ray, which does not."""

    def run(self, jobs: Iterator[AdapterJob]) -> Iterator[tuple[AdapterJob, Report]]:
        """Yields reports as they come; for each job some RungReached, then one Climbed or JobFailed.

        A job is drawn from `jobs` only when somebody is about to work on it, for drawing claims it in the registry.
        """


class Workbench:
    """Holds the loaded base models and works on one job at a time. Not thread-safe."""

    def __init__(self, fleet: Fleet, device: str = "cpu"):
        self._config = fleet.readapt
        self._num_golden = fleet.rollout.golden_prompts
        self._blobs: BlobStore = open_blobs(fleet)
        self._searched: LoraWeights | None = None
        self._base = lru_cache(maxsize=NUM_BASES_HELD)(lambda folder: load_base(folder, device))

    def climb(self, job: AdapterJob, search: Search, report: Callable[[RungReached], None]) -> Climbed:
        """Carries one adapter over. Raises a ReloraError where its files, its rows or its training are at fault."""
        started = time.perf_counter()
        found: list[SearchResult] = []

        def search_and_keep(objective: FusionObjective) -> SearchResult:
            found.append(search(job, objective))
            return found[-1]

        def report_point(rung: str, point: CurvePoint) -> None:
            report(RungReached(rung, point, time.perf_counter() - started))

        reference = self.reference_quality(job)
        reference_s = time.perf_counter() - started
        outcome = self._ladder(job, reference, search_and_keep, report_point).climb()
        climb_s = time.perf_counter() - started - reference_s
        return Climbed(outcome, found[-1] if found else None, {"reference": reference_s, "climb": climb_s})

    def reference_quality(self, job: AdapterJob) -> float:
        """The old specialist's quality on the old base, on the gate's rows: what the new one is measured against."""
        gate_rows = split_valid(load_task(job.data).valid, self._config.search)[1]
        task = self._adapter(job.task_key)
        return judge(self._base(job.old_base), task, self._encoder(job.old_base), gate_rows, job.metric).quality

    def objective(self, job: AdapterJob) -> FusionObjective:
        """The job's search objective, for a search beside the workers: of one bench, only the latest is to be used."""
        model, task = self._base(job.new_base), self._adapter(job.task_key)
        if self._searched is not None:
            self._searched.detach()
        self._searched = attach(model, task)
        search_rows = split_valid(load_rows(job.data / "valid.jsonl"), self._config.search)[0]
        encoder = self._encoder(job.new_base)
        return FusionObjective(model, self._searched, task, self._evolution(job), search_rows, encoder)

    def _ladder(
        self,
        job: AdapterJob,
        reference: float,
        search: Callable[[FusionObjective], SearchResult],
        report: Callable[[str, CurvePoint], None],
    ) -> Ladder:
        return Ladder(
            self._base(job.new_base),
            self._encoder(job.new_base),
            load_task(job.data),
            self._adapter(job.task_key),
            self._evolution(job),
            self._config,
            reference,
            job.metric,
            search,
            report=report,
            num_golden=self._num_golden,
        )

    def _adapter(self, key: str) -> Adapter:
        return load_adapter(self._blobs.fetch_folder(key))

    def _evolution(self, job: AdapterJob) -> Adapter:
        return Adapter({}) if job.evolution_key is None else self._adapter(job.evolution_key)

    def _encoder(self, base: Path) -> Encoder:
        return encoder_for(base, self._config.train.max_tokens)


def attempt(
    bench: Workbench, job: AdapterJob, search: Search, report: Callable[[RungReached], None]
) -> Climbed | JobFailed:
    """Climbs, and turns the adapter's own faults into a report, so that the next one gets its turn.

    RuntimeError is what torch raises for out of memory and shapes that do not fit. Anything else is a bug of ours.
    """
    try:
        return bench.climb(job, search, report)
    except (ReloraError, RuntimeError) as error:
        return JobFailed(f"{type(error).__name__}: {error}")


class LocalExecutor:
    """Works on one job after the other in this process; `search` is the whole search."""

    def __init__(self, fleet: Fleet, search: Callable[[FusionObjective], SearchResult]):
        self._bench = Workbench(fleet)
        self._search = search

    def run(self, jobs: Iterator[AdapterJob]) -> Iterator[tuple[AdapterJob, Report]]:
        """See `Executor.run`; the rungs of a job are reported together, when it is over."""
        for job in jobs:
            reached: list[Any] = []
            end = attempt(self._bench, job, lambda job, objective: self._search(objective), reached.append)
            yield from ((job, report) for report in (*reached, end))
