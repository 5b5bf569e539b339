"""Several jobs at a time on one worker: each has its own ladder, and they train together."""

from collections.abc import Callable, Hashable

from cluster.errors import ReloraError
from readapt.campaign.jobs import AdapterJob, AdapterResult, JobEnd, JobFailure, RungReached
from readapt.campaign.worker import JobSearch, Worker
from readapt.ladder.ladder import LadderSteps, advance
from readapt.training.training_group import TrainingGroup
from readapt.training.training_run import RunError, TrainingResult


class ConcurrentJobs:
    """Owns the jobs that one worker works on at once. All are for one new base.

    An error in one job ends that job alone. RuntimeError counts as the job's error, because torch raises it for out of
    memory and for shapes that do not fit; any other exception is a bug and is raised.
    """

    def __init__(self, worker: Worker, search: JobSearch):
        self._worker, self._search = worker, search
        self._ladders: dict[Hashable, LadderSteps[AdapterResult]] = {}  # by version id
        self._searching: set[Hashable] = set()  # jobs whose ladder waits for its search
        self._training: TrainingGroup | None = None

    @property
    def num_jobs(self) -> int:
        """How many jobs are under way."""
        return len(self._ladders)

    def begin(self, job: AdapterJob, report: Callable[[RungReached], None]) -> dict[Hashable, JobEnd]:
        """Begin a job and take it to its first training or search. Return its end if it needs neither."""
        new_base = self._worker.new_base(job.new_base)
        self._training = self._training or TrainingGroup(new_base)
        assert self._training.model is new_base, "all jobs have one new base"
        self._ladders[job.version_id] = self._worker.carry_over(job, self._search, report)
        return self._advance(job.version_id)

    def step(self) -> dict[Hashable, JobEnd]:
        """Ask for the results of running searches and train all other jobs one step. Return the jobs that ended."""
        ended: dict[Hashable, JobEnd] = {}
        for version_id in [*self._searching]:
            ended |= self._advance(version_id)
        return ended | self._train()

    def _train(self) -> dict[Hashable, JobEnd]:
        assert self._training is not None, "a job has begun"
        try:
            finished_runs = self._training.step()
        except (ReloraError, RuntimeError) as error:  # the failed pass was shared by all jobs in training
            self._training.close()
            failed = self._ladders.keys() - self._searching
            self._ladders = {version_id: self._ladders[version_id] for version_id in self._searching}
            return {version_id: _failure(error) for version_id in failed}
        ended: dict[Hashable, JobEnd] = {}
        for version_id, result in finished_runs:
            ended |= self._advance(version_id, result)
        return ended

    def _advance(self, version_id: Hashable, result: TrainingResult | RunError | None = None) -> dict[Hashable, JobEnd]:
        """Take one job to its next training, search or end."""
        assert self._training is not None, "a job has begun"
        self._searching.discard(version_id)
        try:
            run = advance(self._ladders[version_id], result)
            if run is None:
                self._searching.add(version_id)
            else:
                self._training.add(version_id, run)
            return {}
        except StopIteration as stop:
            end: JobEnd = stop.value
        except (ReloraError, RuntimeError) as error:
            end = _failure(error)
        del self._ladders[version_id]
        return {version_id: end}


def _failure(error: Exception) -> JobFailure:
    return JobFailure(f"{type(error).__name__}: {error}")
