"""Tests a server that is not ours as the engine of a base: vLLM with `--vllm`, else our engine with vLLM's protocol."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from cluster.config.engines import EngineSpec
from cluster.config.settings import BaseSpec, Fleet, RolloutConfig, ServingConfig
from cluster.errors import ContextLengthError, InvalidRequestError, OverloadedError
from cluster.registry.registry import Registry, Status
from cluster.storage.blobs import BlobStore
from serving.engine.engine import Engine
from serving.engine.request import AdapterRef, Request, SamplingParams, Terms, TokenEvent
from serving.errors import BackendDiedError, BackendFailedError
from serving.gateway.gateway import Call, Gateway
from serving.remote.adapters import name_on_server
from serving.remote.backend import RemoteBackend
from serving.remote.pool import RemoteEngines, open_backend
from tests.worlds.engines import EngineProcess, HuggingFace, free_port, make_base
from tests.worlds.serving import make_adapter

PROMPTS = ("hello there", "Where is my card?", "2 + 2 =")
MAX_TOKENS = 24
ADAPTERS = {
    "plain": {"rank": 4},
    "rslora": {"rank": 8, "rslora": True, "alpha": 4.0, "seed": 1},
    "pattern": {
        "rank": 4,
        "seed": 2,
        "rank_pattern": {"q_proj": 2, "up_proj": 7},
        "alpha_pattern": {"q_proj": 5.0, "down_proj": 11.0},
    },
    "dora": {"rank": 4, "dora": True, "seed": 3},
}
CONFIG = ServingConfig(memory_bytes=2**24, max_model_tokens=512, max_rank=16)


@dataclass
class World:
    """A base, adapters of it, and the process that serves it."""

    folder: Path
    process: EngineProcess
    blobs: BlobStore
    adapters: dict[str, AdapterRef]

    @property
    def spec(self) -> EngineSpec:
        return EngineSpec(base="v1", url=self.process.url, adapters=str(self.folder / "shared"), timeout_s=120)

    def backend(self, spec: EngineSpec | None = None, config: ServingConfig = CONFIG) -> RemoteBackend:
        return RemoteBackend(spec or self.spec, self.folder / "v1", self.blobs, config)

    def fleet(self, *specs: EngineSpec) -> Fleet:
        base = BaseSpec(name="v1", path=self.folder / "v1")
        return Fleet(name="f", folder=self.folder, bases=(base,), engines=specs or (self.spec,), serving=CONFIG)

    def request(self, adapter: str | None = None, prompt: str = PROMPTS[0], **more: object) -> Request:
        tokens = tuple(AutoTokenizer.from_pretrained(self.folder / "v1")(prompt)["input_ids"])
        terms = more.pop("terms", Terms())
        sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": MAX_TOKENS, **more})
        ref = self.adapters[adapter] if adapter else None
        return Request(f"r{time.monotonic_ns()}", tokens, sampling, ref, terms=terms)


@pytest.fixture(scope="module", params=["ours", "vllm"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    python = request.getfixturevalue("vllm") if request.param == "vllm" else None
    folder = tmp_path_factory.mktemp(request.param)
    base = make_base(folder / "v1", seed=0)
    blobs = BlobStore(str(folder / "blobs"), folder / "cache")
    refs = {}
    for name, settings in ADAPTERS.items():
        key = blobs.put_folder(make_adapter(folder / name, base, **settings))
        refs[name] = AdapterRef(key, name, 1, key)
    process = EngineProcess(base, folder / "engine.log", python)
    process.start()
    process.wait()
    yield World(folder, process, blobs, refs)
    process.stop()


@asynccontextmanager
async def opened(backend: RemoteBackend) -> AsyncIterator[RemoteBackend]:
    try:
        yield backend
    finally:
        await backend.aclose()


async def read(backend: RemoteBackend, request: Request) -> tuple[str, list[int], list[TokenEvent]]:
    events = [event async for event in backend.generate(request)]
    return "".join(event.text for event in events), [t for event in events for t in event.tokens], events


def on_our_engine(world: World, request: Request) -> tuple[str, list[int], list[TokenEvent]]:
    engine = Engine.open(world.folder / "v1", CONFIG)
    engine.submit(request)
    events = []
    while engine.has_work:
        events += engine.step()
    return "".join(event.text for event in events), [t for event in events for t in event.tokens], events


@pytest.mark.parametrize("adapter", [None, "plain", "rslora", "pattern"])
async def test_answers_are_those_of_transformers_and_peft(world: World, adapter: str | None):
    """Patterns and rank-stabilised scaling too: some servers ignore these settings of an adapter."""
    expected = HuggingFace(world.folder / "v1").texts(adapter and world.folder / adapter, PROMPTS, MAX_TOKENS)
    async with opened(world.backend()) as backend:
        asked = [world.request(adapter, prompt) for prompt in PROMPTS]
        answers = await asyncio.gather(*(read(backend, request) for request in asked))
    assert [text for text, _, _ in answers] == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize(
    "sampling",
    [
        {"ignore_eos": True},
        {"num_logprobs": 3},
        {"num_logprobs": 0},
        {"stop_token_ids": (233,)},
        {"stop": ("in the middle",)},
        {"top_k": 1, "temperature": 1.0},
        {"frequency_penalty": 0.9, "presence_penalty": 0.5},
        {"repetition_penalty": 1.4},
        {"logit_bias": ((65, 6.0), (66, 6.0))},
        {"allowed_token_ids": tuple(range(65, 91))},
        {"min_tokens": 50},
    ],
    ids=str,
)
async def test_a_request_means_the_same_as_on_our_engine(world: World, sampling: dict):
    request = world.request(**sampling, max_tokens=60)
    if "stop" in sampling:
        request = with_stop(world, request)
    expected_text, expected_tokens, expected = on_our_engine(world, request)
    async with opened(world.backend()) as backend:
        text, tokens, events = await read(backend, request)
    assert (text, tokens) == (expected_text, expected_tokens)
    assert events[-1].finish_reason is expected[-1].finish_reason
    ours, theirs = ([one for event in some for one in event.logprobs] for some in (expected, events))
    assert [one.token for one in theirs] == [one.token for one in ours]
    assert [[token for token, _ in one.top] for one in theirs] == [[token for token, _ in one.top] for one in ours]
    assert [one.logprob for one in theirs] == pytest.approx([one.logprob for one in ours], abs=1e-3)


@pytest.mark.parametrize("num_seen", [1, 6, 13])
@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.9, "seed": 7}, {"frequency_penalty": 0.9}, {"temperature": 0.9, "presence_penalty": 0.5}],
    ids=["greedy", "seeded", "penalty", "unseeded penalty"],
)
async def test_an_interrupted_answer_goes_on_as_if_nothing_had_happened(world: World, num_seen: int, sampling: dict):
    """With a seed or penalties it is computed again: a longer prompt would give other tokens."""
    request = world.request("plain", ignore_eos=True, **sampling)
    async with opened(world.backend()) as backend:
        _, whole, _ = await read(backend, request)
        resumed = replace(request, resumed_tokens=tuple(whole[:num_seen]))
        _, rest, events = await read(backend, resumed)
    assert rest == whole[num_seen:]
    assert events[-1].finish_reason == "length"


async def test_a_seeded_answer_that_comes_out_differently_is_an_error(world: World):
    request = world.request(temperature=0.9, seed=7, ignore_eos=True)
    async with opened(world.backend()) as backend:
        _, whole, _ = await read(backend, request)
        other = (whole[0] + 1) % 256
        with pytest.raises(BackendFailedError, match="another answer"):
            await read(backend, replace(request, id="other", resumed_tokens=(other, *whole[1:4])))


async def test_a_stop_string_across_the_border_of_an_interruption_is_found(world: World):
    request = with_stop(world, world.request(max_tokens=60))
    shown, tokens, events = on_our_engine(world, request)  # one event per token
    assert events[-1].finish_reason == "stop"
    num_seen = len(tokens) - 1
    resumed = replace(request, id="resumed", resumed_tokens=tuple(tokens[:num_seen]))
    async with opened(world.backend()) as backend:
        rest, _, events_after = await read(backend, resumed)
    assert "".join(event.text for event in events[:num_seen]) + rest == shown
    assert events_after[-1].finish_reason == "stop"


async def test_bad_requests_are_refused_with_their_cause(world: World):
    async with opened(world.backend()) as backend:
        with pytest.raises(ContextLengthError, match="600 tokens"):
            await read(backend, replace(world.request(), prompt_tokens=(1,) * 600))
        with pytest.raises(InvalidRequestError, match="vocabulary"):
            await read(backend, replace(world.request(), prompt_tokens=(9999,)))
        with pytest.raises(InvalidRequestError, match="logprobs"):  # the server's own words
            await read(backend, world.request(num_logprobs=40))
        with pytest.raises(InvalidRequestError, match="bad_words: this model runs on a vllm server"):
            await read(backend, world.request(bad_words=((65, 66),)))
        with pytest.raises(BackendFailedError, match=r"dora@1 cannot be used .* DoRA"):
            await read(backend, world.request("dora"))


async def test_a_prompt_near_the_limit_gets_a_shorter_answer(world: World):
    request = replace(world.request(max_tokens=64, ignore_eos=True), prompt_tokens=(65,) * 500)
    async with opened(world.backend()) as backend:
        _, tokens, events = await read(backend, request)
    assert len(tokens) == 12
    assert events[-1].finish_reason == "length"


async def test_salts_and_tenants_reach_the_server(world: World):
    async with opened(world.backend(config=replace(CONFIG, prefix_cache="tenant"))) as backend:
        for terms in (Terms(tenant="a"), Terms(cache_salt="s"), Terms(can_cache=False)):
            text, _, _ = await read(backend, world.request(terms=terms))
            assert text == on_our_engine(world, world.request())[0]


async def test_a_first_token_that_would_come_too_late_is_refused(world: World):
    async with opened(world.backend()) as backend:
        await read(backend, world.request())
        with pytest.raises(OverloadedError, match="deadline"):
            await read(backend, world.request("plain", terms=Terms(first_token_deadline_s=1e-4)))
        assert (await read(backend, world.request("plain")))[0]


async def test_a_closed_answer_is_aborted_on_the_server(world: World):
    async with opened(world.backend()) as backend:
        stream = backend.generate(world.request(max_tokens=450, ignore_eos=True))
        await anext(stream)
        await stream.aclose()
        await until(lambda: is_idle(backend))


async def test_a_released_adapter_is_unloaded_and_loaded_again_when_asked_for(world: World):
    name = name_on_server(world.adapters["plain"])
    async with opened(world.backend()) as backend, opened(world.backend()) as other:
        before, _, _ = await read(backend, world.request("plain"))
        await read(other, world.request("plain"))  # another gateway of the same server
        assert name in world.process.models()
        report = (await backend.residencies())[0]
        assert (report.key, report.num_running) == (world.adapters["plain"].key, 0)
        await backend.release(world.adapters["plain"].key)
        await until(lambda: is_gone(world, name))
        with pytest.raises(BackendDiedError, match="does not exist"):  # which the gateway answers by asking again
            await read(other, world.request("plain"))
        for again in (other, backend):
            assert (await read(again, world.request("plain")))[0] == before


async def test_gauges_come_from_the_server(world: World):
    async with opened(world.backend()) as backend:
        before = (await backend.stats())["tokens_generated"]
        await read(backend, world.request(max_tokens=5, ignore_eos=True))

        async def has_counted() -> bool:
            stats = await backend.stats()
            return stats["tokens_generated"] == before + 5 and stats["running"] == stats["waiting"] == 0

        await until(has_counted)


async def test_a_restarted_server_gets_its_adapters_again(world: World):
    """The server is killed in the middle of two answers. Both end as if nothing had happened."""
    registry = Registry(f"sqlite:///{world.folder}/registry.db")
    registry.add_base("v1", str(world.folder / "v1"), "print")
    registry.add_adapter("plain")
    ref = world.adapters["plain"]
    registry.add_version("plain", "v1", Status.LIVE, blob_key=ref.key, content_hash=ref.key)
    engines = RemoteEngines(world.fleet(), world.blobs)
    gateway = Gateway(registry, world.blobs, engines.running, CONFIG, RolloutConfig())
    await gateway.refresh()
    sampling = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
    calls = [Call(f"c-{model}", model, (PROMPTS[1],), sampling) for model in ("plain", "v1")]
    expected = [text_of([part async for part in (await gateway.answer(call, whole=False)).rest]) for call in calls]

    answers = [await gateway.answer(replace(call, id=f"again-{call.id}"), whole=False) for call in calls]
    heads = [text_of(answer.head) for answer in answers]
    world.process.kill()
    world.process.start()
    await asyncio.to_thread(world.process.wait)
    assert name_on_server(ref) not in world.process.models()
    rests = [text_of([part async for part in answer.rest]) for answer in answers]
    firsts = [text_of((await gateway.answer(call, whole=True)).head) for call in calls]
    assert [head + rest for head, rest in zip(heads, rests, strict=True)] == firsts
    assert all(first.endswith(rest) for first, rest in zip(firsts, expected, strict=True))
    assert name_on_server(ref) in world.process.models()
    await gateway.stop()
    for backend in engines.running().values():
        await backend.aclose()
    registry.close()


async def test_of_two_servers_one_may_die(world: World):
    spare = EngineProcess(world.folder / "v1", world.folder / "spare.log")  # always ours: it need not be vLLM to die
    spare.start()
    await asyncio.to_thread(spare.wait)
    try:
        pool = open_backend(world.fleet(world.spec, replace(world.spec, url=spare.url)), "v1", world.blobs)
        texts = [(await read(pool, world.request("plain")))[0] for _ in range(4)]
        assert all(name_on_server(world.adapters["plain"]) in one.models() for one in (world.process, spare))
        spare.kill()
        for _ in range(4):
            with suppress(BackendDiedError):  # at most once: then it is avoided
                texts.append((await read(pool, world.request("plain")))[0])
        assert len(texts) >= 7
        assert len(set(texts)) == 1
        assert (await pool.stats())["running"] == 0
        await pool.release(world.adapters["plain"].key)
    finally:
        spare.stop()


def test_a_base_is_served_once_its_server_has_answered(world: World):
    engines = RemoteEngines(world.fleet(), world.blobs)
    assert set(engines.running()) == {"v1"}
    nobody = replace(world.spec, url=f"http://127.0.0.1:{free_port()}")
    assert set(RemoteEngines(world.fleet(nobody), world.blobs).running()) == set()


def with_stop(world: World, request: Request) -> Request:
    """Add a stop string of two characters, which the answer has in its middle."""
    text, _, _ = on_our_engine(world, request)
    pairs = (text[i : i + 2] for i in range(4, len(text) - 1))
    stop = next(pair for pair in pairs if "\ufffd" not in pair and text.find(pair) >= 4)
    return replace(request, sampling=replace(request.sampling, stop=(stop,)))


def text_of(parts) -> str:
    return "".join(event.text for _, event in parts)


async def is_idle(backend: RemoteBackend) -> bool:
    return (await backend.stats())["running"] == 0


async def is_gone(world: World, name: str) -> bool:
    return name not in world.process.models()


async def until(condition) -> None:
    async with asyncio.timeout(60):
        while not await condition():
            await asyncio.sleep(0.05)
