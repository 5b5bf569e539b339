"""Tests the engine's thread: streams, cancellation, adapter loads, and how it ends."""

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from cluster.adapters.files import load_adapter
from cluster.config.settings import ServingConfig
from cluster.errors import InvalidAdapterError, InvalidRequestError, NotFoundError, OverloadedError, StorageError
from serving.engine.engine import Engine
from serving.engine.loop import EngineLoop
from serving.engine.request import AdapterRef, FinishReason, Request, SamplingParams, TokenEvent
from serving.engine.stream import Stream
from serving.errors import BackendDiedError
from tests.worlds.serving import make_adapter, make_checkpoint, tokens_of

REF = AdapterRef("hash", "tone", 1, "blob")
LONG = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
SHORT = replace(LONG, max_tokens=20)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("world")
    checkpoint = make_checkpoint(folder / "base")
    return checkpoint, make_adapter(folder / "tone", checkpoint)


@pytest.fixture
def engine(folders: tuple[Path, Path]) -> Engine:
    return Engine.open(folders[0], ServingConfig(memory_bytes=4 << 20, max_queue=4, max_sequences=8, max_rank=16))


@pytest.fixture
def loop(engine: Engine) -> Iterator[EngineLoop]:
    loop = EngineLoop(engine)
    loop.start()
    yield loop
    if loop.is_healthy:
        loop.stop()


def request(id: str = "a", sampling: SamplingParams = SHORT, adapter: AdapterRef | None = None) -> Request:
    return Request(id, tuple(range(5, 12)), sampling, adapter)


async def drain(events: AsyncIterator[TokenEvent]) -> list[TokenEvent]:
    return [event async for event in events]


def alone(folders: tuple[Path, Path], wanted: Request) -> list[TokenEvent]:
    """Run a request on a separate engine without a loop."""
    engine = Engine.open(folders[0], ServingConfig(memory_bytes=4 << 20))
    engine.add_adapter(REF, load_adapter(folders[1]))
    engine.submit(wanted)
    events = []
    while engine.has_work:
        events += engine.step()
    return events


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


@dataclass
class Source:
    """A function that fetches a folder. It waits for `is_open`, raises `errors` first, and records its threads."""

    folder: Path
    is_open: threading.Event = field(default_factory=threading.Event)
    errors: list[Exception] = field(default_factory=list)
    threads: list[str] = field(default_factory=list)

    def __call__(self) -> Path:
        self.threads.append(threading.current_thread().name)
        assert self.is_open.wait(20)
        if self.errors:
            raise self.errors.pop()
        return self.folder


# Streams.


async def test_a_stream_yields_the_engines_events(loop: EngineLoop, folders: tuple[Path, Path]) -> None:
    events, expected = await drain(loop.generate(request())), alone(folders, request())
    assert tokens_of(events) == tokens_of(expected)
    assert "".join(event.text for event in events) == "".join(event.text for event in expected)
    assert [event.finish_reason for event in events if event.finish_reason] == [FinishReason.LENGTH]


async def test_streams_share_steps(loop: EngineLoop) -> None:
    answers = await asyncio.gather(*(drain(loop.generate(request(str(i)))) for i in range(4)))
    assert len({tuple(tokens_of(events)) for events in answers}) == 1
    assert loop.stats()["steps"] < 2 * SHORT.max_tokens


async def test_a_slow_reader_gets_all_tokens_in_few_events(loop: EngineLoop, folders: tuple[Path, Path]) -> None:
    wanted = request(sampling=replace(LONG, num_logprobs=1))
    stream = loop.generate(wanted)
    events = [await anext(stream)]
    await until(lambda: loop.stats()["tokens_generated"] == 400)
    events += await drain(stream)
    assert tokens_of(events) == tokens_of(alone(folders, wanted))
    assert [logprob.token for event in events for logprob in event.logprobs] == tokens_of(events)
    assert len(events) < 50


