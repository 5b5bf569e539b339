"""Our engine as the serving benchmark runs it: in this process, and by default with all adapters on the host."""

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from bench.serving.served import ServedModel
from bench.serving.waste import MeasuredEngine
from bench.serving.workloads import FIRST_TOKEN_ID, Answer, Ask
from cluster.adapters.files import load_adapter
from cluster.config.settings import GIB, MIB, ServingConfig
from cluster.errors import NotFoundError, OverloadedError
from serving.adapters.packing import PackedAdapter
from serving.engine.engine import Engine
from serving.engine.loop import EngineLoop
from serving.engine.request import AdapterRef, Request, SamplingParams

PAGE_TOKENS = 16
RETRY_S = 0.01  # the pause of a client refused because adapters in use fill the host
GIVE_UP_S = 300.0  # a client refused for longer reports the refusal: adapters in use cannot fill the host for ever


def config(
    served: ServedModel, memory_bytes: int = 512 * MIB, host_cache_bytes: int = 256 * GIB, max_batch_tokens: int = 512
) -> ServingConfig:
    """Return the benchmark's settings: batches of 32 like the rivals', a long queue, and no prefix cache.

    By default the host has room for all adapters.
    """
    return ServingConfig(
        device=served.device,
        dtype=cast(Any, served.dtype),
        memory_bytes=memory_bytes,
        host_cache_bytes=host_cache_bytes,
        max_batch_tokens=max_batch_tokens,
        page_tokens=PAGE_TOKENS,
        max_queue=100_000,
        max_sequences=32,
        max_rank=64,
        packed_bytes=256 * GIB,
        prefix_cache="off",
    )


def key_of(number: int) -> str:
    """Return a stand-in for an adapter's content hash."""
    return hashlib.sha256(str(number).encode()).hexdigest()


def ref_of(number: int) -> AdapterRef:
    """Return the reference by which requests name an adapter."""
    return AdapterRef(key_of(number), f"adapter-{number}", 1, "")


class Ours:
    """An engine with the first `num_adapters` adapters on the host. Adapters of one folder share memory."""

    def __init__(self, served: ServedModel, num_adapters: int, settings: ServingConfig | None = None):
        self.engine = MeasuredEngine.open(served.model, settings or config(served))
        packed = {folder: self._packed(folder) for folder in dict.fromkeys(served.adapters[:num_adapters])}
        for number, folder in enumerate(served.adapters[:num_adapters]):
            self.engine.add_packed(ref_of(number), packed[folder])
        self._num_asked = 0

    def replay(
        self, asks: Sequence[Ask], after_step: Callable[[MeasuredEngine], None] = lambda _: None
    ) -> list[Answer]:
        """Submit each request at its arrival time, and step until all are answered."""
        waiting = [(ask.arrival_s, self._request(ask)) for ask in asks]
        seen = {request.id: _Seen() for _, request in waiting}
        waiting.reverse()
        start_s = time.perf_counter()
        while waiting or self.engine.has_work:
            now_s = time.perf_counter() - start_s
            while waiting and waiting[-1][0] <= now_s:
                self.engine.submit(waiting.pop()[1])
            if self.engine.has_work:
                self._step(seen, start_s)
                after_step(self.engine)
            elif waiting:
                time.sleep(max(waiting[-1][0] - now_s, 0.0))
        return [one.answer() for one in seen.values()]

    def _packed(self, folder: Path) -> PackedAdapter:
        packed = self.engine.pack(load_adapter(folder))
        return packed if self.engine.config.device == "cpu" else packed.pinned()

    def _step(self, seen: "dict[str, _Seen]", start_s: float) -> None:
        events = self.engine.step()
        now_s = time.perf_counter() - start_s
        for event in events:
            if event.error is not None:
                raise event.error
            seen[event.request_id].add(event.tokens, now_s)

    def _request(self, ask: Ask) -> Request:
        self._num_asked += 1
        return request_of(str(self._num_asked), ask)


def request_of(request_id: str, ask: Ask) -> Request:
    """Return an ask as the engine's request."""
    sampling = SamplingParams(temperature=0.0, max_tokens=ask.max_tokens, ignore_eos=True)
    return Request(request_id, ask.prompt, sampling, None if ask.adapter is None else ref_of(ask.adapter))


class _Seen:
    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._times: list[float] = []

    def add(self, tokens: Sequence[int], now_s: float) -> None:
        self._tokens += tokens
        self._times.append(now_s)

    def answer(self) -> Answer:
        return Answer(self._times[0], self._times[-1], tuple(self._tokens))


@contextmanager
def running(served: ServedModel, settings: ServingConfig, packed: Path | None) -> Iterator[EngineLoop]:
    """Run the engine on its own thread with loader threads, as a replica does."""
    loop = EngineLoop(Engine.open(served.model, settings), packed_dir=packed)
    loop.start()
    try:
        yield loop
    finally:
        loop.stop()


def replay_live(loop: EngineLoop, served: ServedModel, asks: Sequence[Ask]) -> list[Answer]:
    """Replay the requests with one client each, which arrives on time and makes the engine load its adapter."""
    return asyncio.run(_replay_live(loop, served, asks))


def visit_all(loop: EngineLoop, served: ServedModel) -> None:
    """Ask for every adapter once, one after the other, so that each is loaded and written to disk."""
    for number in range(len(served.adapters)):
        replay_live(loop, served, [Ask(0.0, number, (FIRST_TOKEN_ID,), 1)])


async def _replay_live(loop: EngineLoop, served: ServedModel, asks: Sequence[Ask]) -> list[Answer]:
    start_s = time.perf_counter()
    tasks = []
    for number, ask in enumerate(asks):
        await asyncio.sleep(max(ask.arrival_s - (time.perf_counter() - start_s), 0.0))
        tasks.append(asyncio.create_task(_client(loop, served, ask, f"live-{number}", start_s)))
    return list(await asyncio.gather(*tasks))


async def _client(loop: EngineLoop, served: ServedModel, ask: Ask, request_id: str, start_s: float) -> Answer:
    """Return one client's answer. A refused client tries again, and its latency includes that wait.

    Raises the last refusal after `GIVE_UP_S`.
    """
    give_up_at = time.monotonic() + GIVE_UP_S
    while True:
        try:
            return await _answer(loop, served, ask, request_id, start_s)
        except (OverloadedError, NotFoundError):  # not found: other adapters evicted it after it was loaded
            if time.monotonic() > give_up_at:
                raise
            await asyncio.sleep(RETRY_S)


async def _answer(loop: EngineLoop, served: ServedModel, ask: Ask, request_id: str, start_s: float) -> Answer:
    seen = _Seen()
    if ask.adapter is not None:
        await loop.ensure_adapter(ref_of(ask.adapter), served.adapters[ask.adapter])
    async for event in loop.generate(request_of(request_id, ask)):
        if event.error is not None:
            raise event.error
        seen.add(event.tokens, time.perf_counter() - start_s)
    return seen.answer()
