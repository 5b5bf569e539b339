"""Tests the gateway against fake engines: names, canaries, resubmission, and adapters that clients load."""

import asyncio
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cluster.config.settings import RolloutConfig, ServingConfig
from cluster.errors import (
    ConflictError,
    InvalidAdapterError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    ReloraError,
    StorageError,
)
from cluster.registry.registry import Registry, Status, Version
from cluster.storage.blobs import BlobStore, content_hash
from cluster.storage.checkpoints import open_checkpoint
from serving.adapters.residency import Residency, Tier
from serving.engine.request import AdapterRef, FinishReason, Request, SamplingParams, Terms, TokenEvent, TokenStream
from serving.errors import BackendDiedError, BackendFailedError
from serving.gateway.calls import Answer, Call, Part
from serving.gateway.gateway import Gateway
from serving.gateway.golden import check_golden
from serving.gateway.local_backend import LocalBackend
from serving.gateway.merge import merge
from serving.gateway.prompts import Prompter
from serving.gateway.routing import residencies
from tests.worlds.serving import make_adapter, make_checkpoint


@dataclass
class FakeBackend:
    """Answers with its name, the adapter and the seed, one character per token.

    `deaths` says for each of the next requests after how many events it raises `error`, or BackendDiedError.
    """

    base: str
    deaths: list[int] = field(default_factory=list)
    error: Exception | None = None
    requests: list[Request] = field(default_factory=list)
    num_open: int = 0
    kept: list[str] = field(default_factory=list)
    released: list[str] = field(default_factory=list)

    def text(self, request: Request) -> str:
        who = f"{self.base}/{request.adapter.label if request.adapter else '-'}/{request.sampling.seed} "
        return (who * 9)[: request.sampling.max_tokens]

    async def generate(self, request: Request) -> TokenStream:
        self.requests.append(request)
        left = self.deaths.pop(0) if self.deaths else 10_000
        self.num_open += 1
        try:
            text = self.text(request)
            for at in range(len(request.resumed_tokens), len(text)):
                if left == 0:
                    raise self.error or BackendDiedError("killed by the test")
                left -= 1
                await asyncio.sleep(0)
                reason = FinishReason.LENGTH if at == len(text) - 1 else None
                yield TokenEvent(request.id, tokens=(ord(text[at]),), text=text[at], finish_reason=reason)
        finally:
            self.num_open -= 1

    async def stats(self) -> dict[str, float]:
        return {"running": float(self.num_open)}

    async def residencies(self) -> list[Residency]:
        return [Residency(key, Tier.HOST, num_bytes=10) for key in self.kept]

    async def release(self, adapter_key: str) -> None:
        self.released.append(adapter_key)


@dataclass
class FakeFleet:
    """A registry and a blob store, with fake backends for two bases."""

    folder: Path
    registry: Registry
    blobs: BlobStore
    backends: dict[str, FakeBackend]

    def add(self, name: str, base: str, status: Status, files: Path | None = None) -> Version:
        files = files or self.folder / "adapter"
        self.registry.add_adapter(name)
        key = self.blobs.put_folder(files)
        return self.registry.add_version(name, base, status, blob_key=key, content_hash=content_hash(files))

    def gateway(self, canary_share: float = 1.0, poll_s: float = 60.0) -> Gateway:
        rollout = RolloutConfig(canary_share=canary_share, poll_s=poll_s)
        return Gateway(self.registry, self.blobs, lambda: dict(self.backends), ServingConfig(max_rank=16), rollout)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    make_checkpoint(folder / "v1")
    make_checkpoint(folder / "v2", seed=1)
    make_adapter(folder / "adapter", folder / "v1", rank=3)
    return folder


@pytest.fixture
def world(files: Path, tmp_path: Path):
    registry = Registry(f"sqlite:///{tmp_path}/registry.db")
    for name in ("v1", "v2"):
        registry.add_base(name, str(files / name), open_checkpoint(files / name).fingerprint())
    backends = {"v1": FakeBackend("v1"), "v2": FakeBackend("v2")}
    yield FakeFleet(files, registry, BlobStore(str(tmp_path / "blobs"), tmp_path / "cache"), backends)
    registry.close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("serving.gateway.gateway.BACKOFF_S", 0.001)


