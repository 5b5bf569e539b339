"""Tests the path of a token: the async generators that it passes, and that they are closed."""

import inspect
import re
import sys
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from traceback import walk_stack

import httpx
import pytest
from starlette.requests import ClientDisconnect

from cluster.config.settings import RolloutConfig, ServingConfig
from cluster.registry.registry import Registry
from cluster.storage.blobs import BlobStore
from cluster.storage.checkpoints import open_checkpoint
from serving.engine.engine import Engine
from serving.engine.loop import EngineLoop
from serving.engine.request import Request, SamplingParams, TokenEvent, TokenStream
from serving.engine.stream import Stream
from serving.gateway import backend
from serving.gateway.calls import Call
from serving.gateway.gateway import Gateway
from serving.gateway.local_backend import LocalBackend
from serving.gateway.on_ray import HandleBackend
from serving.http.api import create_app
from serving.http.generation import EventStream
from serving.on_ray import EngineDeployment
from tests.worlds.serving import make_checkpoint

CONFIG = ServingConfig(memory_bytes=4 * 2**20, max_model_tokens=200)


class StreamingCall:
    """A streaming call of a Serve handle that awaits the deployment directly, so all generators share one stack."""

    def __init__(self, events: TokenStream):
        self._events = events

    def __aiter__(self) -> "StreamingCall":
        return self

    async def __anext__(self) -> TokenEvent:
        return await anext(self._events)

    def cancel(self) -> None:
        """Do nothing: the events have ended."""


class Handle:
    """A Serve handle whose replica is in this process."""

    def __init__(self, deployment: EngineDeployment):
        self._deployment = deployment
        self.generate = self

    def options(self, stream: bool) -> "Handle":
        return self

    def remote(self, request: Request) -> StreamingCall:
        return StreamingCall(self._deployment.generate(request))


def deployment_of(local: LocalBackend) -> EngineDeployment:
    """Return a replica around a backend, without Ray and without a fleet."""
    deployment = EngineDeployment.__new__(EngineDeployment)
    deployment._backend = local
    return deployment


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    make_checkpoint(tmp_path / "v1")
    registry = Registry(f"sqlite:///{tmp_path}/registry.db")
    registry.add_base("v1", str(tmp_path / "v1"), open_checkpoint(tmp_path / "v1").fingerprint())
    blobs = BlobStore(str(tmp_path / "blobs"), tmp_path / "cache")
    loop = EngineLoop(Engine.open(tmp_path / "v1", CONFIG))
    loop.start()
    backends = {"v1": HandleBackend(Handle(deployment_of(LocalBackend(loop, blobs))))}
    yield Gateway(registry, blobs, lambda: backends, CONFIG, RolloutConfig())
    loop.stop()
    registry.close()


async def generators_of(gateway: Gateway, monkeypatch: pytest.MonkeyPatch, num_choices: int) -> list[str]:
    """Return the async generators on the stack of the last read of the engine's stream, innermost first."""
    stacks = []
    get = Stream.get

    async def noting(self: Stream, not_before: float) -> TokenEvent:
        frames = [frame for frame, _ in walk_stack(sys._getframe())]
        stacks.append([f.f_code.co_qualname for f in frames if f.f_code.co_flags & inspect.CO_ASYNC_GENERATOR])
        return await get(self, not_before)

    monkeypatch.setattr(Stream, "get", noting)
    body = {"model": "v1", "prompt": "x", "max_tokens": 100, "ignore_eos": True, "stream": True, "n": num_choices}
    await gateway.refresh()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(gateway)), base_url="http://test") as client:
        response = await client.post("/v1/completions", json=body)
    assert "[DONE]" in response.text
    return stacks[-1]


async def test_a_response_that_fails_before_its_first_event_closes_the_answer(gateway: Gateway):
    async def send(message: object) -> None:
        raise OSError("the client is gone")

    async def receive() -> object:
        raise AssertionError("the response reads nothing")

    await gateway.refresh()
    sampling = SamplingParams(max_tokens=100, ignore_eos=True)
    answer = await gateway.answer(Call("id", "v1", ("x",), sampling), whole=False)

    async def events() -> AsyncGenerator[bytes, None]:
        async for _ in answer.rest:
            yield b""

    response = EventStream(answer, events(), headers={})
    with pytest.raises(ClientDisconnect):
        await response({"type": "http", "asgi": {"spec_version": "2.4"}}, receive, send)
    with pytest.raises(StopAsyncIteration):
        await anext(answer.rest)


async def test_the_generators_on_the_stack_are_the_listed_ones(gateway: Gateway, monkeypatch: pytest.MonkeyPatch):
    listed = re.findall(r"^\d\. `(.+)`", backend.__doc__ or "", re.MULTILINE)
    assert len(listed) <= 7
    *others, merging, events = listed
    assert (merging, events) == ("merge", "_events")
    assert await generators_of(gateway, monkeypatch, num_choices=1) == [*others, events]
    # `merge` reads each choice in its own task, so the stack ends below `merge`.
    assert await generators_of(gateway, monkeypatch, num_choices=2) == others
