"""Loads adapters to the host: maps them from this machine's disk, or fetches, checks and packs them.

`LoadQueue` runs loads on its own threads, each adapter once however many requests ask for it. A store that hangs may
keep a thread, but nothing else: a load that takes too long fails for everyone who waits for it, frees its place in the
queue, and the next request starts a new one. An adapter that keeps failing is not tried again until a pause is over,
and the pause doubles with each failure. Requests that come during the pause get the last error at once.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from cluster.adapters.files import load_adapter
from cluster.errors import OverloadedError, ReloraError, StorageError
from serving.adapters.disk_tier import DiskTier
from serving.adapters.packing import PackedAdapter
from serving.engine.engine import Engine

log = logging.getLogger(__name__)

_MAX_UNWRITTEN = 4  # adapters waiting to be written to disk; beyond that an adapter is written after a later load
_FREE_FAILURES = 2  # failures in a row without a pause, since they may be chance
_FIRST_PAUSE_S = 0.5
_MAX_DOUBLINGS = 6  # of the pause, which ends at half a minute
_MAX_FAILING_KEYS = 4096


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """An adapter on the host, how long loading took, and whether its files had to be fetched."""

    packed: PackedAdapter
    load_s: float
    was_fetched: bool


class AdapterLoader:
    """Does the work of an engine's loader threads. With a `packed_dir` it keeps packed adapters on disk too."""

    def __init__(self, engine: Engine, packed_dir: Path | None):
        self._engine = engine
        self._is_on_gpu = engine.config.device != "cpu"
        self._disk: DiskTier | None = None
        self._writes = LoadQueue(1)
        if packed_dir is not None and engine.config.packed_bytes:
            self._disk = DiskTier(packed_dir, engine.packing_id(), engine.config.packed_bytes)

    def load(self, key: str, folder: Path | Callable[[], Path]) -> LoadedAdapter:
        """Load an adapter to the host. `folder` holds its files, or is a function that fetches them.

        Raises InvalidAdapterError, and whatever fetching raises.
        """
        started_at = time.perf_counter()
        mapped = self._disk.open(key) if self._disk is not None else None
        packed = mapped or self._pack(folder)
        self._engine.check_packed(packed)
        if self._is_on_gpu:
            packed = packed.pinned()
        return LoadedAdapter(packed, time.perf_counter() - started_at, mapped is None)

    def write(self, key: str, packed: PackedAdapter, when_mapped: Callable[[PackedAdapter], None]) -> None:
        """Write an adapter to disk in the background, then call `when_mapped` with the mapped copy.

        On a GPU the engine keeps its pinned copy, and `when_mapped` is not called.
        """
        if self._disk is not None and self._writes.num_under_way < _MAX_UNWRITTEN:
            self._writes.ask(key, partial(self._write, self._disk, key, packed, when_mapped))

    def is_on_disk(self, key: str) -> bool:
        """Whether an adapter is on this machine's disk."""
        return self._disk is not None and self._disk.has(key)

    def keys_on_disk(self) -> set[str]:
        """Return the keys of the adapters on this machine's disk."""
        return self._disk.keys() if self._disk is not None else set()

    def _pack(self, folder: Path | Callable[[], Path]) -> PackedAdapter:
        path = folder if isinstance(folder, Path) else folder()
        return self._engine.pack(load_adapter(path, self._engine.config.max_rank))

    def _write(
        self, disk: DiskTier, key: str, packed: PackedAdapter, when_mapped: Callable[[PackedAdapter], None]
    ) -> None:
        stored = disk.put(key, packed)
        if stored.is_mapped and not self._is_on_gpu:
            when_mapped(stored)


@dataclass(eq=False)
class _Load:
    key: str
    work: Callable[[], None]
    future: "Future[None]" = field(default_factory=Future)


class _Failures(NamedTuple):
    """The failures of one adapter in a row: their number, the last error, and when the next load may start."""

    num: int
    error: ReloraError
    retry_at: float


class LoadQueue:
    """Runs at most `num_threads` loads at a time, on daemon threads: a hanging load does not keep the process alive."""

    def __init__(self, num_threads: int, clock: Callable[[], float] = time.monotonic):
        self._num_threads = num_threads
        self._clock = clock
        self._lock = threading.Lock()
        self._loads: dict[str, _Load] = {}  # by adapter key; without those given up
        self._queued: deque[_Load] = deque()
        self._running: set[_Load] = set()
        self._failures: dict[str, _Failures] = {}  # by adapter key, oldest first

    @property
    def num_under_way(self) -> int:
        """Loads that have neither ended nor been given up."""
        return len(self._loads)

    def ask(self, key: str, work: Callable[[], None]) -> "Future[None]":
        """Return the future of the key's load under way, or start one.

        If the key failed and its pause is not over, the future already holds the last error.
        """
        with self._lock:
            load = self._loads.get(key)
            if load is None:
                load = _Load(key, work)
                failures = self._failures.get(key)
                if failures is not None and self._clock() < failures.retry_at:
                    load.future.set_exception(copy(failures.error))
                    return load.future
                self._loads[key] = load
                self._queued.append(load)
                self._start_next()
            return load.future

    def give_up(self, key: str, future: "Future[None]", waited_s: float) -> None:
        """Fail a load with a StorageError for everyone who waits for it. Does nothing if the load has ended."""
        error = StorageError(f"loading the adapter's files took more than {waited_s:g} s")
        with self._lock:
            load = self._loads.get(key)
            if load is None or load.future is not future:
                return
            del self._loads[key]
            if load in self._running:
                self._running.remove(load)
                self._record(key, error)
            else:  # it never started, which says nothing about the adapter
                self._queued.remove(load)
            self._start_next()
        _settle(load.future, error)

    def _start_next(self) -> None:
        while self._queued and len(self._running) < self._num_threads:
            load = self._queued.popleft()
            self._running.add(load)
            threading.Thread(target=self._run, args=(load,), name="adapter-loader", daemon=True).start()

    def _run(self, load: _Load) -> None:
        error: Exception | None = None
        try:
            load.work()
        except ReloraError as cause:
            error = cause
        except Exception as cause:  # our bug, but the callers that wait need the error
            log.exception("loading adapter %s failed", load.key)
            error = cause
        with self._lock:
            if load in self._running:
                self._running.remove(load)
                del self._loads[load.key]
                self._record(load.key, error)
                self._start_next()
        _settle(load.future, error)

    def _record(self, key: str, error: Exception | None) -> None:
        """Record how a load ended. A full host or a bug of ours does not count against the adapter."""
        failures = self._failures.pop(key, None)
        if not isinstance(error, ReloraError) or isinstance(error, OverloadedError):
            return
        num = 1 if failures is None else failures.num + 1
        doublings = min(num - _FREE_FAILURES - 1, _MAX_DOUBLINGS)
        pause_s = _FIRST_PAUSE_S * 2**doublings if doublings >= 0 else 0.0
        # A copy has no traceback, whose frames would keep what the load had read in memory.
        self._failures[key] = _Failures(num, copy(error), self._clock() + pause_s)
        if len(self._failures) > _MAX_FAILING_KEYS:
            del self._failures[next(iter(self._failures))]


def _settle(future: "Future[None]", error: Exception | None) -> None:
    with suppress(InvalidStateError):  # it was given up, or ended at the same moment
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
