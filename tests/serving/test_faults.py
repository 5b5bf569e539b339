"""Tests faults of production over HTTP with a real engine: each may affect only the requests that it concerns."""

import errno
import shutil
import socket
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.config.settings import ServingConfig
from cluster.errors import OverloadedError
from cluster.storage.blobs import BlobStore
from serving.engine.engine import Engine
from serving.engine.request import Request, SamplingParams
from tests.worlds.servers import AdapterServer, serve_bases, wait_until
from tests.worlds.serving import make_adapter, make_checkpoint

LOAD_TIMEOUT_S = 0.5
CONFIG = ServingConfig(
    memory_bytes=2 * 2**20,
    max_model_tokens=500,
    max_rank=16,
    max_sequences=16,
    max_queue_per_tenant=40,
    adapter_load_timeout_s=LOAD_TIMEOUT_S,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("files") / "base")


@pytest.fixture
def world(base: Path, tmp_path: Path) -> Iterator[AdapterServer]:
    with serve_bases(base.parent, tmp_path, CONFIG, ("base",)) as server:
        yield AdapterServer(server, tmp_path, base)
        assert server.loops["base"].is_healthy
        wait_until(lambda: server.num_running("base") == 0)
        server.loops["base"]._engine.check_integrity()


# Adapters that are loaded, replaced and unloaded.


def test_new_weights_under_the_same_name(world: AdapterServer) -> None:
    """Running requests finish with the old weights. Old and new requests never share KV."""
    old, new = (world.make(name, seed=seed) for seed, name in enumerate(("old", "new"), start=3))
    world.load("mine", old)
    expected_old = world.text("mine", 200)
    with ThreadPoolExecutor() as pool:
        under_way = [pool.submit(world.text, "mine@1", 200), pool.submit(world.text, "mine", 200)]
        wait_until(lambda: world.stats()["running"] > 0)
        assert world.load("mine", new).json()["model"] == "mine@2"
        after = world.text("mine", 200)
        assert [future.result() for future in under_way] == [expected_old] * 2
    assert after == world.text("mine", 200, cache=False) != expected_old
    world.load("alias", old)
    assert world.text("alias", 200) == world.text("mine@1", 200, cache_salt="mine") == expected_old


def test_unloading_lets_requests_finish_and_then_frees_memory(world: AdapterServer) -> None:
    expected_base = world.text("base")
    world.load("mine", world.make("mine"))
    expected = world.text("mine", 300)
    assert world.where()["mine@1"]["tier"] == "device"
    with ThreadPoolExecutor() as pool:
        under_way = [pool.submit(world.text, "mine", 300) for _ in range(3)]
        wait_until(lambda: world.stats()["running"] == 3)
        assert world.server.post("/v1/unload_lora_adapter", lora_name="mine").status_code == 200
        assert world.stats()["adapters_on_host"] == 1, "requests still use it"
        assert world.ask("mine").status_code == 404
        assert [future.result() for future in under_way] == [expected] * 3
    wait_until(lambda: world.stats()["adapters_on_host"] == 0)
    stats = world.stats()
    assert (stats["host_bytes"], stats["adapters_resident"], stats["pages_adapters"]) == (0, 0, 0)
    assert world.where() == {}
    assert world.text("mine@1", 300) == expected, "a version asked for by number is loaded again"
    assert world.text("base") == expected_base


def test_more_adapters_than_fit_in_memory(base: Path, tmp_path: Path) -> None:
    small = ServingConfig(memory_bytes=2**18, max_model_tokens=200, max_rank=16, host_cache_bytes=2**18)
    with serve_bases(base.parent, tmp_path, small, ("base",)) as server:
        world = AdapterServer(server, tmp_path, base)
        names = [f"a{i}" for i in range(10)]
        for seed, name in enumerate(names):
            assert world.load(name, world.make(name, seed=seed, rank=8)).status_code == 200
        expected = {name: world.text(name) for name in names}
        assert len(set(expected.values())) == len(names)
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(world.text, names * 3)) == [expected[name] for name in names * 3]
        assert {one["tier"] for one in world.where().values()} >= {"device", "disk"}
        stats = world.stats()
        assert stats["evictions"] > 0
        assert (stats["adapters_on_host"] < 10, stats["host_bytes"] <= small.host_cache_bytes) == (True, True)
        server.loops["base"]._engine.check_integrity()


def spoil(world: AdapterServer, how: str) -> Path:
    path = world.make("bad", rank=17 if how == "rank above the limit" else 3)
    weights = path / "adapter_model.safetensors"
    if how == "corrupt":
        weights.write_bytes(b"\xff" * weights.stat().st_size)
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    if how == "empty":
        weights.write_bytes(b"")
    if how == "of another base":
        return make_adapter(world.folder / "other", make_checkpoint(world.folder / "wide", hidden_size=72))
    tensors = load_file(weights) if how in ("without its B", "of unknown modules") else {}
    if how == "without its B":
        del tensors[next(name for name in tensors if "lora_B" in name)]
    if how == "of unknown modules":
        tensors = {name.replace("layers.1", "layers.7"): tensor for name, tensor in tensors.items()}
    if tensors:
        save_file(tensors, weights)
    return path