def call(model: str, id: str = "call", max_tokens: int = 20, **more) -> Call:
    return Call(id=id, model=model, prompts=("hello",), sampling=SamplingParams(max_tokens=max_tokens), **more)


async def text_of(answer: Answer) -> str:
    return "".join([event.text for _, event in await parts_of(answer)])


async def parts_of(answer: Answer) -> list[Part]:
    return [*answer.head, *[part async for part in answer.rest]]


async def ask(gateway: Gateway, model: str, **more) -> str:
    return await text_of(await gateway.answer(call(model, **more), whole=True))


async def test_names_are_answered_by_the_right_version_and_base(world: FakeFleet):
    world.add("intent", "v1", Status.RETIRED)
    world.add("intent", "v2", Status.LIVE)
    gateway = world.gateway()
    await gateway.refresh()
    assert (await ask(gateway, "v1")).startswith("v1/-/")
    assert (await ask(gateway, "intent")).startswith("v2/intent@2/")
    assert (await ask(gateway, "intent@1")).startswith("v1/intent@1/")
    answer = await gateway.answer(call("intent"), whole=False)
    assert (answer.target.label, answer.target.base) == ("intent@2", "v2")
    assert len(await text_of(answer)) == 20
    assert answer.num_prompt_tokens == 5


@pytest.mark.parametrize("model", ["nobody", "intent@7", "nobody@1", "intent@2", "elsewhere", "idle"])
async def test_unservable_models_are_not_found(world: FakeFleet, model: str):
    world.add("intent", "v1", Status.LIVE)
    world.add("intent", "v2", Status.ADAPTING)
    world.add("elsewhere", "v1", Status.PLANNED)
    world.registry.add_base("idle", str(world.folder / "v1"), "some fingerprint")
    gateway = world.gateway()
    await gateway.refresh()
    with pytest.raises(NotFoundError):
        await ask(gateway, model)


@pytest.mark.parametrize("model", ["../etc", "a b", "intent@x", "intent@", ""])
async def test_invalid_names_are_rejected(world: FakeFleet, model: str):
    with pytest.raises(InvalidRequestError):
        await ask(world.gateway(), model)


async def test_a_live_adapter_without_an_engine_is_unavailable(world: FakeFleet):
    world.add("intent", "v2", Status.LIVE)
    del world.backends["v2"]
    gateway = world.gateway()
    await gateway.refresh()
    with pytest.raises(BackendDiedError):
        await ask(gateway, "intent")
    with pytest.raises(BackendDiedError):
        await gateway.check_health()


async def test_without_any_engine_the_service_is_not_healthy(world: FakeFleet):
    world.backends.clear()
    gateway = world.gateway()
    await gateway.refresh()
    for work in (gateway.check_health(), gateway.load_adapter("mine", str(world.folder / "adapter"), None)):
        with pytest.raises(BackendDiedError, match="No engine is running yet"):
            await work


async def test_an_unknown_name_refreshes_the_snapshot(world: FakeFleet):
    gateway = world.gateway(poll_s=60)
    await gateway.start()
    world.add("fresh", "v1", Status.LIVE)
    assert (await ask(gateway, "fresh")).startswith("v1/fresh@1")
    await gateway.stop()


async def test_routes_are_polled_and_failed_polls_show_in_health(world: FakeFleet):
    version = world.add("intent", "v1", Status.LIVE)
    gateway = world.gateway(poll_s=0.02)
    await gateway.start()
    await gateway.check_health()
    world.registry.move(version.id, Status.LIVE, Status.RETIRED)
    await _until(lambda: "intent" not in gateway.snapshot.routes)
    list_backends, gateway._list_backends = gateway._list_backends, _raise_storage_error
    await _until(lambda: gateway._poll_error is not None)
    with pytest.raises(StorageError):
        await gateway.check_health()
    assert (await ask(gateway, "v1")).startswith("v1/-"), "the old snapshot stays in use"
    gateway._list_backends = lambda: 1 / 0
    await _until(lambda: isinstance(gateway._poll_error, BackendFailedError))
    gateway._list_backends = list_backends
    await _until(lambda: gateway._poll_error is None)
    await gateway.check_health()
    await gateway.stop()


