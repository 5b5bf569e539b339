"""An upgrade of eight adapters from one server to another under load: no request fails, no answer is another version's.

Both bases run on servers that are not ours: on vLLM with `--vllm`, else on our engine with vLLM's protocol.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from cluster.config.engines import EngineSpec
from cluster.config.settings import BaseSpec, Fleet, RolloutConfig, ServingConfig
from cluster.errors import OverloadedError
from cluster.fleet import open_blobs, open_registry
from cluster.registry.registry import Registry, Status, Version
from cluster.registry.rollout import Rollout
from cluster.storage.checkpoints import open_checkpoint
from demo.load import SteadyLoad
from demo.verify import terms, wrong_answers
from serving.errors import BackendDiedError
from serving.gateway.gateway import Gateway
from serving.gateway.golden import probe_remotely
from serving.http.api import create_app
from serving.remote.pool import RemoteEngines
from tests.worlds.engines import EngineProcess, HuggingFace, make_base
from tests.worlds.servers import serve
from tests.worlds.serving import make_adapter

NAMES = tuple(f"task{index}" for index in range(8))
PROMPTS = ("hello there", "Where is my card?", "2 + 2 =", "book a table for two")
MAX_TOKENS = 16
RATE = 8.0
TIMEOUT_S = 300.0


@dataclass
class Upgrade:
    """A fleet whose eight adapters are live on v1 and have a candidate on v2, and the servers of both bases."""

    fleet: Fleet
    registry: Registry
    servers: dict[str, EngineProcess]

    def expected(self, version: Version, prompts: Sequence[str]) -> list[str]:
        assert version.blob_key is not None
        folder = open_blobs(self.fleet).fetch_folder(version.blob_key)
        return HuggingFace(self.fleet.base(version.base).path).texts(folder, prompts, MAX_TOKENS)

    def probe(self, version: Version) -> None:
        try:
            asyncio.run(probe_remotely(version, self.fleet))
        except BackendDiedError as error:
            raise OverloadedError(str(error)) from error

    def roll_out(self, meanwhile: Callable[[int], None] = lambda num_live: None) -> float:
        """Move all candidates; return the seconds. `meanwhile` gets the number of adapters that are live on v2."""
        started_at = time.monotonic()
        mover = Rollout(self.registry, "v2", self.probe, self.fleet.rollout)
        while mover.is_busy():
            assert time.monotonic() - started_at < TIMEOUT_S, "the rollout takes too long"
            mover.tick()
            meanwhile(sum(route.live.base == "v2" for route in self.registry.routes().values()))
            time.sleep(self.fleet.rollout.poll_s)
        return time.monotonic() - started_at


@contextmanager
def gateway_of(upgrade: Upgrade) -> Iterator[str]:
    fleet = upgrade.fleet
    blobs = open_blobs(fleet)
    engines = RemoteEngines(fleet, blobs)
    gateway = Gateway(upgrade.registry, blobs, engines.running, fleet.serving, fleet.rollout)
    with serve(create_app(gateway)) as url:
        yield f"{url}/v1"


@pytest.fixture(params=["ours", "vllm"])
def upgrade(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Upgrade]:
    python = request.getfixturevalue("vllm") if request.param == "vllm" else None
    bases = {name: make_base(tmp_path / name, seed) for seed, name in enumerate(("v1", "v2"))}
    more = ("--max-loras", "4", "--max-cpu-loras", "8")  # fewer than there are: they are evicted and come back
    servers = {name: EngineProcess(base, tmp_path / f"{name}.log", python, more) for name, base in bases.items()}
    for server in servers.values():
        server.start()
    fleet = Fleet(
        name="f",
        folder=tmp_path,
        registry=f"sqlite:///{tmp_path}/registry.db",
        blobs=str(tmp_path / "blobs"),
        bases=tuple(BaseSpec(name=name, path=base) for name, base in bases.items()),
        engines=tuple(
            EngineSpec(base=name, url=server.url, adapters=str(tmp_path / "shared")) for name, server in servers.items()
        ),
        serving=ServingConfig(max_model_tokens=512, max_rank=16),
        rollout=RolloutConfig(canary_s=2.0),
    )
    registry = open_registry(fleet)
    register(fleet, registry)
    for server in servers.values():
        server.wait()
    yield Upgrade(fleet, registry, servers)
    registry.close()
    for server in servers.values():
        server.stop()


def register(fleet: Fleet, registry: Registry) -> None:
    """Register each adapter, live on v1 and waiting on v2, with golden answers that transformers and PEFT give."""
    blobs = open_blobs(fleet)
    for spec in fleet.bases:
        registry.add_base(spec.name, str(spec.path), open_checkpoint(spec.path).fingerprint())
    for index, name in enumerate(NAMES):
        registry.add_adapter(name)
        for number, base in enumerate(("v1", "v2")):
            path = fleet.base(base).path
            settings = {"rank": 2 + index, "rslora": index % 2 == 1, "seed": 10 * index + number}
            folder = make_adapter(fleet.folder / f"{name}-{base}", path, **settings)
            texts = HuggingFace(path).texts(folder, PROMPTS[:2], MAX_TOKENS)
            golden = [{"prompt": p, "completion": text} for p, text in zip(PROMPTS[:2], texts, strict=True)]
            status = Status.LIVE if base == "v1" else Status.CANDIDATE
            key = blobs.put_folder(folder)
            registry.add_version(name, base, status, key, key, details={"golden": golden})


def check(upgrade: Upgrade, load: SteadyLoad, seconds: float) -> None:
    """Assert that all requests were answered, each by a version in charge, with that version's text."""
    answers = load.answers
    failures = [answer.error for answer in answers if answer.error]
    assert failures == []
    assert len(answers) == load.num_sent > 20
    wrong = wrong_answers(answers, terms(upgrade.registry), upgrade.expected, 2 * upgrade.fleet.rollout.poll_s)
    assert wrong == []
    statuses = [upgrade.registry.find(name, 2).status for name in NAMES]
    assert statuses == [Status.LIVE] * len(NAMES), upgrade.registry.versions(base="v2")
    assert {answer.base for answer in answers} == {"v1", "v2"}
    latencies_ms = [1e3 * answer.latency_s for answer in answers]
    print(
        f"{len(NAMES)} adapters in {seconds:.1f} s, {load.num_sent} requests, 0 failed, 0 wrong, "
        f"{len({answer.text for answer in answers})} distinct answers, "
        f"p50 {np.percentile(latencies_ms, 50):.0f} ms, p99 {np.percentile(latencies_ms, 99):.0f} ms"
    )


def test_eight_adapters_move_under_load_without_a_wrong_answer(upgrade: Upgrade):
    with gateway_of(upgrade) as url:
        load = SteadyLoad(url, dict.fromkeys(NAMES, PROMPTS), RATE, MAX_TOKENS).start()
        time.sleep(3.0)
        seconds = upgrade.roll_out()
        time.sleep(3.0)
        load.stop()
    check(upgrade, load, seconds)
