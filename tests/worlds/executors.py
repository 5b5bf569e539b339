"""Executors without Ray for a campaign: one works on its jobs in this process, one only answers."""

from collections.abc import Callable, Hashable, Iterator

from cluster.adapters.files import load_adapter
from cluster.config.settings import Fleet
from cluster.fleet import open_blobs
from readapt.campaign.concurrent_jobs import ConcurrentJobs
from readapt.campaign.jobs import AdapterJob, AdapterResult, JobEnd, JobUpdate, JobUpdates
from readapt.campaign.worker import Worker
from readapt.fusion.objective import FusionObjective, SearchResult
from readapt.ladder.outcome import Outcome


class LocalExecutor:
    """Works on `workers.adapters_per_worker` jobs at a time; `search` is the whole search."""

    def __init__(self, fleet: Fleet, search: Callable[[FusionObjective], SearchResult]):
        self._jobs = ConcurrentJobs(Worker(fleet), lambda job, objective: search(objective))
        self._max_jobs = fleet.readapt.workers.adapters_per_worker

    def run(self, jobs: Iterator[AdapterJob]) -> JobUpdates:
        """See `Executor.run`. The rungs of a job are reported together, when it is over."""
        held: dict[Hashable, tuple[AdapterJob, list[JobUpdate]]] = {}
        while True:
            ended: dict[Hashable, JobEnd] = {}
            while self._jobs.num_jobs < self._max_jobs and (job := next(jobs, None)) is not None:
                held[job.version_id] = job, []
                ended |= self._jobs.begin(job, held[job.version_id][1].append)
                if ended:
                    break  # reported before the next one is claimed
            if not ended and not self._jobs.num_jobs:
                return
            for version_id, end in (ended or self._jobs.step()).items():
                job, reached = held.pop(version_id)
                yield from ((job, update) for update in (*reached, end))
            yield None


class Scripted:
    """Does no work: `answer` returns each job's last update."""

    def __init__(self, answer: Callable[[AdapterJob], JobUpdate]):
        self.answer = answer
        self.jobs: list[str] = []

    def run(self, jobs: Iterator[AdapterJob]) -> JobUpdates:
        for job in jobs:
            self.jobs.append(job.adapter)
            yield job, self.answer(job)


def result_for(fleet: Fleet, job: AdapterJob, accepted: bool = True) -> AdapterResult:
    """Return the result of a job whose old adapter is copied."""
    adapter = load_adapter(open_blobs(fleet).fetch_folder(job.task_key))
    outcome = Outcome("copy", adapter, 1.0, 0.0, 50.0, 50.0, 90.0, (), accepted, None)
    return AdapterResult(outcome, None, {"reference": 0.0, "climb": 0.0})