async def test_concurrent_refreshes_share_one_snapshot(world: FakeFleet):
    gateway = world.gateway()
    calls = []
    list_backends = gateway._list_backends
    gateway._list_backends = lambda: calls.append(1) or list_backends()
    await asyncio.gather(*(gateway.refresh() for _ in range(50)))
    assert len(calls) <= 2


async def test_a_canary_gets_its_share_of_calls(world: FakeFleet):
    world.add("intent", "v1", Status.LIVE)
    world.add("intent", "v2", Status.CANARY)
    gateway = world.gateway(canary_share=0.3)
    await gateway.refresh()
    firsts = [gateway.snapshot.named("intent", f"call-{i}", 0.3)[0].label for i in range(1000)]
    assert 240 < firsts.count("intent@2") < 360
    assert firsts == [gateway.snapshot.named("intent", f"call-{i}", 0.3)[0].label for i in range(1000)]
    assert not any("intent@2" in t.label for i in range(99) for t in gateway.snapshot.named("intent", f"{i}", 0.0))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("error", [None, StorageError("no blob"), RuntimeError("a bug")])
async def test_the_live_version_answers_for_a_failing_canary_and_the_failure_is_logged(
    world: FakeFleet, whole: bool, error: Exception | None
):
    world.add("intent", "v1", Status.LIVE)
    canary = world.add("intent", "v2", Status.CANARY)
    world.backends["v2"] = FailingBackend("v2", error=error)
    gateway = world.gateway()
    await gateway.refresh()
    answer = await gateway.answer(call("intent"), whole=whole)
    assert answer.target.label == "intent@1"
    assert (await text_of(answer)).startswith("v1/intent@1")
    events = world.registry.events(kind="canary_failure", version_id=canary.id)
    assert len(events) == 1
    assert events[0].details["reason"]


async def test_a_busy_canary_is_not_logged_as_a_failure(world: FakeFleet):
    world.add("intent", "v1", Status.LIVE)
    world.add("intent", "v2", Status.CANARY)
    world.backends["v2"].deaths, world.backends["v2"].error = [0], OverloadedError("full")
    gateway = world.gateway()
    await gateway.refresh()
    assert (await ask(gateway, "intent")).startswith("v1/intent@1")
    assert world.registry.events(kind="canary_failure") == []


async def test_an_invalid_request_to_a_canary_is_the_clients_error(world: FakeFleet):
    world.add("intent", "v1", Status.LIVE)
    world.add("intent", "v2", Status.CANARY)
    world.backends["v2"].deaths, world.backends["v2"].error = [0], InvalidRequestError("too long")
    gateway = world.gateway()
    await gateway.refresh()
    with pytest.raises(InvalidRequestError):
        await ask(gateway, "intent")
    assert world.registry.events(kind="canary_failure") == []


async def test_the_live_version_answers_only_if_the_client_has_seen_nothing(world: FakeFleet):
    world.add("intent", "v1", Status.LIVE)
    world.add("intent", "v2", Status.CANARY)
    world.backends["v2"].deaths, world.backends["v2"].error = [7], StorageError("disk full")
    gateway = world.gateway()
    await gateway.refresh()
    assert (await ask(gateway, "intent")).startswith("v1/intent@1"), (
        "whole: the client has seen none of the seven tokens"
    )
    world.backends["v2"].deaths = [7]
    answer = await gateway.answer(call("intent"), whole=False)
    assert answer.target.label == "intent@2"
    with pytest.raises(StorageError):
        await text_of(answer)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("deaths", [[0], [5], [5, 0, 8], [19]])
