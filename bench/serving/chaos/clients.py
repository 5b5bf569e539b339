"""The clients of a fault run, and everything that loads, unloads and breaks adapters, on one event loop.

Each answer is checked against the expected tokens of the adapter that its request started with, and each error against
the causes that it may have.
"""

import asyncio
import errno
import os
import time
from collections.abc import Coroutine, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from bench.serving.chaos.engines import Engines
from bench.serving.chaos.events import (
    Ask,
    Crash,
    Delay,
    Event,
    Flood,
    Hurt,
    Load,
    Mend,
    Restart,
    Unload,
    Wave,
    faults_of,
)
from bench.serving.chaos.tally import Tally
from bench.serving.chaos.world import Content, Disk, World
from cluster.config.settings import MIB
from cluster.errors import InvalidRequestError, NotFoundError, OverloadedError, ReloraError, StorageError
from serving.engine.loop import EngineLoop
from serving.engine.request import AdapterRef, FinishReason, Request, SamplingParams
from serving.errors import BackendDiedError

HUNG_AFTER_S = 120.0
CROWDED_BYTES = 16 * MIB
_MAX_TRIES = 8
_SLOW_S = 0.03


class Clients:
    """Plays a wave's events. It maps names to adapters as the registry's routes do, and changes a name at once."""

    def __init__(self, world: World, wave: Wave, tally: Tally):
        self._world = world
        self._wave = wave
        self._tally = tally
        self._engines = Engines(world, wave, tally)
        self._blobs = world.blobs()
        self._disk = Disk(world)
        self._names: dict[str, AdapterRef] = {}
        self._hurt: set[str] = set()
        self._delays: dict[str, Delay] = {}
        self._numbers = count(1)
        self._slots = asyncio.Semaphore(wave.num_clients)
        self._num_flooding = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_over = asyncio.Event()
        config = wave.config()
        tally.is_impatient = config.adapter_load_timeout_s < HUNG_AFTER_S / 10
        tally.is_crowded = config.host_cache_bytes < CROWDED_BYTES

    async def play(self, events: Iterable[Event]) -> Engines:
        """Play all events in order, then wait until all requests have ended and the engine's memory is free."""
        for event in events:
            await self._begin(event)
        self._is_over.set()
        if self._tasks:
            _, hung = await asyncio.wait(self._tasks, timeout=HUNG_AFTER_S)
            self._tally.outcomes["hung"] += len(hung)
        await self._settle()
        self._engines.close()
        return self._engines

    async def _begin(self, event: Event) -> None:
        self._tally.faults.update(faults_of(event))
        match event:
            case Ask():
                await self._begin_ask(event)
            case Load():
                for content in event.contents:
                    self._spawn(self._load(event.name, content))
            case Unload():
                self._publish(event.name, None)
            case Hurt():
                self._hurt.add(event.content.key)
                self._tally.doubtful.add(event.content.key)
                self._disk.hurt(event.content.key, event.how)
            case Mend():
                for key in self._hurt:
                    self._disk.mend(key)
                self._hurt.clear()
            case Delay():
                self._tally.doubtful.add(event.content.key)
                self._delays[event.content.key] = event
            case Flood():
                self._num_flooding += event.num_requests
            case Crash():
                self._engines.crash()
            case Restart():
                self._engines.stop()

    async def _begin_ask(self, ask: Ask) -> None:
        if self._num_flooding or ask.reader == "idle":
            self._num_flooding -= ask.reader != "idle"
            self._spawn(self._client(ask))
            await asyncio.sleep(0)
            return
        async with asyncio.timeout(HUNG_AFTER_S):
            await self._slots.acquire()
        self._spawn(self._client(ask), self._slots)

    def _spawn(self, work: Coroutine[Any, Any, None], slots: asyncio.Semaphore | None = None) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if slots is not None:
            task.add_done_callback(lambda _: slots.release())

    # Requests.

    async def _client(self, ask: Ask) -> None:
        ref = None if ask.model is None else self._names.get(ask.model)
        if ask.model is not None and ref is None:
            self._tally.outcomes["no such name"] += 1
            return
        if ask.twist == "no such adapter":
            ref = AdapterRef("0" * 64, "nobody", 1, "0" * 64)
        tokens: list[int] = []
        outcome = await self._outcome(ask, ref, tokens)
        self._tally.check(ask, None if ref is None else ref.key, tokens, is_whole=outcome == "finished")

    async def _outcome(self, ask: Ask, ref: AdapterRef | None, tokens: list[int]) -> str:
        outcome = "error"
        try:
            async with asyncio.timeout(ask.gives_up_s):
                outcome = await self._answer(ask, ref, tokens)
        except TimeoutError as error:
            if ask.gives_up_s is None:
                self._tally.record_error(ask, ref, error)
                return outcome
            outcome = "client left"
        except Exception as error:  # noqa: BLE001 - every error is recorded
            self._tally.record_error(ask, ref, error)
            return outcome
        self._tally.outcomes[outcome] += 1
        return outcome

    async def _answer(self, ask: Ask, ref: AdapterRef | None, tokens: list[int]) -> str:
        """Ask as the gateway does: if an engine dies, resume on the next one with the tokens so far."""
        trouble: ReloraError = BackendDiedError("never tried")
        for _ in range(_MAX_TRIES):
            loop = self._engines.current()
            try:
                if ref is not None and ask.twist not in ("no such adapter", "not loaded"):
                    await loop.ensure_adapter(ref, partial(self._fetch, ref.blob_key))
                return await self._read(loop, self._request(ask, ref, tokens), ask, tokens)
            except NotFoundError as error:  # it was unloaded, or evicted from the host: try again
                trouble = error
                if ask.twist in ("no such adapter", "not loaded"):
                    break
            except BackendDiedError as error:
                trouble = error
                self._tally.num_resumed += bool(tokens)
        raise trouble

    async def _read(self, loop: EngineLoop, request: Request, ask: Ask, tokens: list[int]) -> str:
        num_events, events = 0, loop.generate(request)
        try:
            async for event in events:
                tokens += event.tokens
                num_events += 1
                if ask.num_logprobs is not None and [one.token for one in event.logprobs] != list(event.tokens):
                    self._tally.unexplained["logprobs of other tokens"] += 1
                if event.finish_reason is FinishReason.ABORT:
                    raise event.error or BackendDiedError("The engine was stopped.")
                if event.finish_reason is not None:
                    return "finished"
                if ask.leaves_after is not None and num_events >= ask.leaves_after:
                    return "client left"
                await self._dawdle(loop, request, ask, num_events)
        finally:
            await events.aclose()
        raise AssertionError("a stream ended without its last event")

    async def _dawdle(self, loop: EngineLoop, request: Request, ask: Ask, num_events: int) -> None:
        if ask.reader == "slow":
            await asyncio.sleep(_SLOW_S)
        if ask.reader == "idle" and num_events == 1:
            await self._is_over.wait()
        if ask.twist == "twin id" and num_events == 1:
            await self._try_twin(loop, request, ask)

    async def _try_twin(self, loop: EngineLoop, request: Request, ask: Ask) -> None:
        """Send another request with the same id: it is refused, or served if the first one has just ended."""
        tokens: list[int] = []
        with suppress(InvalidRequestError, NotFoundError, OverloadedError, BackendDiedError):
            await self._read(loop, replace(request, resumed_tokens=()), replace(ask, twist=None), tokens)
        self._tally.check(ask, request.adapter.key if request.adapter else None, tokens, is_whole=False)

    def _request(self, ask: Ask, ref: AdapterRef | None, tokens: list[int]) -> Request:
        prompt = self._world.prompts[ask.prompt]
        if ask.twist == "empty":
            prompt = ()
        elif ask.twist == "too long":
            prompt = prompt * 160
        elif ask.twist == "unknown token":
            prompt = (*prompt, 1 << 20)
        sampling = SamplingParams(0.0, max_tokens=ask.num_tokens, ignore_eos=True, num_logprobs=ask.num_logprobs)
        return Request(f"{next(self._numbers)}", prompt, sampling, ref, tuple(tokens), ask.terms)

    # Adapters.

    async def _load(self, name: str, content: Content) -> None:
        """Load a content under a name. A sound one is loaded before the name leads to it, others are not."""
        ref = AdapterRef(content.key, name, next(self._numbers), content.key)
        if name in self._names and content.fate == "sound":
            try:
                await self._engines.current().ensure_adapter(ref, partial(self._fetch, ref.blob_key))
            except ReloraError as error:
                self._tally.faults[f"refused load: {type(error).__name__}"] += 1
                return
        self._publish(name, ref)

    def _publish(self, name: str, ref: AdapterRef | None) -> None:
        """Point a name at another adapter, and remove the old one if no name leads to it any more."""
        old = self._names.pop(name, None)
        if ref is not None:
            self._names[name] = ref
        if old is not None and all(known.key != old.key for known in self._names.values()):
            self._spawn(self._remove(old.key))

    async def _remove(self, key: str) -> None:
        with suppress(BackendDiedError):
            await self._engines.current().remove_adapter(key)

    def _fetch(self, key: str) -> Path:
        """Fetch files on a loader thread, with the delay or fault of a `Delay` event."""
        delay = self._delays.pop(key, None)
        if delay is not None:
            time.sleep(delay.seconds)
            if delay.is_disk_full:
                raise StorageError(f"fetching {key} failed: {os.strerror(errno.ENOSPC)}")
        return self._blobs.fetch_folder(key)

    async def _settle(self) -> None:
        """Remove all adapters; nothing may be left then but idle prefixes of the base."""
        for _ in range(200):
            loop = self._engines.current()
            with suppress(BackendDiedError):
                for content in self._world.contents:
                    await loop.remove_adapter(content.key)
                await loop.residencies()
                stats = loop.stats()
                left = {key: stats[key] for key in ("running", "waiting", "adapters_on_host", "host_bytes", "pages_kv")}
                if not any(left.values()) and stats["pages_free"] == stats["pages"]:
                    return
            await asyncio.sleep(0.05)
        self._tally.unexplained[f"left over after the wave: {left}"] += 1
