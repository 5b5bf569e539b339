"""Merges several streams into one."""

import asyncio
from collections.abc import AsyncGenerator, Collection, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")


async def merge(streams: Sequence[AsyncGenerator[Item, None]]) -> AsyncGenerator[Item, None]:
    """Yield the items of several streams as they come. When this ends, by an error or otherwise, it closes them all."""
    coming = {_next(stream): stream for stream in streams}
    try:
        while coming:
            done, _ = await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                stream = coming.pop(task)
                item = task.result()
                if item is not None:
                    coming[_next(stream)] = stream
                    yield item
    finally:
        # Shielded: the cancel scopes that Starlette uses cancel a task at every await, even while it closes streams.
        await asyncio.shield(_close(coming, streams))


async def _close(tasks: Collection["asyncio.Task[Any]"], streams: Sequence[AsyncGenerator[Any, None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.gather(*(stream.aclose() for stream in streams))


def _next(stream: AsyncGenerator[Item, None]) -> "asyncio.Task[Item | None]":
    async def step() -> Item | None:
        return await anext(stream, None)

    return asyncio.create_task(step())
