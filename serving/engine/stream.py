"""Carries the events of one request from the engine's thread to the client's event loop."""

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import chain

from serving.engine.request import TokenEvent


class Stream:
    """Holds the events that the client has not read yet. Only the client's event loop may call its methods."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self._events: list[TokenEvent] = []
        self._has_events = asyncio.Event()
        self._has_ended = asyncio.Event()

    @property
    def has_ended(self) -> bool:
        """Whether the last event has arrived, even if it has not been read yet."""
        return self._has_ended.is_set()

    def put(self, event: TokenEvent) -> None:
        """Add an event."""
        self._events.append(event)
        self._has_events.set()
        if event.finish_reason is not None:
            self._has_ended.set()

    async def get(self, not_before: float) -> TokenEvent:
        """Wait for events and return all that have arrived as one event.

        Returns no earlier than `not_before`, a time of the event loop, unless the last event arrives first.
        """
        await self._has_events.wait()
        if self.loop.time() < not_before:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(not_before):
                    await self._has_ended.wait()
        self._has_events.clear()
        events, self._events = self._events, []
        return _joined(events)


def put_all(items: Iterable[tuple[Stream, TokenEvent]]) -> None:
    """Add events to their streams, in one call of the event loop."""
    for stream, event in items:
        stream.put(event)


def _joined(events: Sequence[TokenEvent]) -> TokenEvent:
    return events[-1]._replace(
        tokens=tuple(chain.from_iterable(event.tokens for event in events)),
        text="".join(event.text for event in events),
        logprobs=tuple(chain.from_iterable(event.logprobs for event in events)),
        prompt_logprobs=events[0].prompt_logprobs,
    )