async def test_an_interval_delays_neither_the_first_nor_the_last_event() -> None:
    loop = asyncio.get_running_loop()
    stream = Stream(loop)
    stream.put(TokenEvent("a", tokens=(0,), text="0"))
    assert (await stream.get(0.0)).tokens == (0,)
    not_before = loop.time() + 0.05
    for token in (1, 2, 3):
        stream.put(TokenEvent("a", tokens=(token,), text=str(token)))
    event = await stream.get(not_before)
    assert (event.tokens, event.text, loop.time() > not_before - 0.001) == ((1, 2, 3), "123", True)
    waiting = asyncio.create_task(stream.get(loop.time() + 60))
    stream.put(TokenEvent("a", tokens=(4,)))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    stream.put(TokenEvent("a", tokens=(5,), finish_reason=FinishReason.STOP))
    assert (await asyncio.wait_for(waiting, 5)).tokens == (4, 5)


async def test_events_of_a_stream_are_an_interval_apart(loop: EngineLoop, folders: tuple[Path, Path]) -> None:
    events, times = [], []
    async for event in loop.generate(request(sampling=LONG), interval_s=0.02):
        events.append(event)
        times.append(asyncio.get_running_loop().time())
    assert tokens_of(events) == tokens_of(alone(folders, request(sampling=LONG)))
    assert min(after - before for before, after in pairwise(times[:-1])) >= 0.019


async def test_two_event_loops_can_use_one_engine(loop: EngineLoop) -> None:
    here, there = await asyncio.gather(
        drain(loop.generate(request("here"))),
        asyncio.to_thread(lambda: asyncio.run(drain(loop.generate(request("there"))))),
    )
    assert tokens_of(here) == tokens_of(there)


async def test_an_idle_engine_does_not_step(loop: EngineLoop) -> None:
    await drain(loop.generate(request()))
    await asyncio.sleep(0.05)
    steps = loop.stats()["steps"]
    await asyncio.sleep(0.1)
    assert loop.stats()["steps"] == steps


# Cancellation.


async def test_closing_the_stream_aborts_the_request(loop: EngineLoop) -> None:
    free = loop.stats()["pages_free"]
    stream = loop.generate(request(sampling=LONG))
    await anext(stream)
    await stream.aclose()
    await until(lambda: loop.stats()["running"] == 0 and loop.stats()["pages_free"] == free)
    assert loop.stats()["tokens_generated"] < 400


async def test_cancelling_the_reader_aborts_the_request(loop: EngineLoop) -> None:
    reader = asyncio.create_task(drain(loop.generate(request(sampling=LONG))))
    await until(lambda: loop.stats()["running"] == 1)
    reader.cancel()
    await until(lambda: loop.stats()["running"] == 0)
    assert loop.is_healthy


async def test_the_id_of_an_aborted_request_can_be_used_again_at_once(
    loop: EngineLoop, folders: tuple[Path, Path]
) -> None:
    stream = loop.generate(request(sampling=LONG))
    await anext(stream)
    await stream.aclose()
    assert tokens_of(await drain(loop.generate(request()))) == tokens_of(alone(folders, request()))


async def test_a_second_request_with_the_same_id_is_rejected_and_the_first_continues(loop: EngineLoop) -> None:
    stream = loop.generate(request(sampling=LONG))
    first = await anext(stream)  # one token or more: tokens that arrive together are one event
    with pytest.raises(InvalidRequestError):
        await drain(loop.generate(request()))
    assert len(tokens_of([first, *await drain(stream)])) == 400


def test_requests_of_a_closed_event_loop_are_aborted(loop: EngineLoop) -> None:
    other = asyncio.new_event_loop()
    stream = loop.generate(request(sampling=LONG))
    other.run_until_complete(anext(stream))
    other.close()
    asyncio.run(until(lambda: loop.stats()["running"] == 0))
    assert loop.is_healthy
    asyncio.run(stream.aclose())


# Rejections.


async def test_rejections_are_raised(loop: EngineLoop) -> None:
    with pytest.raises(NotFoundError):
        await drain(loop.generate(request(adapter=REF)))
    with pytest.raises(InvalidRequestError):
        await drain(loop.generate(replace(request(), prompt_tokens=())))
    assert loop.is_healthy


