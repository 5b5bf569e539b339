"""Tests serving on a local Ray cluster: adding and removing bases, probing versions, killing a replica."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import ray
from ray import serve

from cluster.config.fleet_file import load_fleet
from cluster.config.settings import BaseSpec, Fleet
from cluster.errors import ConflictError, NotFoundError, OverloadedError, ReloraError
from cluster.fleet import open_blobs, open_registry, register_adapters, register_base
from cluster.names import flat_name
from cluster.registry.registry import Registry, Status, Version
from cluster.storage.blobs import content_hash
from serving import on_ray
from tests.worlds.servers import wait_until
from tests.worlds.serving import make_adapter, make_checkpoint

pytestmark = pytest.mark.ray

NEXT = "org/v2:next"  # Serve names log files after its applications, where such a name would not do

FLEET = """
name = "test"

[[bases]]
name = "v1"
path = "v1"

[[bases]]
name = "org/v2:next"
path = "v2"

[[adapters]]
name = "intent"
path = "intent"
base = "v1"
data = "rows"

[serving]
port = {port}
memory_bytes = 16_777_216
max_model_tokens = 1500
min_replicas = 2
max_replicas = 2
cpus_per_replica = 0.5

[rollout]
poll_s = 0.2
"""


@dataclass
class Served:
    fleet: Fleet
    registry: Registry
    url: str

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def text(self, model: str, prompt: str = "hello", max_tokens: int = 12) -> str:
        done = self.client.completions.create(model=model, prompt=prompt, max_tokens=max_tokens, temperature=0)
        return done.choices[0].text


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Serve v1 with two replicas and one adapter. At the end, none of the processes may be left."""
    folder = tmp_path_factory.mktemp("fleet")
    fleet = _make_fleet(folder)
    registry = open_registry(fleet)
    register_adapters(fleet, registry, open_blobs(fleet))
    others = set(psutil.Process().children(recursive=True))
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    try:
        with pytest.raises(NotFoundError, match="relora serve"):
            on_ray.check_gateway(fleet)
        on_ray.deploy(fleet, ["v1"])
        on_ray.check_gateway(fleet)
        yield Served(fleet, registry, f"http://127.0.0.1:{fleet.serving.port}")
        serve.shutdown()
    finally:
        started = set(psutil.Process().children(recursive=True)) - others
        ray.shutdown()
        registry.close()
    _, left = psutil.wait_procs(started, timeout=20)
    assert left == []


def test_a_base_and_its_adapter_answer(served: Served):
    assert httpx.get(f"{served.url}/health").status_code == 200
    assert {model.id for model in served.client.models.list()} == {"v1", "intent"}
    chunks = list(
        served.client.completions.create(model="intent", prompt="hello", max_tokens=12, temperature=0, stream=True)
    )
    assert {chunk.model for chunk in chunks} == {"intent@1"}
    assert "".join(chunk.choices[0].text for chunk in chunks) == served.text("intent") != served.text("v1")
    metrics = httpx.get(f"{served.url}/metrics").text
    assert 'relora_engine{base="v1",gauge="tokens_generated"}' in metrics


def test_engine_errors_keep_their_type(served: Served):
    with pytest.raises(openai.BadRequestError, match="tokens"):
        served.text("v1", prompt="x" * 1501)
    with pytest.raises(openai.NotFoundError):
        served.text(NEXT)


@pytest.mark.parametrize("stream", [True, False])
def test_disconnecting_aborts_the_request_in_the_engine(served: Served, stream: bool):
    body = {"model": "intent", "prompt": "x", "max_tokens": 1400, "ignore_eos": True, "n": 8, "stream": stream}
    num_tokens_before = _gauge(served, "v1", "tokens_generated")
    with httpx.Client(timeout=30) as client:
        if stream:
            with client.stream("POST", f"{served.url}/v1/completions", json=body) as response:
                lines = response.iter_lines()
                next(lines)  # of one choice; the others may not have reached a replica yet
                wait_until(lambda: _gauge(served, "v1", "running") == 8)
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(f"{served.url}/v1/completions", json=body, timeout=0.5)
    wait_until(lambda: _gauge(served, "v1", "running") == 0)
    assert _gauge(served, "v1", "tokens_generated") - num_tokens_before < 8 * 1400, "the answers were cut short"


def test_another_fleet_cannot_replace_the_one_that_is_served(served: Served, tmp_path: Path):
    other = replace(served.fleet, registry=f"sqlite:///{tmp_path}/other.db")
    for attempt in (lambda: on_ray.deploy(other, ["v1"]), lambda: on_ray.check_gateway(other)):
        with pytest.raises(ConflictError, match=r"registry\.db at 127\.0\.0\.1"):
            attempt()
    elsewhere = replace(served.fleet, serving=replace(served.fleet.serving, port=served.fleet.serving.port + 1))
    with pytest.raises(ConflictError, match="already"):
        on_ray.deploy(elsewhere, ["v1"])
    on_ray.check_gateway(elsewhere)
    assert served.text("intent") != served.text("v1")


