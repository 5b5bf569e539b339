"""The queue between a campaign's driver, which claims jobs and records results, and the workers in other processes.

Runs as an async actor, but knows nothing of Ray. Each worker has a rank; if it dies, a new worker of its rank enters.

If a worker dies with several jobs, any of them may be the cause. From then on each of these suspects gets a worker to
itself. A job that is alone on a dying worker `MAX_CRASHES_PER_JOB` times is given up. Ray Train restarts all workers if
one dies, so a job that was alone on another worker is charged too.
"""

import asyncio
from collections import Counter, defaultdict, deque
from collections.abc import Sequence

from readapt.campaign.jobs import AdapterJob, JobFailure, JobUpdate, RungReached
from readapt.fusion.objective import SearchResult

MAX_CRASHES_PER_JOB = 3


class JobQueue:
    """Any process may call any method at any time."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._jobs: dict[int, AdapterJob] = {}
        self._waiting: deque[int] = deque()
        self._held: defaultdict[int, list[int]] = defaultdict(list)  # by worker
        self._lives: Counter[int] = Counter()  # by rank: the number of the worker that lives now
        self._suspects: set[int] = set()  # were held by a worker that died
        self._crashes: Counter[int] = Counter()  # were alone with a worker that died
        self._asked: set[int] = set()
        self._wanted: list[tuple[int, tuple[str, ...]]] = []
        self._found: dict[int, SearchResult | str] = {}
        self._updates: list[tuple[int, JobUpdate]] = []
        self._is_closed = False

    async def add(self, job: AdapterJob) -> None:
        """Queue a job."""
        async with self._changed:
            self._jobs[job.version_id] = job
            self._waiting.append(job.version_id)
            self._changed.notify_all()

    async def close(self) -> None:
        """Say that no more jobs will come. Workers end when the queue is empty."""
        async with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    async def enter(self, worker: int) -> int:
        """Begin a new worker of that rank; return the number of its life, to be passed to `take`.

        The jobs of its predecessor are queued again, and the predecessor's pending `take` returns None.
        """
        async with self._changed:
            self._lives[worker] += 1
            self._requeue(self._held.pop(worker, []))
            self._changed.notify_all()
            return self._lives[worker]

    async def take(self, worker: int, life: int) -> AdapterJob | None:
        """Wait for the worker's next job; None if there will be none, or if `life` is no longer the rank's last.

        Workers ask for one job at a time, so that they share the jobs evenly.
        """
        async with self._changed:
            await self._changed.wait_for(
                lambda: life != self._lives[worker] or self._can_take(worker) or self._is_over()
            )
            if life != self._lives[worker] or not self._can_take(worker):
                return None
            version_id = self._waiting.popleft()
            self._held[worker].append(version_id)
            self._changed.notify_all()  # another worker may be able to take the next job
            return self._jobs[version_id]

    async def job(self, version_id: int) -> AdapterJob:
        """Return a job that was added."""
        return self._jobs[version_id]

    async def update(self, worker: int, version_id: int, update: JobUpdate) -> None:
        """Record a worker's update on a job that it holds, or held before it was presumed dead."""
        async with self._changed:
            self._updates.append((version_id, update))
            if not isinstance(update, RungReached) and version_id in self._held[worker]:
                self._held[worker].remove(version_id)
            self._changed.notify_all()

    async def updates(self, timeout_s: float) -> list[tuple[int, JobUpdate]]:
        """Return all updates since the last call.

        Returns as soon as there is one or a search is wanted, and with none after `timeout_s`.
        """
        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(lambda: self._updates or self._wanted), timeout_s)
            except TimeoutError:
                return []
            updates, self._updates = self._updates, []
            return updates

    async def set_found(self, version_id: int, found: SearchResult | str) -> None:
        """Record the result of a job's search, or the words of its failure."""
        async with self._changed:
            self._found[version_id] = found
            self._changed.notify_all()

    async def found(self, version_id: int, groups: tuple[str, ...]) -> SearchResult | str:
        """Ask for a job's search, over these groups of modules, and wait for its result."""
        async with self._changed:
            if version_id not in self._asked:
                self._asked.add(version_id)
                self._wanted.append((version_id, groups))
                self._changed.notify_all()
            await self._changed.wait_for(lambda: version_id in self._found)
            return self._found[version_id]

    async def wanted(self) -> list[tuple[int, tuple[str, ...]]]:
        """Return the searches asked for since the last call: the version, and the groups of modules."""
        wanted, self._wanted = self._wanted, []
        return wanted

    def _can_take(self, worker: int) -> bool:
        """Return whether the next job may join those that the worker holds; a suspect must be alone."""
        if not self._waiting:
            return False
        together = [*self._held[worker], self._waiting[0]]
        return len(together) == 1 or self._suspects.isdisjoint(together)

    def _is_over(self) -> bool:
        return self._is_closed and not any(self._held.values())  # a held job may still come back

    def _requeue(self, lost: Sequence[int]) -> None:
        """Queue a dead worker's jobs again, first and in their order, except those with too many crashes."""
        self._suspects.update(lost)
        if len(lost) == 1:
            self._crashes[lost[0]] += 1
        for version_id in reversed(lost):
            if self._crashes[version_id] < MAX_CRASHES_PER_JOB:
                self._waiting.appendleft(version_id)
            else:
                error = f"{MAX_CRASHES_PER_JOB} worker processes died while they worked on it"
                self._updates.append((version_id, JobFailure(error)))
