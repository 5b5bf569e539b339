"""Runs an engine on its own thread and lets asyncio code use it. The engine knows neither threads nor asyncio.

Whatever touches the engine is posted to its thread and runs there between two steps, in the order of posting. Adapter
files are read on loader threads, so a slow load delays only the requests that need that adapter.
"""

import asyncio
import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from cluster.errors import OverloadedError, ReloraError, StorageError
from serving.adapters.packing import PackedAdapter
from serving.adapters.residency import Residency, Tier
from serving.engine.adapter_loader import AdapterLoader, LoadedAdapter, LoadQueue
from serving.engine.engine import Engine
from serving.engine.matcher import Matcher
from serving.engine.request import AdapterRef, FinishReason, Request, TokenEvent, TokenStream
from serving.engine.stream import Stream, put_all
from serving.errors import BackendDiedError

log = logging.getLogger(__name__)

_MAX_REFUSALS = 4096
_HANDOVER_S = 1.0  # how long a loaded adapter is kept for the request that caused the load

Result = TypeVar("Result")


class EngineLoop:
    """Runs an engine on its own thread.

    Call `start` and `stop` once each. The other methods may be called from any event loop. With a `packed_dir`, packed
    adapters are also kept there, up to `packed_bytes` of the engine's configuration.
    """

    def __init__(self, engine: Engine, num_loaders: int = 4, packed_dir: Path | None = None):
        self._engine = engine
        self._loader = AdapterLoader(engine, packed_dir)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._fetches = LoadQueue(num_loaders)
        self._reads = LoadQueue(num_loaders)  # loads from this machine's disk: they never wait for a slow store
        self._commands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()  # removed by the engine thread only
        self._changed = threading.Condition()
        self._is_open = False  # whether commands are accepted; guarded by _changed
        self._announced: set[str] = set()  # keys of loaded adapters whose `_add` is posted and has not run
        self._stats: dict[str, float] = {}
        # Only the engine thread uses what follows.
        self._streams: dict[str, Stream] = {}  # by request id
        self._num_loads = 0
        self._num_fetches = 0  # loads that did not find the adapter on this machine's disk
        self._refusals: dict[str, OverloadedError] = {}  # by adapter key: why the host had no room for it
        self._handed: dict[str, tuple[PackedAdapter, float]] = {}  # adapters kept for their request, and until when
        self._update_stats()

    def start(self) -> None:
        """Start the thread."""
        self._is_open = True
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the current step. Every open stream ends with ABORT."""
        with self._changed:
            self._is_open = False
            self._changed.notify()
        self._thread.join()

    @property
    def is_healthy(self) -> bool:
        """Whether the loop accepts requests: it was started, not stopped, and no step has failed."""
        return self._is_open and self._thread.is_alive()

    def stats(self) -> dict[str, float]:
        """Return the engine's gauges after its last step, and the number of adapter loads and fetches."""
        return self._stats

    async def generate(self, request: Request, interval_s: float = 0.0) -> TokenStream:
        """Yield the request's events up to the one with a finish reason. Closing the stream aborts the request.

        Events are at least `interval_s` apart, except that the first and the last never wait. All tokens that arrive
        before the next event is read or due become one event. Raises what `Engine.submit` raises, and BackendDiedError
        if the engine has stopped or failed.
        """
        stream = Stream(asyncio.get_running_loop())
        not_before = 0.0
        compiling = self._engine.start_matcher(request)
        matcher = None
        if compiling is not None:
            matcher = await asyncio.wrap_future(compiling)
        try:
            await self._call(lambda: self._submit(request, stream, matcher))
            while True:
                event = await stream.get(not_before)
                yield event
                if event.finish_reason is not None:
                    return
                not_before = stream.loop.time() + interval_s
        finally:
            if not stream.has_ended:
                self._post(lambda: self._abort(request.id, stream))

    def has_adapter(self, key: str) -> bool:
        """Whether the engine has the adapter. Only then may requests name it."""
        return self._engine.has_adapter(key)

    async def ensure_adapter(self, ref: AdapterRef, folder: Path | Callable[[], Path]) -> None:
        """Load an adapter, so that requests may name it. `folder` holds its files or is a function that fetches them.

        The load runs on a loader thread, once for all callers that wait at the same time. Raises its error
        (InvalidAdapterError, StorageError, ...), or StorageError after `adapter_load_timeout_s`. The next call tries
        again; if an adapter keeps failing, only after a pause (see `serving.engine.adapter_loader`).
        """
        needed = self._needed_load(ref, folder)
        if needed is None:
            return
        if not self._is_open:
            raise BackendDiedError("The engine is not running.")
        await self._wait_for(*needed, ref.key, ref.label)

    async def ensure_dialect(self, ref: AdapterRef, fetch: Callable[[], Path]) -> None:
        """Load the text files beside an adapter, if they are not loaded. `fetch` returns their folder.

        Errors and the timeout are those of `ensure_adapter`.
        """
        if not self._engine.dialects.has(ref.dialect):
            load = partial(self._engine.dialects.load, ref.dialect, fetch)
            await self._wait_for(self._fetches, load, f"dialect {ref.dialect}", ref.label)

    async def _wait_for(self, queue: LoadQueue, work: Callable[[], None], key: str, label: str) -> None:
        """Wait for a load, which all callers share."""
        load = queue.ask(key, work)
        waiting = asyncio.wrap_future(load)
        waiting.add_done_callback(_retrieve_error)
        timeout_s = self._engine.config.adapter_load_timeout_s
        try:
            # Shielded: a caller that is cancelled must not cancel the load for the others.
            await asyncio.wait_for(asyncio.shield(waiting), timeout_s)
        except TimeoutError:
            queue.give_up(key, load, timeout_s)
            raise StorageError(f"adapter {label}: loading its files took more than {timeout_s:g} s") from None

    async def remove_adapter(self, key: str) -> None:
        """See `Engine.remove_adapter`."""
        await self._call(lambda: self._remove(key))

    async def residencies(self) -> list[Residency]:
        """Return where the engine's adapters are, and which others are on this machine's disk."""
        here = await self._call(self._engine.residencies)
        on_disk = await asyncio.to_thread(self._loader.keys_on_disk)
        return here + [Residency(key, Tier.DISK) for key in on_disk - {residency.key for residency in here}]

    # Any thread.

    def _needed_load(
        self, ref: AdapterRef, folder: Path | Callable[[], Path]
    ) -> tuple[LoadQueue, Callable[[], None]] | None:
        """Return the load that must end before requests name the adapter, and its queue. None if there is none."""
        if ref.key in self._announced:
            return None
        if self.has_adapter(ref.key):
            mapped = self._engine.mapped_adapter(ref.key)
            # A mapped file is read on a loader thread, so that the engine's thread does not wait for the disk.
            return None if mapped is None else (self._reads, mapped.touch)
        queue = self._reads if self._loader.is_on_disk(ref.key) else self._fetches
        return queue, partial(self._load, ref, folder)

    async def _call(self, command: Callable[[], Result]) -> Result:
        return await asyncio.wrap_future(self._post(command))

    def _post(self, command: Callable[[], Result]) -> "Future[Result]":
        """Have the engine's thread run a command between two steps."""
        future: Future[Result] = Future()
        with self._changed:
            if self._is_open:
                self._commands.append((command, future))
                self._changed.notify()
            else:
                future.set_exception(BackendDiedError("The engine is not running."))
        return future

    # Loader threads.

    def _load(self, ref: AdapterRef, folder: Path | Callable[[], Path]) -> None:
        loaded = self._loader.load(ref.key, folder)
        # The load ends without waiting for `_add`: a request posted from now on runs after it. The lock keeps the two
        # lines together, so that no request is posted between the announcement and `_add`.
        with self._changed:
            self._announced.add(ref.key)
            self._post(lambda: self._add(ref, loaded))
        if loaded.was_fetched:
            self._loader.write(ref.key, loaded.packed, partial(self._replace, ref.key))

    def _replace(self, key: str, packed: PackedAdapter) -> None:
        self._post(lambda: self._engine.replace_packed(key, packed))

    # The engine thread.

    def _add(self, ref: AdapterRef, loaded: LoadedAdapter) -> None:
        self._num_loads += 1
        self._num_fetches += loaded.was_fetched
        self._refusals.pop(ref.key, None)
        try:
            self._engine.add_packed(ref, loaded.packed, loaded.load_s)
            self._hand_over(ref.key, loaded.packed)
        except OverloadedError as error:
            if len(self._refusals) == _MAX_REFUSALS:
                self._refusals.clear()
            self._refusals[ref.key] = error
        finally:
            self._announced.discard(ref.key)

    def _hand_over(self, key: str, packed: PackedAdapter) -> None:
        """Keep an adapter for its request: a small host cache may evict it before the request is posted."""
        now = time.monotonic()
        self._handed = {key: handed for key, handed in self._handed.items() if handed[1] > now}
        self._handed[key] = packed, now + _HANDOVER_S

    def _take_over(self, ref: AdapterRef) -> None:
        """Put a request's adapter back if it was evicted after its load. Raises OverloadedError if there is no room."""
        packed, until = self._handed.pop(ref.key, (None, 0.0))
        if packed is not None and time.monotonic() < until and not self.has_adapter(ref.key):
            self._engine.add_packed(ref, packed)

    def _remove(self, key: str) -> None:
        self._handed.pop(key, None)
        self._engine.remove_adapter(key)

    def _update_stats(self) -> None:
        loads = {"adapter_loads": self._num_loads, "adapter_fetches": self._num_fetches}
        self._stats = {**self._engine.stats(), **loads}

    def _run(self) -> None:
        torch.set_num_threads(self._engine.config.threads)
        error: BackendDiedError | None = None
        try:
            while self._wait_for_work():
                self._run_commands()
                if self._engine.has_work:
                    self._deliver(self._engine.step())
                self._update_stats()
        except Exception as cause:  # whatever failed, no caller may keep waiting for this thread
            log.exception("the engine failed")
            error = BackendDiedError(f"The engine failed: {type(cause).__name__}: {cause}")
        finally:
            self._close(error)

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._commands or self._engine.has_work or not self._is_open)
            return self._is_open

    def _run_commands(self) -> None:
        while self._commands:
            command, future = self._commands.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(command())
            except ReloraError as error:
                future.set_exception(error)
            except BaseException as error:  # our bug: the caller gets it, and the thread ends
                future.set_exception(error)
                raise

    def _submit(self, request: Request, stream: Stream, matcher: Matcher | None) -> None:
        key = request.adapter.key if request.adapter is not None else ""
        if key in self._refusals and not self.has_adapter(key):
            raise copy(self._refusals[key])
        if request.adapter is not None:
            self._take_over(request.adapter)
        self._engine.submit(request, matcher)
        self._streams[request.id] = stream

    def _abort(self, request_id: str, stream: Stream) -> None:
        if self._streams.get(request_id) is stream:  # otherwise another request uses the id by now
            del self._streams[request_id]
            self._engine.abort(request_id)

    def _deliver(self, events: Iterable[TokenEvent]) -> None:
        """Put a step's events into their streams, with one wake-up per event loop."""
        news: dict[asyncio.AbstractEventLoop, list[tuple[Stream, TokenEvent]]] = defaultdict(list)
        for event in events:
            stream = self._streams.get(event.request_id)
            if stream is None:
                continue  # the request was aborted
            news[stream.loop].append((stream, event))
            if event.finish_reason is not None:
                del self._streams[event.request_id]
        for loop, items in news.items():
            try:
                loop.call_soon_threadsafe(put_all, items)
            except RuntimeError:  # the event loop is closed, so its clients are gone
                for stream, event in items:
                    self._abort(event.request_id, stream)

    def _close(self, error: BackendDiedError | None) -> None:
        with self._changed:
            self._is_open = False
            commands, self._commands = self._commands, deque()
        for _, future in commands:
            if future.set_running_or_notify_cancel():
                future.set_exception(error or BackendDiedError("The engine has stopped."))
        ends = [TokenEvent(id, finish_reason=FinishReason.ABORT, error=error) for id in self._streams]
        self._deliver(ends)


def _retrieve_error(load: "asyncio.Future[None]") -> None:
    """Mark a load's error as seen. If every caller was cancelled, asyncio would log it as never retrieved."""
    if not load.cancelled():
        load.exception()
