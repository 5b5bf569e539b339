"""The engine's thread, and the bridge to it from asyncio. The engine itself knows nothing of either.

Everything that touches the engine runs on its thread, between steps, in the order in which it was posted; files are
read on loader threads, so that a cold adapter delays nobody but those who asked for it.
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
from serving.engine.request import AdapterRef, FinishReason, Request, TokenEvent, TokenStream
from serving.engine.stream import Stream
from serving.errors import BackendDiedError

log = logging.getLogger(__name__)

_MAX_REFUSALS = 4096
_HANDOVER_S = 1.0  # how long an adapter that came is kept for the request that it was loaded for

Result = TypeVar("Result")


class EngineLoop:
    """Runs an engine on a thread of its own. `start` and `stop` once each; the rest from any event loop.

    With a `packed_dir`, adapters are kept there as the engine maps them, up to `packed_bytes` of its configuration.
    """

    def __init__(self, engine: Engine, num_loaders: int = 4, packed_dir: Path | None = None):
        self._engine = engine
        self._loader = AdapterLoader(engine, packed_dir)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._fetches = LoadQueue(num_loaders)
        self._reads = LoadQueue(num_loaders)  # of this machine's disk: they do not wait for a store that is slow
        self._commands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()  # only the engine thread takes any off
        self._changed = threading.Condition()
        self._is_open = False  # whether commands are taken; guarded by _changed
        self._streams: dict[str, Stream] = {}  # by request id; the engine thread's own
        self._num_loads = self._num_fetches = 0  # loads of adapters, and those that were not on disk
        self._coming: set[str] = set()  # adapters that the engine thread has been told of
        self._refusals: dict[str, OverloadedError] = {}  # why adapters that came are not here; the engine thread's own
        # Adapters that came and that no request has named yet, and until when they are kept; the engine thread's own.
        self._handed: dict[str, tuple[PackedAdapter, float]] = {}
        self._stats = self._gauges()

    def start(self) -> None:
        """Start the thread."""
        self._is_open = True
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step under way; every open stream ends with ABORT."""
        with self._changed:
            self._is_open = False
            self._changed.notify()
        self._thread.join()

    @property
    def is_healthy(self) -> bool:
        """Whether requests are taken: started, not stopped, no step failed."""
        return self._is_open and self._thread.is_alive()

    def stats(self) -> dict[str, float]:
        """The engine's figures as of its last step, and how many adapters were loaded, and how many of them fetched."""
        return self._stats

    async def generate(self, request: Request, interval_s: float = 0.0) -> TokenStream:
        """The request's events up to the one with a finish reason; closing the iterator aborts the request.

        Events are at least `interval_s` apart, but for the first and the last, which never wait: what comes in between
        becomes one event, as do several steps' news for a slow reader. Raises what `Engine.submit` raises, and
        BackendDiedError where the engine has stopped or failed.
        """
        stream = Stream(asyncio.get_running_loop())
        not_before = 0.0
        try:
            await self._call(lambda: self._submit(request, stream))
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
        """Whether the engine has the adapter, so that requests may name it."""
        return self._engine.has_adapter(key)

    async def ensure_adapter(self, ref: AdapterRef, folder: Path | Callable[[], Path]) -> None:
        """Load an adapter for requests from now on; `folder` has its files, or is a function that fetches them.

        Runs on a loader thread, once for all who ask at the same time. Raises what went wrong (InvalidAdapterError,
        StorageError, ...), and StorageError after `adapter_load_timeout_s`; the next call tries again, but
        for an adapter that keeps failing only after a pause (see `serving.engine.adapter_loader`).
        """
        if ref.key in self._coming:
            return
        work: Callable[[], None] = partial(self._load, ref, folder)
        loads = self._reads if self._loader.is_on_disk(ref.key) else self._fetches
        if self.has_adapter(ref.key):
            mapped = self._engine.mapped_adapter(ref.key)
            if mapped is None:
                return
            work, loads = mapped.touch, self._reads  # lest the engine's thread should wait for the disk
        if not self._is_open:
            raise BackendDiedError("The engine does not run.")
        load = loads.ask(ref.key, work)
        timeout_s = self._engine.config.adapter_load_timeout_s
        coming = asyncio.wrap_future(load)
        coming.add_done_callback(_take_note)
        try:
            # Shielded: others may wait for the same load when this caller goes away.
            await asyncio.wait_for(asyncio.shield(coming), timeout_s)
        except TimeoutError:
            loads.give_up(ref.key, load, timeout_s)
            raise StorageError(f"adapter {ref.label}: its files did not come in {timeout_s:g} s") from None

    async def remove_adapter(self, key: str) -> None:
        """See `Engine.remove_adapter`."""
        await self._call(lambda: self._remove(key))

    async def residencies(self) -> list[Residency]:
        """Where each adapter is that the engine has, or its machine's disk as a file."""
        here = await self._call(self._engine.residencies)
        packed = await asyncio.to_thread(self._loader.keys_on_disk)
        return here + [Residency(key, Tier.DISK) for key in packed - {residency.key for residency in here}]

    # Any thread.

    async def _call(self, command: Callable[[], Result]) -> Result:
        return await asyncio.wrap_future(self._post(command))

    def _post(self, command: Callable[[], Result]) -> "Future[Result]":
        """Have the engine thread run a command between two steps."""
        future: Future[Result] = Future()
        with self._changed:
            if self._is_open:
                self._commands.append((command, future))
                self._changed.notify()
            else:
                future.set_exception(BackendDiedError("The engine does not run."))
        return future

    # Loader threads.

    def _load(self, ref: AdapterRef, folder: Path | Callable[[], Path]) -> None:
        loaded = self._loader.load(ref.key, folder)
        # Not waited for: the request that is posted next finds it, and has not lost the step in between. As one, lest
        # somebody should see that it is coming and post a request before it.
        with self._changed:
            self._coming.add(ref.key)
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
            self._coming.discard(ref.key)

    def _hand_over(self, key: str, packed: PackedAdapter) -> None:
        """Keep an adapter for its request: in a small host cache others may evict it before that is posted."""
        now = time.monotonic()
        self._handed = {key: handed for key, handed in self._handed.items() if handed[1] > now}
        self._handed[key] = packed, now + _HANDOVER_S

    def _take_over(self, ref: AdapterRef) -> None:
        """Put back the adapter of a request that was evicted since it came. Raises OverloadedError without room."""
        packed, until = self._handed.pop(ref.key, (None, 0.0))
        if packed is not None and time.monotonic() < until and not self.has_adapter(ref.key):
            self._engine.add_packed(ref, packed)

    def _remove(self, key: str) -> None:
        self._handed.pop(key, None)
        self._engine.remove_adapter(key)

    def _gauges(self) -> dict[str, float]:
        return {**self._engine.stats(), "adapter_loads": self._num_loads, "adapter_fetches": self._num_fetches}

    def _run(self) -> None:
        torch.set_num_threads(self._engine.config.threads)
        error: BackendDiedError | None = None
        try:
            while self._wait_for_work():
                self._run_commands()
                if self._engine.has_work:
                    self._deliver(self._engine.step())
                self._stats = self._gauges()
        except Exception as cause:  # whatever it was, nobody may be left waiting for this thread
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
            except BaseException as error:  # our bug: this caller hears of it, and the thread ends
                future.set_exception(error)
                raise

    def _submit(self, request: Request, stream: Stream) -> None:
        key = request.adapter.key if request.adapter is not None else ""
        if key in self._refusals and not self.has_adapter(key):
            raise copy(self._refusals[key])
        if request.adapter is not None:
            self._take_over(request.adapter)
        self._engine.submit(request)
        self._streams[request.id] = stream

    def _abort(self, request_id: str, stream: Stream) -> None:
        # Another request may have taken the id since.
        if self._streams.get(request_id) is stream:
            del self._streams[request_id]
            self._engine.abort(request_id)

    def _deliver(self, events: Iterable[TokenEvent]) -> None:
        """Hand a step's events to their streams, with one wake-up per event loop."""
        news: dict[asyncio.AbstractEventLoop, list[tuple[Stream, TokenEvent]]] = defaultdict(list)
        for event in events:
            stream = self._streams.get(event.request_id)
            if stream is None:
                continue  # aborted
            news[stream.loop].append((stream, event))
            if event.finish_reason is not None:
                del self._streams[event.request_id]
        for loop, items in news.items():
            try:
                loop.call_soon_threadsafe(_put_all, items)
            except RuntimeError:  # the event loop is closed: its clients are gone
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


def _take_note(load: "asyncio.Future[None]") -> None:
    """Of an error that nobody may be left to hear: asyncio would log it as one that was overlooked."""
    if not load.cancelled():
        load.exception()


def _put_all(items: list[tuple[Stream, TokenEvent]]) -> None:
    for stream, event in items:
        stream.put(event)