async def test_a_dead_replica_does_not_change_the_answer(world: FakeFleet, whole: bool, deaths: list[int]):
    gateway = world.gateway()
    await gateway.refresh()
    expected = await ask(gateway, "v1")
    backend = world.backends["v1"]
    backend.requests.clear()
    backend.deaths = list(deaths)
    assert await text_of(await gateway.answer(call("v1"), whole=whole)) == expected
    assert len(backend.requests) == len(deaths) + 1
    resumed = [len(request.resumed_tokens) for request in backend.requests]
    assert resumed == [sum(deaths[:i]) for i in range(len(deaths) + 1)]
    assert backend.num_open == 0


async def test_the_number_of_resubmissions_is_limited(world: FakeFleet):
    gateway = world.gateway()
    await gateway.refresh()
    world.backends["v1"].deaths = [1] * 9
    with pytest.raises(BackendDiedError):
        await ask(gateway, "v1")
    assert len(world.backends["v1"].requests) == 4


async def test_an_unexpected_engine_error_is_not_resubmitted(world: FakeFleet):
    gateway = world.gateway()
    await gateway.refresh()
    world.backends["v1"] = FailingBackend("v1", error=RuntimeError("a bug"))
    await gateway.refresh()
    with pytest.raises(BackendFailedError):
        await ask(gateway, "v1")
    assert len(world.backends["v1"].requests) == 1


async def test_each_choice_of_each_prompt_is_a_request_and_each_choice_has_its_seed(world: FakeFleet):
    gateway = world.gateway()
    await gateway.refresh()
    many = Call("call", "v1", ("a", (1, 2, 3)), SamplingParams(max_tokens=4, seed=7), num_choices=3)
    answer = await gateway.answer(many, whole=False)
    assert {index for index, _ in await parts_of(answer)} == set(range(6))
    requests = world.backends["v1"].requests
    assert [request.sampling.seed for request in requests] == [7, 8, 9] * 2
    assert [request.prompt_tokens for request in requests[::3]] == [(64,), (1, 2, 3)]
    assert len({request.id for request in requests}) == 6
    assert answer.num_prompt_tokens == 4


async def test_closing_an_answer_closes_every_stream(world: FakeFleet):
    gateway = world.gateway()
    await gateway.refresh()
    answer = await gateway.answer(call("v1", num_choices=4, max_tokens=50), whole=False)
    assert world.backends["v1"].num_open == 4
    await anext(answer.rest)
    await answer.rest.aclose()
    assert world.backends["v1"].num_open == 0
    assert asyncio.all_tasks() == {asyncio.current_task()}, "no task is left"


async def test_a_request_whose_stream_cannot_be_closed_is_not_resubmitted(world: FakeFleet):
    world.backends["v1"] = UnclosableBackend("v1")
    gateway = world.gateway()
    await gateway.refresh()
    answer = await gateway.answer(call("v1", max_tokens=50), whole=False)
    with pytest.raises(BackendDiedError, match="cannot cancel"):
        await answer.rest.aclose()
    assert len(world.backends["v1"].requests) == 1


async def test_cancelling_before_the_first_part_closes_every_stream(world: FakeFleet):
    world.backends["v1"] = SleepingBackend("v1")
    gateway = world.gateway()
    await gateway.refresh()
    asking = asyncio.create_task(ask(gateway, "v1", num_choices=3))
    await _until(lambda: world.backends["v1"].num_open == 3)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    assert world.backends["v1"].num_open == 0


async def test_an_unlimited_answer_may_fill_the_context(world: FakeFleet):
    gateway = world.gateway()
    await gateway.refresh()
    await ask(gateway, "v1", is_unlimited=True)
    assert world.backends["v1"].requests[0].sampling.max_tokens == ServingConfig().max_model_tokens - 5


async def test_an_invalid_prompt_is_the_clients_error(world: FakeFleet):
    gateway = world.gateway()
    await gateway.refresh()
    for prompt in ("", (1, 999_999), (-1,)):
        with pytest.raises(InvalidRequestError):
            await gateway.answer(Call("call", "v1", (prompt,), SamplingParams()), whole=True)


# Adapters that clients load.