async def test_a_full_queue_is_raised_and_the_other_requests_are_served(loop: EngineLoop) -> None:
    answers = await asyncio.gather(*(drain(loop.generate(request(str(i)))) for i in range(30)), return_exceptions=True)
    refused = [answer for answer in answers if isinstance(answer, OverloadedError)]
    served = [answer for answer in answers if isinstance(answer, list)]
    assert len(refused) + len(served) == 30
    assert refused
    assert all(len(tokens_of(events)) == 20 for events in served)
    assert len(served) >= 4


# Adapters.


async def test_an_adapter_is_loaded_and_removed(loop: EngineLoop, folders: tuple[Path, Path]) -> None:
    await loop.ensure_adapter(REF, folders[1])
    wanted = request(adapter=REF)
    assert tokens_of(await drain(loop.generate(wanted))) == tokens_of(alone(folders, wanted))
    assert loop.has_adapter(REF.key)
    await loop.remove_adapter(REF.key)
    assert not loop.has_adapter(REF.key)


async def test_concurrent_loads_of_an_adapter_are_one_load_on_a_loader_thread(
    loop: EngineLoop, folders: tuple[Path, Path]
) -> None:
    source = Source(folders[1])
    loads = [asyncio.create_task(loop.ensure_adapter(REF, source)) for _ in range(5)]
    await until(lambda: bool(source.threads))
    loads.pop().cancel()
    # The engine continues while the adapter is loading.
    assert len(tokens_of(await drain(loop.generate(request())))) == 20
    source.is_open.set()
    await asyncio.gather(*loads)
    await loop.ensure_adapter(REF, source)
    assert len(source.threads) == 1
    assert source.threads[0].startswith("adapter-loader")


async def test_a_failed_load_is_raised_to_all_callers_and_tried_again(
    loop: EngineLoop, folders: tuple[Path, Path]
) -> None:
    source = Source(folders[1], errors=[StorageError("the store is down")])
    loads = [asyncio.create_task(loop.ensure_adapter(REF, source)) for _ in range(2)]
    await until(lambda: bool(source.threads))
    source.is_open.set()
    assert [str(error) for error in await asyncio.gather(*loads, return_exceptions=True)] == ["the store is down"] * 2
    await loop.ensure_adapter(REF, source)
    assert [residency.key for residency in await loop.residencies()] == [REF.key]


