"""A rollout without our gateway: servers get the live adapters under their plain names, and lose the others."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import pytest

import upgrade
from cluster.config.engines import EngineSpec
from cluster.config.settings import BaseSpec, Fleet, RolloutConfig, ServingConfig
from cluster.errors import ConfigError
from cluster.fleet import open_blobs, open_registry
from cluster.registry.registry import Registry, Status
from cluster.registry.rollout import Rollout
from cluster.storage.blobs import BlobStore
from serving.remote.sync import EngineSync
from tests.worlds.engines import EngineProcess, HuggingFace, make_base
from tests.worlds.serving import make_adapter

PROMPTS = ("hello there", "Where is my card?")
MAX_TOKENS = 12
NAMES = ("org/intent", "topic")


@dataclass
class World:
    fleet: Fleet
    registry: Registry
    servers: dict[str, EngineProcess]
    said: list[str] = field(default_factory=list)
    now: float = field(default_factory=time.time)

    @property
    def sync(self) -> EngineSync:
        return EngineSync(self.fleet, self.registry, open_blobs(self.fleet), self.said.append, lambda: self.now)

    def adapters(self, base: str) -> set[str]:
        return {name for name, model in self.servers[base].models().items() if model["parent"]}

    def texts(self, base: str, model: str) -> list[str]:
        """What clients get who ask the server itself."""
        url = f"{self.servers[base].url}/v1/completions"
        texts = []
        for prompt in PROMPTS:
            body = {"model": model, "prompt": [256, *prompt.encode()], "max_tokens": MAX_TOKENS, "temperature": 0}
            lines = httpx.post(url, json={**body, "stream": True, "stop_token_ids": [257]}, timeout=60).text
            texts.append(lines)
        return texts

    def add(self, name: str, base: str, status: Status, seed: int) -> None:
        path = self.fleet.base(base).path
        folder = make_adapter(self.fleet.folder / f"made{seed}", path, rank=2 + seed, seed=seed)
        texts = HuggingFace(path).texts(folder, PROMPTS, MAX_TOKENS)
        golden = [{"prompt": p, "completion": text} for p, text in zip(PROMPTS, texts, strict=True)]
        key = open_blobs(self.fleet).put_folder(folder)
        self.registry.add_version(name, base, status, key, key, details={"golden": golden})


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, EngineProcess]]:
    folder = tmp_path_factory.mktemp("servers")
    bases = {name: make_base(folder / name, seed) for seed, name in enumerate(("v1", "v2"))}
    servers = {name: EngineProcess(base, folder / f"{name}.log") for name, base in bases.items()}
    for server in servers.values():
        server.start()
    for server in servers.values():
        server.wait()
    yield servers
    for server in servers.values():
        server.stop()


@pytest.fixture
def world(servers: dict[str, EngineProcess], tmp_path: Path) -> Iterator[World]:
    shared = str(tmp_path / "shared")
    fleet = Fleet(
        name="f",
        folder=tmp_path,
        registry=f"sqlite:///{tmp_path}/registry.db",
        blobs=str(tmp_path / "blobs"),
        bases=tuple(BaseSpec(name=name, path=server.folder) for name, server in servers.items()),
        engines=tuple(EngineSpec(base=name, url=one.url, adapters=shared) for name, one in servers.items()),
        serving=ServingConfig(max_model_tokens=512, max_rank=16),
        rollout=RolloutConfig(traffic="engines", poll_s=0.05, drain_s=0.0),
    )
    registry = open_registry(fleet)
    world = World(fleet, registry, servers)
    for name, server in servers.items():
        registry.add_base(name, str(server.folder), name)
    for seed, name in enumerate(NAMES):
        registry.add_adapter(name)
        world.add(name, "v1", Status.LIVE, seed)
    yield world
    for base in servers:
        for name in world.adapters(base):
            httpx.post(f"{servers[base].url}/v1/unload_lora_adapter", json={"lora_name": name}, timeout=30)
    registry.close()


def test_live_adapters_are_loaded_where_their_base_runs(world: World):
    assert world.sync.run()
    assert world.adapters("v1") == {"org+intent", "topic"}
    assert world.adapters("v2") == set()
    assert len(world.said) == 2
    assert world.sync.run()
    assert len(world.said) == 2, "nothing was left to do"


def test_a_rollout_moves_them_without_a_gateway_and_without_ray(world: World):
    assert world.sync.run()
    for seed, name in enumerate(NAMES, start=2):
        world.add(name, "v2", Status.CANDIDATE, seed)
    result = upgrade.roll_out(world.fleet, world.registry, None, world.said.append)
    assert str(result) == "2 live"
    assert (world.adapters("v1"), world.adapters("v2")) == (set(), {"org+intent", "topic"})
    assert world.texts("v2", "topic") != world.texts("v2", "org+intent")
    order = [line.split(":")[0] for line in world.said if "loaded at" in line]
    assert order.index("topic@2") < len(order) - 1 - order[::-1].index("topic"), "loaded before it is unloaded"


def test_a_live_adapter_is_loaded_while_others_are_still_moving(world: World, monkeypatch: pytest.MonkeyPatch):
    rounds = iter(range(50))  # the rollout would be busy for ever if the servers did not follow it

    class Busy(Rollout):
        def is_busy(self) -> bool:
            return (next(rounds) < 49 and "topic" not in world.adapters("v2")) or super().is_busy()

    monkeypatch.setattr(upgrade, "Rollout", Busy)
    world.add("topic", "v2", Status.CANDIDATE, 7)
    assert str(upgrade.roll_out(world.fleet, world.registry, None, world.said.append)) == "1 live"
    assert next(rounds) < 49, "topic was loaded while the rollout was busy"


def test_an_old_server_keeps_an_adapter_while_its_clients_move(world: World):
    assert world.sync.run()
    world.fleet = replace(world.fleet, rollout=replace(world.fleet.rollout, drain_s=600.0))
    world.add("topic", "v2", Status.RETIRED, 5)
    world.registry.promote(world.registry.find("topic", 2).id)
    assert not world.sync.run()
    assert "topic" in world.adapters("v1") & world.adapters("v2")
    world.now += 1000
    assert world.sync.run()
    assert world.adapters("v1") == {"org+intent"}
    assert world.adapters("v2") == {"topic"}


def test_a_new_version_on_the_same_base_replaces_the_files_of_its_name(world: World):
    assert world.sync.run()
    before = world.servers["v1"].models()["topic"]["root"]
    world.add("topic", "v1", Status.RETIRED, 7)
    world.registry.promote(world.registry.find("topic", 2).id)
    assert world.sync.run()
    after = world.servers["v1"].models()["topic"]["root"]
    assert Path(after).name.startswith("topic.2.")
    assert before != after


def test_a_restarted_server_is_mended_and_one_that_is_down_is_reported(world: World):
    assert world.sync.run()
    world.fleet = replace(world.fleet, engines=tuple(replace(spec, connect_retries=0) for spec in world.fleet.engines))
    world.servers["v1"].kill()
    assert not world.sync.run()
    assert "not done yet: The vllm server at" in world.said[-1]
    world.servers["v1"].start()
    world.servers["v1"].wait()
    assert world.adapters("v1") == set()
    assert upgrade.roll_out(world.fleet, world.registry, None, world.said.append).statuses == ()
    assert world.adapters("v1") == {"org+intent", "topic"}


def test_a_server_without_routes_is_refused(world: World, tmp_path: Path):
    engines: Sequence[EngineSpec] = [replace(spec, kind="openai") for spec in world.fleet.engines]
    with pytest.raises(ConfigError, match=r"rollout\.traffic: .* 'openai'"):
        EngineSync(
            replace(world.fleet, engines=tuple(engines)),
            world.registry,
            BlobStore(str(tmp_path / "b"), tmp_path / "c"),
            print,
        )