async def test_loading_a_name_again_makes_a_new_live_version(world: FakeFleet, tmp_path: Path):
    gateway = world.gateway()
    await gateway.start()
    world.registry.add_adapter("mine", data="rows", metric="chrf", traffic=3.0)
    first = await gateway.load_adapter("mine", str(world.folder / "adapter"), "v1")
    assert (await ask(gateway, "mine")).startswith("v1/mine@1")
    other = make_adapter(tmp_path / "other", world.folder / "v1", rank=5, seed=9)
    second = await gateway.load_adapter("mine", str(other), None)
    assert (second.label, second.base, second.status) == ("mine@2", "v1", Status.LIVE)
    assert world.registry.version(first.id).status is Status.RETIRED
    assert (await ask(gateway, "mine")).startswith("v1/mine@2")
    assert (await ask(gateway, "mine@1")).startswith("v1/mine@1")
    assert world.backends["v1"].requests[-1].adapter.key != world.backends["v1"].requests[-2].adapter.key
    assert world.registry.adapter("mine").metric == "chrf", "the adapter keeps its settings"
    await gateway.unload_adapter("mine")
    with pytest.raises(NotFoundError):
        await ask(gateway, "mine")
    with pytest.raises(NotFoundError):
        await gateway.unload_adapter("mine")
    await gateway.stop()


async def test_an_adapter_without_a_base_gets_the_only_served_base(world: FakeFleet):
    gateway = world.gateway()
    del world.backends["v2"]
    assert (await gateway.load_adapter("mine", str(world.folder / "adapter"), None)).base == "v1"
    with pytest.raises(NotFoundError, match="v2"):
        await gateway.load_adapter("mine", str(world.folder / "adapter"), "v2")


async def test_unloading_rolls_back_the_canary(world: FakeFleet):
    world.add("intent", "v1", Status.LIVE)
    canary = world.add("intent", "v2", Status.CANARY)
    gateway = world.gateway()
    await gateway.unload_adapter("intent")
    assert world.registry.version(canary.id).status is Status.ROLLED_BACK
    assert gateway.snapshot.routes == {}


async def test_engines_release_adapters_that_no_name_leads_to(world: FakeFleet, tmp_path: Path):
    gateway = world.gateway()
    first = await gateway.load_adapter("mine", str(world.folder / "adapter"), "v1")
    alias = await gateway.load_adapter("alias", str(world.folder / "adapter"), "v1")
    assert first.content_hash == alias.content_hash
    backend = world.backends["v1"]
    other = make_adapter(tmp_path / "other", world.folder / "v1", rank=5, seed=9)
    second = await gateway.load_adapter("mine", str(other), "v1")
    assert backend.released == [], "the alias still leads to the first weights"
    await gateway.unload_adapter("alias")
    assert backend.released == [first.content_hash]
    await gateway.unload_adapter("mine")
    assert backend.released == [first.content_hash, second.content_hash]


async def test_adapters_are_listed_with_their_tiers(world: FakeFleet):
    live = world.add("intent", "v1", Status.LIVE)
    world.add("idle", "v2", Status.LIVE)
    gateway = world.gateway()
    await gateway.refresh()
    world.backends["v1"].kept = [live.content_hash] * 2  # on two replicas
    listed = {target.label: where for target, where in await residencies(gateway.snapshot)}
    assert {label: (where.tier, where.num_bytes) for label, where in listed.items()} == {
        "intent@1": (Tier.HOST, 20),
        "idle@1": (Tier.STORE, 0),
    }


async def test_the_configured_deadline_applies_to_calls_without_their_own(world: FakeFleet):
    gateway = world.gateway()
    gateway._serving = ServingConfig(first_token_deadline_s=7.0)
    await gateway.refresh()
    await ask(gateway, "v1")
    await ask(gateway, "v1", terms=Terms(first_token_deadline_s=3.0, tenant="t", cache_salt="s"))
    none, own = (request.terms for request in world.backends["v1"].requests)
    assert none == Terms(first_token_deadline_s=7.0)
    assert own == Terms(first_token_deadline_s=3.0, tenant="t", cache_salt="s")