def test_a_base_that_cannot_start_raises_one_error(served: Served, tmp_path: Path):
    broken = replace(served.fleet, bases=(BaseSpec(name="v9", path=tmp_path / "nothing"),))
    with pytest.raises(ReloraError, match="could not start the engine of v9"):
        on_ray.deploy_base(broken, "v9")
    assert served.text("v1")  # the other base is still served
    serve.delete(f"{on_ray.ENGINE_PREFIX}v9")


def test_a_second_base_is_added_and_its_versions_are_probed(served: Served):
    register_base(served.fleet, served.registry, NEXT)
    on_ray.deploy_base(served.fleet, NEXT)
    assert httpx.get(f"{served.url}/v1/models/{NEXT}").status_code == 200
    assert served.text(NEXT) != served.text("v1")
    text = served.text(_candidate(served, []).label)
    right = _candidate(served, [{"prompt": "hello", "completion": text}])
    on_ray.probe(served.fleet, right)
    wrong = _candidate(served, [{"prompt": "hello", "completion": text}, {"prompt": "hello", "completion": "Never."}])
    with pytest.raises(ReloraError, match=r"golden prompt 1 .*Never"):
        on_ray.probe(served.fleet, wrong)


def test_a_killed_replica_changes_no_answer(served: Served):
    prompts = [f"tell me story {i}" for i in range(6)]
    expected = [_stream(served, prompt) for prompt in prompts]
    answers: dict[str, str] = {}
    threads = [threading.Thread(target=lambda p=p: answers.update({p: _stream(served, p)})) for p in prompts]
    for thread in threads:
        thread.start()
    wait_until(lambda: _gauge(served, "v1", "running") == 6, timeout_s=10)
    first, second = _replica_pids("v1")
    os.kill(first, signal.SIGKILL)
    for thread in threads:
        thread.join()
    assert [answers.get(prompt) for prompt in prompts] == expected
    assert _gauge(served, "v1", "resubmissions") >= 1
    wait_until(lambda: len(set(_replica_pids("v1")) - {first}) == 2, timeout_s=30)
    assert second in _replica_pids("v1")


def test_a_base_is_removed(served: Served):
    serve.delete(f"{on_ray.ENGINE_PREFIX}{flat_name(NEXT)}")
    wait_until(lambda: httpx.get(f"{served.url}/v1/models/{NEXT}").status_code == 404)  # when the gateway polls
    with pytest.raises(openai.NotFoundError):
        served.text(NEXT)
    assert served.text("v1")
    with pytest.raises((OverloadedError, NotFoundError)):
        on_ray.probe(served.fleet, _candidate(served, [{"prompt": "a", "completion": "b"}]))


def _make_fleet(folder: Path) -> Fleet:
    for seed, name in enumerate(("v1", "v2")):
        make_checkpoint(folder / name, seed=seed, max_position_embeddings=1500)
    make_adapter(folder / "intent", folder / "v1", rank=4)
    make_adapter(folder / "intent-v2", folder / "v2", rank=4, seed=1)
    (folder / "rows").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "fleet.toml").write_text(FLEET.format(port=port))
    return load_fleet(folder / "fleet.toml")


def _candidate(served: Served, golden: list[dict[str, str]]) -> Version:
    files = served.fleet.folder / "intent-v2"
    key = open_blobs(served.fleet).put_folder(files)
    details = {"golden": golden}
    return served.registry.add_version("intent", NEXT, Status.CANDIDATE, key, content_hash(files), details=details)


def _stream(served: Served, prompt: str) -> str:
    asked = {"model": "intent", "prompt": prompt, "max_tokens": 900, "temperature": 0, "stream": True}
    chunks = served.client.completions.create(**asked, extra_body={"ignore_eos": True})
    return "".join(chunk.choices[0].text for chunk in chunks)


def _gauge(served: Served, base: str, gauge: str) -> float:
    start = f'relora_engine{{base="{base}",gauge="{gauge}"}}'
    lines = httpx.get(f"{served.url}/metrics").text.splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(start)), -1.0)


def _replica_pids(base: str) -> list[int]:
    name = f"ray::ServeReplica:{on_ray.ENGINE_PREFIX}{base}:"
    return [
        process.pid
        for process in psutil.Process().children(recursive=True)
        if process.status() != psutil.STATUS_ZOMBIE and "".join(process.cmdline()).startswith(name)
    ]
