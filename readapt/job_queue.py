"""Between a campaign's driver, which claims jobs and writes results down, and the processes that work on them.

Made to be an async actor, but knows nothing of Ray. Workers have ranks; when one dies, another of its rank comes. A job
that was in the air `MAX_CRASHES_PER_JOB` times when its worker died is given up.
"""

import asyncio
from collections import Counter, deque

from readapt.search import SearchResult
from readapt.workbench import AdapterJob, JobFailed, Report, RungReached

MAX_CRASHES_PER_JOB = 3


class JobQueue:
    """Every method may be called at any time by any process; one that waits does so until what it wants has come."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._jobs: dict[int, AdapterJob] = {}
        self._waiting: deque[int] = deque()
        self._held: dict[int, int] = {}
        self._turns: Counter[int] = Counter()
        self._crashes: Counter[int] = Counter()
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

    async def take(self, worker: int) -> AdapterJob | None:
        """Waits for a job for the worker of that rank; None when there will be none.

        A worker that asks while it still holds a job is the successor of one that died with it. Whatever the dead one
        was still waiting for ends empty-handed, so that no job is handed to nobody.
        """
        async with self._changed:
            self._turns[worker] += 1
            turn = self._turns[worker]
            self._requeue(self._held.pop(worker, None))
            self._changed.notify_all()
            await self._changed.wait_for(lambda: self._waiting or self._is_over() or turn != self._turns[worker])
            if turn != self._turns[worker] or not self._waiting:
                return None
            self._held[worker] = self._waiting.popleft()
            return self._jobs[self._held[worker]]

    async def job(self, version_id: int) -> AdapterJob:
        """A job that was added, whoever works on it."""
        return self._jobs[version_id]

    async def report(self, worker: int, version_id: int, report: Report) -> None:
        """A worker's word on the job that it holds; anything but a rung is its last."""
        async with self._changed:
            self._reports.append((version_id, report))
            if not isinstance(report, RungReached):
                self._held.pop(worker, None)
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

    def _is_over(self) -> bool:
        return self._is_closed and not self._held  # while a job is held it may yet come back

    def _requeue(self, version_id: int | None) -> None:
        if version_id is None:
            return
        self._crashes[version_id] += 1
        if self._crashes[version_id] < MAX_CRASHES_PER_JOB:
            self._waiting.appendleft(version_id)
        else:
            error = f"{MAX_CRASHES_PER_JOB} worker processes died while they worked on it"
            self._reports.append((version_id, JobFailed(error)))
