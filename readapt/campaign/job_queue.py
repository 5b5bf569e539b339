"""Between a campaign's driver, which claims jobs and writes results down, and the processes that work on them.

Made to be an async actor, but knows nothing of Ray. Workers have ranks; when one dies, another of its rank comes.

Of several jobs that a worker dies with, any may be at fault. From then on each has a worker for itself, and one that
was alone `MAX_CRASHES_PER_JOB` times with a worker that died is given up. Ray Train restarts all workers when one dies,
so that a job that was alone on another one is charged too.
"""

import asyncio
from collections import Counter, defaultdict, deque
from collections.abc import Sequence

from readapt.campaign.worker import AdapterJob, JobFailed, Report, RungReached
from readapt.fusion.search import SearchResult

MAX_CRASHES_PER_JOB = 3


class JobQueue:
    """Every method may be called at any time by any process; one that waits does so until what it wants has come."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._jobs: dict[int, AdapterJob] = {}
        self._waiting: deque[int] = deque()
        self._held: defaultdict[int, list[int]] = defaultdict(list)  # by worker
        self._lives: Counter[int] = Counter()  # of each rank: which of its workers lives now
        self._suspects: set[int] = set()  # worked on when a worker died
        self._crashes: Counter[int] = Counter()  # alone with a worker that died
        self._asked: set[int] = set()
        self._wanted: list[tuple[int, tuple[str, ...]]] = []
        self._found: dict[int, SearchResult | str] = {}
        self._reports: list[tuple[int, Report]] = []
        self._is_closed = False

    async def add(self, job: AdapterJob) -> None:
        """Queues a job."""
        async with self._changed:
            self._jobs[job.version_id] = job
            self._waiting.append(job.version_id)
            self._changed.notify_all()

    async def close(self) -> None:
        """No more jobs will come: workers go home when the queue is empty."""
        async with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    async def enter(self, worker: int) -> int:
        """A new worker of that rank begins; returns its life, which it asks for jobs with.

        What its predecessor held is queued again, and what it was waiting for ends empty-handed.
        """
        async with self._changed:
            self._lives[worker] += 1
            self._requeue(self._held.pop(worker, []))
            self._changed.notify_all()
            return self._lives[worker]

    async def take(self, worker: int, life: int) -> AdapterJob | None:
        """Waits for one more job for that worker; None when there will be none, or when it is not its rank's last life.

        A worker that asks for one job at a time leaves the others theirs.
        """
        async with self._changed:
            await self._changed.wait_for(
                lambda: life != self._lives[worker] or self._can_take(worker) or self._is_over()
            )
            if life != self._lives[worker] or not self._can_take(worker):
                return None
            version_id = self._waiting.popleft()
            self._held[worker].append(version_id)
            self._changed.notify_all()  # the next in line may suit one that this one did not
            return self._jobs[version_id]

    async def job(self, version_id: int) -> AdapterJob:
        """A job that was added, whoever works on it."""
        return self._jobs[version_id]

    async def report(self, worker: int, version_id: int, report: Report) -> None:
        """A worker's word on a job that it holds, or held before it died; anything but a rung is its last."""
        async with self._changed:
            self._reports.append((version_id, report))
            if not isinstance(report, RungReached) and version_id in self._held[worker]:
                self._held[worker].remove(version_id)
            self._changed.notify_all()

    async def reports(self, timeout_s: float) -> list[tuple[int, Report]]:
        """All reports since the last call, as soon as there is one or a search is wanted; maybe none at `timeout_s`."""
        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(lambda: self._reports or self._wanted), timeout_s)
            except TimeoutError:
                return []
            reports, self._reports = self._reports, []
            return reports

    async def set_found(self, version_id: int, found: SearchResult | str) -> None:
        """A job's search has ended, with a result or with the words for its failure."""
        async with self._changed:
            self._found[version_id] = found
            self._changed.notify_all()

    async def found(self, version_id: int, groups: tuple[str, ...]) -> SearchResult | str:
        """Asks for a job's search, over these groups of modules, and waits for its end."""
        async with self._changed:
            if version_id not in self._asked:
                self._asked.add(version_id)
                self._wanted.append((version_id, groups))
                self._changed.notify_all()
            await self._changed.wait_for(lambda: version_id in self._found)
            return self._found[version_id]

    async def wanted(self) -> list[tuple[int, tuple[str, ...]]]:
        """The searches that were asked for since the last call: whose, and over which groups of modules."""
        wanted, self._wanted = self._wanted, []
        return wanted

    def _can_take(self, worker: int) -> bool:
        """Whether the next job may join those that the worker holds: a suspect is worked on alone."""
        if not self._waiting:
            return False
        together = [*self._held[worker], self._waiting[0]]
        return len(together) == 1 or self._suspects.isdisjoint(together)

    def _is_over(self) -> bool:
        return self._is_closed and not any(self._held.values())  # while a job is held it may yet come back

    def _requeue(self, lost: Sequence[int]) -> None:
        """Puts back, in their order, what a worker died with; gives up what has been alone with too many that died."""
        self._suspects.update(lost)
        if len(lost) == 1:
            self._crashes[lost[0]] += 1
        for version_id in reversed(lost):
            if self._crashes[version_id] < MAX_CRASHES_PER_JOB:
                self._waiting.appendleft(version_id)
            else:
                error = f"{MAX_CRASHES_PER_JOB} worker processes died while they worked on it"
                self._reports.append((version_id, JobFailed(error)))
