"""A real server for the clients: `relora serve` with one chat model and one adapter of it."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from bench.clients.checklist import Target
from bench.facts import ROOT
from cluster.on_ray import LocalCluster
from demo.world import free_port

BASE, ADAPTER = "org/chat-model", "org/adapter"
START_TIMEOUT_S = 600.0
_FLEET = """
name = "clients"
registry = "sqlite:///registry.db"
blobs = "blobs"

[serving]
port = {port}
cors_origins = ["http://localhost:3000"]

[[bases]]
name = "{base}"
path = "{path}"
"""


@contextmanager
def serve(model: Path, folder: Path, log_file: Path) -> Iterator[Target]:
    """Serve a model and an adapter of it, made in `folder`, until the block ends. Raises TimeoutError if it is slow."""
    _make_adapter(model, folder / "adapter")
    port = free_port()
    fleet = folder / "fleet.toml"
    fleet.write_text(_FLEET.format(port=port, base=BASE, path=model))
    url = f"http://127.0.0.1:{port}"
    # Its own cluster: `relora serve` would join one that runs on this machine.
    with LocalCluster() as cluster, log_file.open("wb") as log:
        command = [sys.executable, str(ROOT / "relora.py"), "serve", str(fleet)]
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, env=_environment(cluster))
        try:
            _wait(server, url, log_file)
            _load_adapter(url, folder / "adapter")
            yield Target(url, BASE, ADAPTER)
        finally:
            server.terminate()
            server.wait()


def _environment(cluster: LocalCluster) -> dict[str, str]:
    return {**os.environ, "RAY_ADDRESS": cluster.address, "PYTHONPATH": str(ROOT)}


def _make_adapter(model: Path, folder: Path) -> None:
    torch.manual_seed(0)
    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )
    tuned.save_pretrained(folder)


def _load_adapter(url: str, folder: Path) -> None:
    body = {"lora_name": ADAPTER, "lora_path": str(folder)}
    reply = httpx.post(f"{url}/v1/load_lora_adapter", json=body, timeout=START_TIMEOUT_S)
    assert reply.status_code == 200, reply.text


def _wait(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not _is_ready(url):
        if server.poll() is not None or time.monotonic() > deadline:
            raise TimeoutError(f"`relora serve` did not start. The end of its log:\n{log.read_text()[-2000:]}")
        time.sleep(0.5)


def _is_ready(url: str) -> bool:
    try:
        reply = httpx.get(f"{url}/v1/models", timeout=5)
        return reply.status_code == 200 and BASE in reply.text
    except httpx.TransportError:
        return False
