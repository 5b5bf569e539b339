"""The narrow seam between the gateway and an engine, wherever that runs, and the engine in this process behind it."""

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from cluster.blobs import BlobStore
from cluster.errors import InvalidAdapterError, NotFoundError, OverloadedError, StorageError
from serving.adapters.residency import Residency
from serving.engine.loop import EngineLoop
from serving.engine.request import AdapterRef, Request, TokenEvent
from serving.errors import BackendDiedError, BackendFailedError

Item = TypeVar("Item")


class Backend(Protocol):
    """An engine of one base model, here or elsewhere."""

    def generate(self, request: Request) -> AsyncIterator[list[TokenEvent]]:
        """The request's events, several at a time when they come fast; closing the iterator aborts the request.

        Raises BackendDiedError when the engine is gone: what was yielded so far stays valid. Other errors may be raised
        or come as the `error` of the last event.
        """
        ...

    async def stats(self) -> dict[str, float]:
        """The engine's gauges, summed over its replicas; BackendDiedError if no replica is alive."""
        ...

    async def residencies(self) -> list[Residency]:
        """Where adapters are, from each of its replicas; BackendDiedError if no replica is alive."""
        ...

    async def release(self, adapter_key: str) -> None:
        """Let every replica's memory of an adapter go, once the requests under way with it have ended.

        Whoever asks for the adapter later makes the engine fetch it again. BackendDiedError if no replica is alive.
        """
        ...


class LocalBackend:
    """An engine loop in this process, fed with adapters from the blob store. Owns neither."""

    def __init__(self, loop: EngineLoop, blobs: BlobStore, interval_s: float = 0.02):
        self._loop = loop
        self._blobs = blobs
        self._interval_s = interval_s

    async def generate(self, request: Request) -> AsyncIterator[list[TokenEvent]]:
        """See `Backend.generate`. StorageError if the adapter cannot be fetched, BackendFailedError if not used."""
        if request.adapter is not None:
            request = await self._with_adapter(request, request.adapter)
        try:
            async for events in coalesce(self._loop.generate(request), self._interval_s):
                yield events
        except NotFoundError as error:  # so many others came since that the adapter was evicted again: once more
            raise BackendDiedError(str(error)) from error

    async def stats(self) -> dict[str, float]:
        """See `Backend.stats`."""
        self.check_health()
        return self._loop.stats()

    async def residencies(self) -> list[Residency]:
        """See `Backend.residencies`."""
        return await self._loop.residencies()

    async def release(self, adapter_key: str) -> None:
        """See `Backend.release`."""
        await self._loop.remove_adapter(adapter_key)

    def check_health(self) -> None:
        """BackendDiedError if the engine's thread has stopped or failed."""
        if not self._loop.is_healthy:
            raise BackendDiedError("The engine has stopped.")

    async def _with_adapter(self, request: Request, adapter: AdapterRef) -> Request:
        """The request once its adapter is on the host; the time that took counts for the first token's deadline.

        One that another replica has begun has had its first token: the deadline is nothing to it.
        """
        deadline_s = None if request.resumed_tokens else request.terms.first_token_deadline_s
        started_at = time.monotonic()
        try:
            async with asyncio.timeout(deadline_s):
                await self._ensure(adapter)
        except TimeoutError as error:
            raise OverloadedError(f"Adapter {adapter.label} did not come before the first token was due.") from error
        if deadline_s is None:
            return request
        left_s = max(0.0, deadline_s - (time.monotonic() - started_at))
        return replace(request, terms=replace(request.terms, first_token_deadline_s=left_s))

    async def _ensure(self, adapter: AdapterRef) -> None:
        try:
            await self._loop.ensure_adapter(adapter, lambda: self._blobs.fetch_folder(adapter.blob_key))
        except InvalidAdapterError as error:  # a client that only named it is not to blame
            raise BackendFailedError(f"Adapter {adapter.label} cannot be used: {error}") from error
        except NotFoundError as error:
            raise StorageError(f"Adapter {adapter.label} cannot be fetched: {error}") from error


async def coalesce(events: AsyncIterator[TokenEvent], interval_s: float) -> AsyncIterator[list[TokenEvent]]:
    """Groups events so that groups are at least `interval_s` apart; the first event and the end never wait.

    Each item of a stream costs Ray Serve about 0.6 ms in its default mode (measured on 4 cores, 2026-11-22): with one
    item per token that, not the model, would be the limit. No event is held longer than `interval_s`.
    """
    held: list[TokenEvent] = []
    due = 0.0
    coming = _next(events)
    try:
        while True:
            await asyncio.wait({coming}, timeout=max(0.0, due - time.monotonic()) if held else None)
            has_ended = False
            if coming.done():
                event = coming.result()
                has_ended = event is None
                if event is not None:
                    held.append(event)
                    coming = _next(events)
            if held and (has_ended or held[-1].finish_reason is not None or time.monotonic() >= due):
                yield held
                held, due = [], time.monotonic() + interval_s
            if has_ended:
                return
    finally:
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)
        await aclose(events)


async def merge(streams: list[AsyncIterator[list[TokenEvent]]]) -> AsyncIterator[tuple[int, list[TokenEvent]]]:
    """Events of several streams as they come, each with its stream's index; the first error ends and closes all."""
    coming = {_next(stream): index for index, stream in enumerate(streams)}
    try:
        while coming:
            done, _ = await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = coming.pop(task)
                events = task.result()
                if events is not None:
                    coming[_next(streams[index])] = index
                    yield index, events
    finally:
        for task in coming:
            task.cancel()
        await asyncio.gather(*coming, return_exceptions=True)
        await asyncio.gather(*map(aclose, streams))


async def aclose(iterator: AsyncIterable[Any]) -> None:
    """Closes an asynchronous generator now instead of when it is collected, so that what it holds is let go."""
    close = getattr(iterator, "aclose", None)
    if close is not None:
        await close()


def _next(iterator: AsyncIterator[Item]) -> "asyncio.Task[Item | None]":
    async def step() -> Item | None:
        return await anext(iterator, None)

    return asyncio.create_task(step())