FAULTS = ["corrupt", "truncated", "empty", "of another base", "without its B", "of unknown modules"]


@pytest.mark.parametrize("how", [*FAULTS, "rank above the limit"])
def test_unusable_files_are_rejected_under_load(world: AdapterServer, how: str) -> None:
    world.load("mine", world.make("mine"))
    expected = world.text("mine", 200)
    with ThreadPoolExecutor() as pool:
        under_way = pool.submit(world.text, "mine", 200)
        refused = world.load("mine", spoil(world, how))
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_adapter")
        assert under_way.result() == expected
    assert world.text("mine", 200) == expected
    assert world.stats()["adapters_on_host"] == 1


@pytest.mark.parametrize("name", ["../mine", "..", "a/../../b", "/etc/passwd", "a\\b", "a\x00b", "%2e%2e%2fmine", ""])
def test_a_name_cannot_escape_its_folder(world: AdapterServer, name: str) -> None:
    before = set(world.folder.parent.rglob("*"))
    path = world.make("mine")
    assert world.load(name, path).status_code == 400
    assert world.ask(name).status_code in (400, 404)
    new = set(world.folder.parent.rglob("*")) - before
    assert [one for one in new if "made" not in one.parts] == []


def test_an_adapter_deleted_on_disk_after_registration(world: AdapterServer) -> None:
    world.load("used", world.make("used"))
    expected = world.text("used")
    world.register("lost", world.make("lost", seed=5))
    for folder in ("blobs", "cache"):
        shutil.rmtree(world.folder / folder)
    wait_until(lambda: world.ask("lost").status_code != 404)
    lost = world.ask("lost")
    assert (lost.status_code, lost.json()["error"]["code"]) == (503, "storage_unavailable")
    assert world.where()["lost@1"]["tier"] == "store"
    assert world.text("used") == expected, "the engine needs no disk for adapters it has"


def test_concurrent_loads_under_one_name(world: AdapterServer) -> None:
    paths = [world.make(f"w{seed}", seed=seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda path: world.load("mine", path), paths))
    assert {answer.status_code for answer in answers} <= {200, 409}
    loaded = [answer.json()["model"] for answer in answers if answer.status_code == 200]
    assert loaded
    assert len(set(loaded)) == len(loaded)
    routes = world.server.registry.routes()
    assert routes["mine"].live.label in loaded
    assert world.text("mine") == world.text(routes["mine"].live.label, cache=False)
    assert len({world.text(version) for version in loaded}) == len(loaded)


# Storage.


def test_a_full_disk_under_the_blob_cache(world: AdapterServer, monkeypatch: pytest.MonkeyPatch) -> None:
    key = world.register("mine", world.make("mine"))
    cache = world.folder / "cache"

    def no_space(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "makefile", no_space)
        wait_until(lambda: world.ask("mine").status_code != 404)
        refused = world.ask("mine")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "storage_unavailable")
        assert "No space left" in refused.json()["error"]["message"]
        assert world.text("base")
    assert not list(cache.glob("*")), "no partial adapter is left"
    assert world.text("mine")
    assert [one.name for one in cache.glob("[!.]*")] == [key]


def test_a_hanging_store_does_not_delay_other_adapters(world: AdapterServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """More adapters hang than there are loader threads, and another adapter is still served."""
    names = [f"slow{i}" for i in range(6)]
    keys = [world.register(name, world.make(name, seed=10 + i)) for i, name in enumerate(names)]
    world.load("quick", world.make("quick", seed=2))
    world.server.post("/v1/unload_lora_adapter", lora_name="quick")
    fetch, release = BlobStore.fetch_folder, threading.Event()

    def hanging(self: BlobStore, key: str) -> Path:
        if key in keys and not release.is_set():
            release.wait(20)
        return fetch(self, key)

    monkeypatch.setattr(BlobStore, "fetch_folder", hanging)
    wait_until(lambda: len(world.where()) == 6)
    started_at = time.monotonic()
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(world.ask, names))
    assert {answer.status_code for answer in answers} == {503}
    assert time.monotonic() - started_at < 6 * LOAD_TIMEOUT_S
    assert world.text("quick@1")
    release.set()
    assert all(world.text(name) for name in names)


# Clients and overload.


