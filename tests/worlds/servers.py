"""Servers for tests: gateway and engines behind HTTP on 127.0.0.1, in threads of the test's process."""

import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import uvicorn

from cluster.config.settings import BaseSpec, RolloutConfig, ServingConfig
from cluster.registry.registry import Registry, Status
from cluster.storage.blobs import BlobStore
from cluster.storage.checkpoints import open_checkpoint
from serving.engine.engine import Engine
from serving.engine.loop import EngineLoop
from serving.gateway.gateway import Gateway
from serving.gateway.local_backend import LocalBackend
from serving.http.api import create_app
from tests.worlds.serving import make_adapter


@dataclass
class Server:
    """A server and the parts behind it; `loops` are the engines by base."""

    url: str
    registry: Registry
    loops: dict[str, EngineLoop]
    files: Path

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    @property
    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def post(self, path: str, **body) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=60)

    def num_running(self, base: str = "v1") -> float:
        stats = self.loops[base].stats()
        return stats["running"] + stats["waiting"]


@contextmanager
def serve(app) -> Iterator[str]:
    """Run the application with uvicorn in a thread, on a free port of 127.0.0.1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def serve_bases(
    files: Path,
    folder: Path,
    config: ServingConfig,
    bases: tuple[str, ...],
    specs: Mapping[str, BaseSpec] | None = None,
) -> Iterator[Server]:
    """Serve the bases in `files` with one engine each. Registry, blobs and caches are in `folder`."""
    registry = Registry(f"sqlite:///{folder}/registry.db")
    blobs = BlobStore(str(folder / "blobs"), folder / "cache")
    for name in bases:
        registry.add_base(name, str(files / name), open_checkpoint(files / name).fingerprint())
    loops = {name: EngineLoop(Engine.open(files / name, config), packed_dir=folder / "packed") for name in bases}
    for loop in loops.values():
        loop.start()
    backends = {name: LocalBackend(loop, blobs) for name, loop in loops.items()}
    gateway = Gateway(registry, blobs, lambda: backends, config, RolloutConfig(poll_s=0.05), specs or {})
    try:
        with serve(create_app(gateway, config.cors_origins)) as url:
            yield Server(url, registry, loops, files)
    finally:
        for loop in loops.values():
            loop.stop()
        registry.close()


@dataclass
class AdapterServer:
    """A server of one base, called "base", and helpers that make, load and use adapters of it."""

    server: Server
    folder: Path
    base: Path

    @property
    def blobs(self) -> BlobStore:
        return BlobStore(str(self.folder / "blobs"), self.folder / "cache")

    def make(self, name: str, **settings: object) -> Path:
        return make_adapter(self.folder / "made" / name, self.base, **{"rank": 3, **settings})

    def load(self, name: str, path: Path) -> httpx.Response:
        return self.server.post("/v1/load_lora_adapter", lora_name=name, lora_path=str(path))

    def register(self, name: str, path: Path) -> str:
        """Register an adapter as another process would, without the gateway's checks; returns the blob's key."""
        registry = self.server.registry
        key = self.blobs.put_folder(path)
        registry.add_adapter(name)
        version = registry.add_version(name, "base", Status.RETIRED, blob_key=key, content_hash=key)
        registry.promote(version.id)
        return key

    def ask(self, model: str, num_tokens: int = 12, prompt: str = "hello there", **more: object) -> httpx.Response:
        body = {"model": model, "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
        return self.server.post("/v1/completions", **{**body, **more})

    def text(self, model: str, num_tokens: int = 12, **more: object) -> str:
        response = self.ask(model, num_tokens, **more)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["text"]

    def stats(self) -> dict[str, float]:
        return self.server.loops["base"].stats()

    def where(self) -> dict[str, dict]:
        listed = httpx.get(f"{self.server.url}/v1/adapters", timeout=10).json()["data"]
        return {one["version"]: one for one in listed}


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Wait until a condition holds; fails after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)
