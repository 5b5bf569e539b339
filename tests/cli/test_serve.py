"""`relora serve` on a fleet file that has only a base: adapters are loaded while it runs."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from tests.worlds.servers import wait_until
from tests.worlds.serving import make_adapter, make_checkpoint

BASE = "org/tiny"


@pytest.mark.ray
def test_a_base_alone_is_served_and_takes_adapters_live(tmp_path: Path):
    make_adapter(tmp_path / "adapter", make_checkpoint(tmp_path / "base"), rank=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serving = f'[serving]\nport = {port}\nmemory_bytes = 16_777_216\ncors_origins = ["*"]\n'
    (tmp_path / "fleet.toml").write_text(f'name = "f"\n[[bases]]\nname = "{BASE}"\npath = "base"\n{serving}')
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "relora", "serve", str(tmp_path / "fleet.toml")]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: _answers(url) or process.poll() is not None, timeout_s=300)
        assert process.poll() is None, (tmp_path / "log").read_text()
        body = {"lora_name": "acme/bot", "lora_path": str(tmp_path / "adapter")}
        assert httpx.post(f"{url}/v1/load_lora_adapter", json=body, timeout=60).status_code == 200
        listed = httpx.get(f"{url}/v1/models", headers={"Origin": "http://page.test"}, timeout=30)
        assert [model["id"] for model in listed.json()["data"]] == [BASE, "acme/bot"]
        assert listed.headers["access-control-allow-origin"] == "*"
        texts = {_text(url, model) for model in (BASE, "acme/bot")}
        assert len(texts) == 2
    finally:
        _end(process)


def _answers(url: str) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    return False


def _text(url: str, model: str) -> str:
    body = {"model": model, "prompt": "hello", "max_tokens": 8, "temperature": 0}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]


def _end(process: subprocess.Popen) -> None:
    """Stop the command as a service manager does; it stops the Ray cluster that it started."""
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGTERM)
    process.wait(timeout=120)
    _, left = psutil.wait_procs(children, timeout=60)
    assert left == []
