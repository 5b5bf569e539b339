"""Where adapters are worked on: base models loaded once, then job after job. The same in a test and a Ray worker."""

import time
from collections.abc import Callable, Generator, Hashable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from cluster.adapter_files import Adapter, load_adapter
from cluster.blobs import BlobStore
from cluster.config import Fleet
from cluster.errors import ReloraError
from cluster.fleet import open_blobs
from readapt.fusion.objective import FusionObjective, SearchResult
from readapt.fusion.search import split_valid
from readapt.ladder.ladder import Ladder, Outcome
from readapt.ladder.relabel import PROMPTS, is_data_free, load_prompts, relabelled
from readapt.training.data import Encoder, Task, encoder_for, joined, load_rows
from readapt.training.evaluate import Gate, Metric, judge
from readapt.training.lora import load_base
from readapt.training.training_group import TrainingGroup
from readapt.training.training_run import BrokenRunError, CurvePoint, End, Failure, TrainingRun

NUM_OLD_BASES_HELD = 2  # beside the new one; adapters seldom come from more

Search = Callable[["AdapterJob", FusionObjective], SearchResult | None]  # None: not found yet, ask again


@dataclass(frozen=True)
class AdapterJob:
    """One adapter to carry over; `version_id` is its row in the registry. Small: files are named, not held.

    `data` are the folders of its rows: the first task's, and those of each stage that it has learned since.
    `evolution_key` is None where the bases differ in no linear module.
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
    """An evaluation on the way, `seconds` after the job was taken up."""

    rung: str
    point: CurvePoint
    seconds: float


@dataclass(frozen=True)
class Climbed:
    """The ladder's outcome, what the search saw on the way (None: it was not needed), and seconds by stage.

    `setback` says why it is not accepted although its gate was passed. Without the outcome's `ready`: it goes between
    processes, and one adapter is enough to carry.
    """

    outcome: Outcome
    search: SearchResult | None
    seconds: dict[str, float]
    setback: str | None = None


@dataclass(frozen=True)
class JobFailed:
    """The adapter could not be carried over; `error` is for a person to read."""

    error: str


Report = RungReached | Climbed | JobFailed
Reports = Generator[tuple[AdapterJob, Report] | None, None, None]
Ended = tuple[Hashable, Climbed | JobFailed]  # by version id


class Executor(Protocol):
    """Runs jobs somewhere. The seam between the campaign, which knows the registry, and Ray, which does not."""

    def run(self, jobs: Iterator[AdapterJob]) -> Reports:
        """Yields reports as they come; for each job some RungReached, then one Climbed or JobFailed.

        A job is drawn from `jobs` only when somebody is about to work on it, for drawing claims it in the registry.
        None, at least every other second, says that the work goes on: a caller that will not may close the generator.
        """


class Worker:
    """Holds the loaded base models: one new base, which is never exchanged for an old one. Not thread-safe."""

    def __init__(self, fleet: Fleet, device: str = "cpu"):
        self._config = fleet.readapt
        self._num_golden = fleet.rollout.golden_prompts
        self._blobs: BlobStore = open_blobs(fleet)
        self.new_base = lru_cache(maxsize=1)(lambda folder: load_base(folder, device))
        self._old_base = lru_cache(maxsize=NUM_OLD_BASES_HELD)(lambda folder: load_base(folder, device))

    def climb(
        self, job: AdapterJob, search: Search, report: Callable[[RungReached], None]
    ) -> Generator[TrainingRun | None, End | None, Climbed]:
        """Carries one adapter over; see `Ladder.climb` for what it yields and is sent.

        Raises a ReloraError where the adapter's files, its rows or its training are at fault.
        """
        started = time.perf_counter()
        found: list[SearchResult] = []

        def search_and_keep(objective: FusionObjective) -> SearchResult | None:
            result = search(job, objective)
            if result is not None:
                found.append(result)
            return result

        def report_point(rung: str, point: CurvePoint) -> None:
            report(RungReached(rung, point, time.perf_counter() - started))

        task = self._task(job)
        gate = self._gate(job, task)
        reference_s = time.perf_counter() - started
        outcome = yield from self._ladder(job, task, gate, search_and_keep, report_point).climb()
        setback = self._setback(job, outcome.adapter) if outcome.accepted and len(job.data) > 1 else None
        climb_s = time.perf_counter() - started - reference_s
        seconds = {"reference": reference_s, "climb": climb_s}
        accepted = outcome.accepted and setback is None
        return Climbed(replace(outcome, ready=None, accepted=accepted), found[-1] if found else None, seconds, setback)

    def objective(self, job: AdapterJob) -> FusionObjective:
        """The job's search objective, for a search beside the workers."""
        model, encoder = self.new_base(job.new_base), self._encoder(job.new_base)
        rows = split_valid(self._task(job).valid, self._config.search)[0]
        old, evolution = self._adapter(job.task_key), self._evolution(job)
        return FusionObjective(model, old, evolution, rows, encoder, self._config.search)

    def _task(self, job: AdapterJob) -> Task:
        """The rows of all its folders, those of folders with prompts alone as the old service answers them."""
        tasks = [
            Task(load_rows(folder / "train.jsonl"), load_rows(folder / "valid.jsonl"), test=[])
            for folder in job.data
            if not is_data_free(folder)
        ]
        prompts = [prompt for folder in job.data if is_data_free(folder) for prompt in load_prompts(folder / PROMPTS)]
        if prompts:
            old_model, encoder = self._old_base(job.old_base), self._encoder(job.old_base)
            tasks.append(relabelled(old_model, self._adapter(job.task_key), encoder, list(dict.fromkeys(prompts))))
        return joined(tasks)

    def _gate(self, job: AdapterJob, task: Task) -> Gate:
        """Asks for the old specialist's quality on the old base, on the gate's rows."""
        gate_rows = split_valid(task.valid, self._config.search)[1]
        old, encoder = self._adapter(job.task_key), self._encoder(job.old_base)
        quality = judge(self._old_base(job.old_base), old, encoder, gate_rows, job.metric).quality
        gate = Gate.beside(quality, self._config.gate)
        return gate if has_labels(job) else replace(gate, tolerance_points=self._config.gate.agreement_points)

    def _setback(self, job: AdapterJob, adapter: Adapter) -> str | None:
        """Names a stage that alone has lost more than the gate may give away; the gate, over all rows, may miss it.

        One row may be lost in any case, so that a stage of few rows is not judged by one.
        """
        old = self._adapter(job.task_key)
        for folder in (folder for folder in job.data if not is_data_free(folder)):
            rows = load_rows(folder / "valid.jsonl")
            before = judge(self._old_base(job.old_base), old, self._encoder(job.old_base), rows, job.metric).quality
            after = judge(self.new_base(job.new_base), adapter, self._encoder(job.new_base), rows, job.metric).quality
            if before - after > max(self._config.gate.max_drop_points, 100.0 / len(rows)) + 1e-6:
                return f"it passed its gate, but on the rows in {folder} fell from {before:.1f} to {after:.1f} points"
        return None

    def _ladder(
        self,
        job: AdapterJob,
        task: Task,
        gate: Gate,
        search: Callable[[FusionObjective], SearchResult | None],
        report: Callable[[str, CurvePoint], None],
    ) -> Ladder:
        return Ladder(
            self.new_base(job.new_base),
            self._old_base(job.old_base),
            self._encoder(job.new_base),
            task,
            self._adapter(job.task_key),
            self._evolution(job),
            self._config,
            gate,
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


def has_labels(job: AdapterJob) -> bool:
    """Whether all rows have true answers, or some are prompts that the old service is to answer."""
    return not any(map(is_data_free, job.data))


class Shift:
    """Owner of the jobs that are worked on at once: each climbs its own ladder, and what they train, they train as one.

    All jobs are for one new base.
    """

    def __init__(self, bench: Worker, search: Search):
        self._bench, self._search = bench, search
        self._climbs: dict[Hashable, Generator[TrainingRun | None, End | None, Climbed]] = {}
        self._searching: set[Hashable] = set()  # whose climbs wait for a search
        self._training: TrainingGroup | None = None

    @property
    def num_jobs(self) -> int:
        """How many jobs are being worked on."""
        return len(self._climbs)

    def begin(self, job: AdapterJob, report: Callable[[RungReached], None]) -> list[Ended]:
        """Takes a job up, as far as to its first training; returns it with its end if it needs none."""
        self._training = self._training or TrainingGroup(self._bench.new_base(job.new_base))
        assert self._training.model is self._bench.new_base(job.new_base), "a shift has one new base"
        self._climbs[job.version_id] = self._bench.climb(job, self._search, report)
        return self._advance(job.version_id)

    def step(self) -> list[Ended]:
        """Asks after the searches under way and trains all others one step further; returns the jobs that ended."""
        assert self._training is not None, "a shift begins with a job"
        found = [end for version_id in [*self._searching] for end in self._advance(version_id)]
        return found + self._train()

    def _train(self) -> list[Ended]:
        assert self._training is not None
        try:
            ended = self._training.step()
        except (ReloraError, RuntimeError) as error:  # of a step that all share, all share the failure
            self._training.close()
            sharing = self._climbs.keys() - self._searching
            self._climbs = {version_id: self._climbs[version_id] for version_id in self._searching}
            return [(version_id, _failure(error)) for version_id in sharing]
        return [end for version_id, result in ended for end in self._advance(version_id, result)]

    def _advance(self, version_id: Hashable, result: End | Failure | None = None) -> list[Ended]:
        """One ladder's way to its next training, search or end; its own faults end it, so that the others go on.

        RuntimeError is what torch raises for out of memory and shapes that do not fit. Anything else is a bug of ours.
        """
        assert self._training is not None
        self._searching.discard(version_id)
        try:
            wanted = _go_on(self._climbs[version_id], result)
            if wanted is None:
                self._searching.add(version_id)
            else:
                self._training.add(version_id, wanted)
            return []
        except StopIteration as stop:
            end: Climbed | JobFailed = stop.value
        except (ReloraError, RuntimeError) as error:
            end = _failure(error)
        del self._climbs[version_id]
        return [(version_id, end)]


def _go_on(
    climb: Generator[TrainingRun | None, End | None, Climbed], result: End | Failure | None
) -> TrainingRun | None:
    """Goes on with a climb: a run that broke down is an end that it reckons with, any other error is thrown into it."""
    if isinstance(result, Exception) and not isinstance(result, BrokenRunError):
        return climb.throw(result)
    return climb.send(result)


def _failure(error: Exception) -> JobFailed:
    return JobFailed(f"{type(error).__name__}: {error}")


class LocalExecutor:
    """Works in this process, on `workers.adapters_per_worker` jobs at a time; `search` is the whole search."""

    def __init__(self, fleet: Fleet, search: Callable[[FusionObjective], SearchResult]):
        self._shift = Shift(Worker(fleet), lambda job, objective: search(objective))
        self._max_jobs = fleet.readapt.workers.adapters_per_worker

    def run(self, jobs: Iterator[AdapterJob]) -> Reports:
        """See `Executor.run`; the rungs of a job are reported together, when it is over."""
        held: dict[Hashable, tuple[AdapterJob, list[Report]]] = {}
        while True:
            ended: list[Ended] = []
            while self._shift.num_jobs < self._max_jobs and (job := next(jobs, None)) is not None:
                held[job.version_id] = job, []
                ended += self._shift.begin(job, held[job.version_id][1].append)
                if ended:
                    break  # told before the next one is claimed
            if not ended and not self._shift.num_jobs:
                return
            for version_id, end in ended or self._shift.step():
                job, reached = held.pop(version_id)
                yield from ((job, report) for report in (*reached, end))
            yield None