def test_a_client_that_stops_reading_does_not_affect_others(world: AdapterServer) -> None:
    """Its max_tokens bound what waits for it, and the other requests continue."""
    body = (
        '{"model": "base", "prompt": "x", "max_tokens": 490, "ignore_eos": true, "stream": true, "n": 16, '
        '"logprobs": 20, "temperature": 1}'
    )
    host, port = world.server.url.removeprefix("http://").split(":")
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((host, int(port)))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}"
        client.sendall(f"{head}\r\nContent-Type: application/json\r\n\r\n{body}".encode())
        assert client.recv(15).startswith(b"HTTP/1.1 200")
        assert [world.text("base", 30) for _ in range(3)] == [world.text("base", 30, cache=False)] * 3
        wait_until(lambda: world.stats()["running"] == 0)
    wait_until(lambda: world.server.num_running("base") == 0)
    assert world.text("base", 30)


def test_a_request_that_needs_more_than_all_memory_is_rejected(base: Path, tmp_path: Path) -> None:
    tiny = ServingConfig(memory_bytes=60 * 2**10, max_model_tokens=500, max_rank=16)
    with serve_bases(base.parent, tmp_path, tiny, ("base",)) as server:
        world = AdapterServer(server, tmp_path, base)
        refused = world.ask("base", num_tokens=450)
        assert refused.status_code == 400
        assert "serving.memory_bytes" in refused.json()["error"]["message"]
        assert world.text("base", 20)


def test_a_request_that_cannot_meet_its_deadline_is_refused_in_time(world: AdapterServer) -> None:
    with ThreadPoolExecutor(40) as pool:
        busy = [pool.submit(world.ask, "base", 450, prompt=f"{i}") for i in range(32)]
        wait_until(lambda: world.stats()["waiting"] > 0)
        started_at = time.monotonic()
        refused = world.ask("base", 5, first_token_deadline_s=0.05, priority=50)
        assert time.monotonic() - started_at < 2
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        assert world.ask("base", 5, first_token_deadline_s=60.0, priority=-1).status_code == 200
        assert {future.result().status_code for future in busy} == {200}
    assert world.stats()["overdue"] == 1


def test_one_tenant_cannot_fill_the_queue(world: AdapterServer) -> None:
    url, body = f"{world.server.url}/v1/completions", {"model": "base", "prompt": "x", "max_tokens": 300, "n": 100}
    greedy = httpx.post(url, json=body, headers={"authorization": "Bearer greedy"}, timeout=60)
    assert (greedy.status_code, greedy.json()["error"]["type"]) == (429, "rate_limit_error")
    modest = httpx.post(url, json={**body, "n": 8}, headers={"authorization": "Bearer modest"}, timeout=60)
    assert modest.status_code == 200


def test_ten_thousand_queued_requests(base: Path) -> None:
    config = ServingConfig(memory_bytes=2 * 2**20, max_queue=10_000, max_sequences=256, max_batch_tokens=1024)
    engine = Engine.open(base, config)
    sampling = SamplingParams(temperature=0.0, max_tokens=1)
    requests = [Request(str(i), (i % 256, 1, 2), sampling) for i in range(10_001)]
    for request in requests[:-1]:
        engine.submit(request)
    with pytest.raises(OverloadedError):
        engine.submit(requests[-1])
    for request in requests[:10_000:2]:
        engine.abort(request.id)
    started_at, ended = time.process_time(), []
    while engine.has_work:
        ended += [event.request_id for event in engine.step()]
    assert len(ended) == len(set(ended)) == 5_000
    assert time.process_time() - started_at < 20
    engine.check_integrity()


# Weights that give infinite logits.


def test_an_adapter_with_huge_weights_fails_only_its_own_requests(world: AdapterServer) -> None:
    world.load("sound", world.make("sound"))
    expected = {name: world.text(name, 100) for name in ("sound", "base")}
    path = world.make("huge", seed=9)
    tensors = load_file(path / "adapter_model.safetensors")
    save_file({name: tensor * 1e18 for name, tensor in tensors.items()}, path / "adapter_model.safetensors")
    assert world.load("huge", path).status_code == 400, "loading generates a token, which fails"
    # The failed load leaves nothing behind; the gauges show it after the next step.
    wait_until(lambda: world.stats()["adapters_on_host"] == 1)
    world.register("huge", path)
    wait_until(lambda: world.ask("huge").status_code != 404)
    with ThreadPoolExecutor(12) as pool:
        answers = {name: [pool.submit(world.ask, name, 100) for _ in range(4)] for name in ("huge", "sound", "base")}
    assert {future.result().status_code for future in answers["huge"]} == {500}
    for name in ("sound", "base"):
        assert {future.result().json()["choices"][0]["text"] for future in answers[name]} == {expected[name]}
    assert {name: world.text(name, 100) for name in expected} == expected
    assert torch.isfinite(next(iter(tensors.values()))).all()
