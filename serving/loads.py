"""Adapters on their way to the host: on threads of their own, each once however many ask, and none for ever.

A store that hangs may keep a thread, but neither a request, nor the adapter that it was to bring, nor a place among
those that load: a load that takes too long is given up for all who wait for it, and the next request begins it anew.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field

from cluster.errors import ReloraError, StorageError

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Load:
    key: str
    work: Callable[[], None]
    future: "Future[None]" = field(default_factory=Future)


class Loads:
    """At most `num_threads` loads at a time; daemon threads, so that one that hangs does not keep the process alive."""

    def __init__(self, num_threads: int):
        self._num_threads = num_threads
        self._lock = threading.Lock()
        self._loads: dict[str, _Load] = {}  # by adapter key; those that nobody has given up
        self._queued: deque[_Load] = deque()
        self._running: set[_Load] = set()

    def ask(self, key: str, work: Callable[[], None]) -> "Future[None]":
        """The load of that key that is under way, or a new one."""
        with self._lock:
            load = self._loads.get(key)
            if load is None:
                load = self._loads[key] = _Load(key, work)
                self._queued.append(load)
                self._start_next()
            return load.future

    def give_up(self, key: str, future: "Future[None]", waited_s: float) -> None:
        """End a load, if it has not ended, with a StorageError for everyone who waits for it."""
        with self._lock:
            load = self._loads.get(key)
            if load is None or load.future is not future:
                return
            del self._loads[key]
            if load in self._running:
                self._running.remove(load)
            else:
                self._queued.remove(load)
            self._start_next()
        _settle(load.future, StorageError(f"the adapter's files did not come in {waited_s:g} s"))

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
                self._start_next()
        _settle(load.future, error)


def _settle(future: "Future[None]", error: Exception | None) -> None:
    with suppress(InvalidStateError):  # it was given up, or ended in the very moment
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