async def test_a_failed_load_without_callers_logs_nothing(
    loop: EngineLoop, folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    source = Source(folders[1], errors=[StorageError("down")])
    waiting = asyncio.create_task(loop.ensure_adapter(REF, source))
    await until(lambda: bool(source.threads))
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    del waiting  # its traceback keeps the future alive, which logs its error when it is collected
    source.is_open.set()
    await until(lambda: not source.errors)
    await asyncio.sleep(0.05)
    gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"]


async def test_a_hung_load_fails_for_all_callers_and_the_next_call_starts_another(folders: tuple[Path, Path]) -> None:
    config = ServingConfig(memory_bytes=4 << 20, adapter_load_timeout_s=0.3)
    loop = EngineLoop(Engine.open(folders[0], config), num_loaders=1)
    loop.start()
    hung, fine = Source(folders[1]), Source(folders[1])
    fine.is_open.set()
    loads = [asyncio.create_task(loop.ensure_adapter(REF, hung)) for _ in range(3)]
    loads.append(asyncio.create_task(loop.ensure_adapter(replace(REF, key="queued behind it"), fine)))
    outcomes = await asyncio.gather(*loads, return_exceptions=True)
    assert all(isinstance(outcome, StorageError) for outcome in outcomes[:3])
    await loop.ensure_adapter(REF, fine)
    assert REF.key in [residency.key for residency in await loop.residencies()]
    hung.is_open.set()
    assert tokens_of(await drain(loop.generate(request(adapter=REF))))
    assert [(one.key, one.num_hits) for one in await loop.residencies() if one.key == REF.key] == [(REF.key, 1)]
    loop.stop()


async def test_unusable_files_are_rejected(loop: EngineLoop, folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidAdapterError):
        await loop.ensure_adapter(REF, tmp_path)
    big = make_adapter(tmp_path / "big", folders[0], rank=17)
    with pytest.raises(InvalidAdapterError, match="17"):
        await loop.ensure_adapter(REF, big)
    assert not loop.has_adapter(REF.key)


async def test_a_full_host_cache_fails_the_request(folders: tuple[Path, Path]) -> None:
    config = ServingConfig(memory_bytes=4 << 20, host_cache_bytes=100_000, max_rank=16)
    loop = EngineLoop(Engine.open(folders[0], config))
    loop.start()
    first, second = (replace(REF, key=key) for key in ("first", "second"))
    await loop.ensure_adapter(first, folders[1])
    stream = loop.generate(request("a", LONG, first))
    await anext(stream)
    for id in "bc":
        await loop.ensure_adapter(second, folders[1])
        with pytest.raises(OverloadedError, match="host_cache_bytes"):
            await drain(loop.generate(request(id, adapter=second)))
    await stream.aclose()
    await loop.ensure_adapter(second, folders[1])
    assert len(tokens_of(await drain(loop.generate(request("d", adapter=second))))) == 20
    loop.stop()


@pytest.mark.parametrize("how", ["at once", "too late", "removed"])
async def test_a_loaded_adapter_is_kept_for_its_request(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The host cache has room for one adapter, so loading another evicts the first."""
    monkeypatch.setattr("serving.engine.loop._HANDOVER_S", 0.0 if how == "too late" else 60.0)
    config = ServingConfig(memory_bytes=4 << 20, host_cache_bytes=100_000, max_rank=16)
    loop = EngineLoop(Engine.open(folders[0], config))
    loop.start()
    first, second = (replace(REF, key=key) for key in ("first", "second"))
    for ref in (first, second):
        await loop.ensure_adapter(ref, folders[1])
    await loop.residencies()  # after this, both have been added
    assert (loop.has_adapter("first"), loop.has_adapter("second")) == (False, True)
    if how == "removed":
        await loop.remove_adapter("first")
    if how == "at once":
        answer = await drain(loop.generate(request(adapter=first)))
        assert tokens_of(answer) == tokens_of(alone(folders, request(adapter=REF)))
        assert loop._handed.keys() == {"second"}
    else:
        with pytest.raises(NotFoundError):
            await drain(loop.generate(request(adapter=first)))
    loop.stop()


# The end.


async def test_stopping_ends_every_stream(loop: EngineLoop) -> None:
    stream = loop.generate(request(sampling=LONG))
    await anext(stream)
    await asyncio.to_thread(loop.stop)
    (*_, last) = await drain(stream)
    assert (last.finish_reason, last.error) == (FinishReason.ABORT, None)
    assert not loop.is_healthy
    with pytest.raises(BackendDiedError):
        await drain(loop.generate(request()))
    with pytest.raises(BackendDiedError):
        await loop.ensure_adapter(REF, Path("anywhere"))


async def test_a_failed_step_fails_every_stream(
    loop: EngineLoop, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = [loop.generate(request(id, LONG)) for id in "ab"]
    for stream in streams:
        await anext(stream)

    def fail(*_: object) -> torch.Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine._model, "forward", fail)
    for stream in streams:
        (*_, last) = await drain(stream)
        assert last.finish_reason is FinishReason.ABORT
        assert isinstance(last.error, BackendDiedError)
        assert "out of memory" in str(last.error)
    assert not loop.is_healthy
    with pytest.raises(BackendDiedError):
        await drain(loop.generate(request()))


async def test_a_failed_command_is_raised_and_ends_the_loop(
    loop: EngineLoop, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "remove_adapter", lambda key: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        await loop.remove_adapter("key")
    await until(lambda: not loop.is_healthy)