def _rank_above_limit(folder: Path, base: Path) -> None:
    make_adapter(folder, base, rank=17)


def _for_another_base(folder: Path, base: Path) -> None:
    make_adapter(folder, make_checkpoint(folder.parent / "wide", hidden_size=72), rank=2)


def _not_finite(folder: Path, base: Path) -> None:
    tensors = load_file(make_adapter(folder, base) / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors")


def _no_weights(folder: Path, base: Path) -> None:
    (make_adapter(folder, base) / "adapter_model.safetensors").unlink()


def _pickled_weights(folder: Path, base: Path) -> None:
    _no_weights(folder, base)
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04N.")


def _cut_short(folder: Path, base: Path) -> None:
    path = make_adapter(folder, base) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _other_kind(folder: Path, base: Path) -> None:
    path = make_adapter(folder, base) / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_dora": True}))


@pytest.mark.parametrize(
    "spoil",
    [_rank_above_limit, _for_another_base, _not_finite, _no_weights, _pickled_weights, _cut_short, _other_kind],
)
async def test_unusable_files_are_rejected_and_change_nothing(world: FakeFleet, tmp_path: Path, spoil):
    spoil(tmp_path / "bad", world.folder / "v1")
    live = world.add("mine", "v1", Status.LIVE)
    gateway = world.gateway()
    await gateway.refresh()
    with pytest.raises(InvalidAdapterError):
        await gateway.load_adapter("mine", str(tmp_path / "bad"), "v1")
    assert [version.id for version in world.registry.versions()] == [live.id]
    assert (await ask(gateway, "mine")).startswith("v1/mine@1")


@pytest.mark.parametrize(
    ("name", "path", "base", "error"),
    [
        ("../mine", "adapter", "v1", InvalidRequestError),
        ("a b", "adapter", "v1", InvalidRequestError),
        ("mine@3", "adapter", "v1", InvalidRequestError),
        ("mine", "nowhere", "v1", InvalidRequestError),
        ("mine", "ftp://host/adapter", "v1", InvalidRequestError),
        ("mine", "adapter", None, InvalidRequestError),
        ("mine", "adapter", "v9", NotFoundError),
        ("v1", "adapter", "v1", ConflictError),
    ],
)
async def test_invalid_load_requests_are_rejected(
    world: FakeFleet, name: str, path: str, base: str | None, error: type
):
    folder = path if "://" in path else str(world.folder / path)
    with pytest.raises(error):
        await world.gateway().load_adapter(name, folder, base)
    assert world.registry.adapters() == []


# The readiness check.


@dataclass
class ScriptedBackend(FakeBackend):
    """Answers with a given text, in two events."""

    reply: str = ""

    async def generate(self, request: Request) -> TokenStream:
        self.requests.append(request)
        yield TokenEvent(request.id, text=self.reply[:2])
        yield TokenEvent(request.id, text=self.reply[2:], finish_reason=FinishReason.LENGTH)


def _golden(world: FakeFleet, *completions: str) -> Version:
    version = world.add("intent", "v1", Status.LIVE)
    details = {"golden": [{"prompt": f"prompt {i}", "completion": text} for i, text in enumerate(completions)]}
    return replace(version, details=details)


@pytest.mark.parametrize("said", ["right", "right and on", "rig"])
async def test_an_answer_matches_if_one_text_starts_with_the_other(world: FakeFleet, said: str):
    backend = ScriptedBackend("v1", reply=said)
    await check_golden(_golden(world, "right"), Prompter(world.folder / "v1"), backend)
    [sent] = backend.requests
    assert (sent.sampling.max_tokens, sent.sampling.temperature, sent.adapter.label) == (5, 0, "intent@1")


async def test_a_golden_prompt_may_be_the_tokens_of_a_chat(world: FakeFleet):
    version = world.add("intent", "v1", Status.LIVE)
    version = replace(version, details={"golden": [{"prompt": [5, 6, 7], "completion": "right"}]})
    backend = ScriptedBackend("v1", reply="right")
    await check_golden(version, Prompter(world.folder / "v1"), backend)
    assert [request.prompt_tokens for request in backend.requests] == [(5, 6, 7)]


@pytest.mark.parametrize(("golden", "said"), [("right", "wrong"), ("right", ""), ("", "more"), ("right", "riGht")])
async def test_a_wrong_golden_answer_is_named(world: FakeFleet, golden: str, said: str):
    version = _golden(world, said, golden)
    with pytest.raises(ReloraError, match=r"intent@1 on v1: the answer to golden prompt 1 .*prompt 1"):
        await check_golden(version, Prompter(world.folder / "v1"), ScriptedBackend("v1", reply=said))


async def test_an_engine_error_in_the_readiness_check_is_raised(world: FakeFleet):
    backend = FailingBackend("v1", error=StorageError("adapter lost"))
    with pytest.raises(StorageError, match="adapter lost"):
        await check_golden(_golden(world, "right"), Prompter(world.folder / "v1"), backend)


# Streams.


@dataclass
class SlowLoader:
    """An engine loop whose adapters take 0.05 s to load."""

    seen: list[Request] = field(default_factory=list)

    async def ensure_adapter(self, ref, folder):
        await asyncio.sleep(0.05)

    async def generate(self, request, interval_s):
        self.seen.append(request)
        yield TokenEvent(request.id, finish_reason=FinishReason.LENGTH)


async def test_resumed_requests_ignore_the_first_token_deadline(tmp_path: Path):
    loop, terms = SlowLoader(), Terms(first_token_deadline_s=0.01)
    backend = LocalBackend(loop, BlobStore(str(tmp_path / "blobs"), tmp_path / "cache"))
    new = Request("r", (1,), SamplingParams(), AdapterRef("key", "tone", 1, "blob"), terms=terms)
    with pytest.raises(OverloadedError):
        await anext(backend.generate(new))
    begun = replace(new, resumed_tokens=(2,))
    assert (await anext(backend.generate(begun))).finish_reason is FinishReason.LENGTH
    assert loop.seen == [begun]


async def test_a_merged_stream_that_is_cancelled_while_it_closes_closes_all_streams():
    backend = FakeBackend("a")
    request = Request("r", (1,), SamplingParams(max_tokens=50))
    streams = [backend.generate(request) for _ in range(3)]
    merged = merge(streams)
    await anext(merged)
    closing = asyncio.create_task(merged.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.gather(closing, return_exceptions=True)
    await _until(lambda: backend.num_open == 0)
    assert len(streams) == 3, "the test holds the streams, so the garbage collector cannot close them"


async def test_an_error_in_one_merged_stream_closes_the_others():
    failing = FakeBackend("a", deaths=[2], error=StorageError("disk"))
    fine = FakeBackend("b")
    request = Request("r", (1,), SamplingParams(max_tokens=50))
    with pytest.raises(StorageError):
        _ = [part async for part in merge([fine.generate(request), failing.generate(request)])]
    assert fine.num_open == 0


class FailingBackend(FakeBackend):
    """Fails every request: with an event that carries `error`, or by raising BackendDiedError if it is None."""

    async def generate(self, request: Request) -> TokenStream:
        self.requests.append(request)
        if self.error is None:
            raise BackendDiedError("gone")
        yield TokenEvent(request.id, finish_reason=FinishReason.ABORT, error=self.error)


class UnclosableBackend(FakeBackend):
    """Fails when a stream is closed, as HandleBackend does if Ray cannot cancel the call."""

    async def generate(self, request: Request) -> TokenStream:
        try:
            async for event in super().generate(request):
                yield event
        finally:
            raise BackendDiedError("cannot cancel")


class SleepingBackend(FakeBackend):
    """Accepts requests and never answers."""

    async def generate(self, request: Request) -> TokenStream:
        self.num_open += 1
        try:
            await asyncio.sleep(3600)
            yield TokenEvent(request.id)
        finally:
            self.num_open -= 1


def _raise_storage_error():
    raise StorageError("out of reach")


async def _until(condition, timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)
