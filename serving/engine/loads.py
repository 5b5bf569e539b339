"""Adapters on their way to the host: on threads of their own, each once however many ask, and none for ever.

A store that hangs may keep a thread, but neither a request, nor the adapter that it was to bring, nor a place among
those that load: a load that takes too long is given up for all who wait for it, and the next request begins it anew.
One that fails again and again is left alone for a while, ever longer: whoever asks meanwhile hears at once what it was.
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
from typing import NamedTuple

from cluster.errors import OverloadedError, ReloraError, StorageError

log = logging.getLogger(__name__)

_FREE_FAILURES = 2  # in a row, which may have been chance: the next request tries again at once
_FIRST_PAUSE_S = 0.5
_MAX_DOUBLINGS = 6  # of the pause: half a minute
_MAX_TROUBLES = 4096


@dataclass(eq=False)
class _Load:
    key: str
    work: Callable[[], None]
    future: "Future[None]" = field(default_factory=Future)


class _Trouble(NamedTuple):
    """Failures of one key in a row: how many, the last one, and until when nobody tries again."""

    num_failures: int
    error: ReloraError
    until: float


class Loads:
    """At most `num_threads` loads at a time; daemon threads, so that one that hangs does not keep the process alive."""

    def __init__(self, num_threads: int, clock: Callable[[], float] = time.monotonic):
        self._num_threads = num_threads
        self._clock = clock
        self._lock = threading.Lock()
        self._loads: dict[str, _Load] = {}  # by adapter key; those that nobody has given up
        self._queued: deque[_Load] = deque()
        self._running: set[_Load] = set()
        self._troubles: dict[str, _Trouble] = {}  # those of the longest ago first

    def ask(self, key: str, work: Callable[[], None]) -> "Future[None]":
        """The load of that key that is under way, or a new one; one that has failed where it is too soon for that."""
        with self._lock:
            load = self._loads.get(key)
            if load is None:
                load = _Load(key, work)
                trouble = self._troubles.get(key)
                if trouble is not None and self._clock() < trouble.until:
                    load.future.set_exception(copy(trouble.error))
                    return load.future
                self._loads[key] = load
                self._queued.append(load)
                self._start_next()
            return load.future

    @property
    def num_under_way(self) -> int:
        """Loads that have not ended and that nobody has given up."""
        return len(self._loads)

    def give_up(self, key: str, future: "Future[None]", waited_s: float) -> None:
        """End a load, if it has not ended, with a StorageError for everyone who waits for it."""
        error = StorageError(f"the adapter's files did not come in {waited_s:g} s")
        with self._lock:
            load = self._loads.get(key)
            if load is None or load.future is not future:
                return
            del self._loads[key]
            if load in self._running:
                self._running.remove(load)
                self._book(key, error)
            else:  # that it never had its turn says nothing about the adapter
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
        except Exception as cause:  # our bug; but whatever it was, those who wait hear of it
            log.exception("loading adapter %s failed", load.key)
            error = cause
        with self._lock:
            if load in self._running:
                self._running.remove(load)
                del self._loads[load.key]
                self._book(load.key, error)
                self._start_next()
        _settle(load.future, error)

    def _book(self, key: str, error: Exception | None) -> None:
        """Note how a load ended. That the host has no room now, or a bug of ours, says nothing about the adapter."""
        trouble = self._troubles.pop(key, None)
        if not isinstance(error, ReloraError) or isinstance(error, OverloadedError):
            return
        num_failures = 1 if trouble is None else trouble.num_failures + 1
        doublings = min(num_failures - _FREE_FAILURES - 1, _MAX_DOUBLINGS)
        pause_s = _FIRST_PAUSE_S * 2**doublings if doublings >= 0 else 0.0
        # A copy has no traceback, whose frames would keep what the load had read.
        self._troubles[key] = _Trouble(num_failures, copy(error), self._clock() + pause_s)
        if len(self._troubles) > _MAX_TROUBLES:
            del self._troubles[next(iter(self._troubles))]


def _settle(future: "Future[None]", error: Exception | None) -> None:
    with suppress(InvalidStateError):  # it was given up, or ended in the very moment
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
