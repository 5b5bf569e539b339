"""Engines that are not ours, as processes: vLLM where a test has `--vllm`, else our engine with vLLM's protocol."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.worlds.serving import make_checkpoint

# vLLM's attention for CPUs takes no smaller heads than 32.
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
READY_TIMEOUT_S = 400.0
VLLM = (
    *("--dtype", "float32", "--enforce-eager", "--block-size", "32", "--max-model-len", "512"),
    *("--enable-lora", "--max-lora-rank", "16"),
)
VLLM_ENV = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
}


def make_base(folder: Path, seed: int) -> Path:
    """Write a tiny Llama that vLLM can run on a CPU."""
    return make_checkpoint(folder, seed=seed, **SHAPE)


@dataclass
class EngineProcess:
    """A server of one base on a fixed port. `vllm` is a Python with vLLM; None: our engine in its place."""

    folder: Path
    log: Path
    vllm: str | None = None
    arguments: Sequence[str] = ()
    port: int = field(default_factory=lambda: free_port())
    _process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the process; `wait` returns when it answers."""
        ours = [sys.executable, "-m", "tests.worlds.engine_server", str(self.folder), str(self.port)]
        module = "vllm.entrypoints.openai.api_server"
        theirs = [str(self.vllm), "-m", module, "--model", str(self.folder), "--port", str(self.port)]
        command = ours if self.vllm is None else [*theirs, "--host", "127.0.0.1", *VLLM, *self.arguments]
        env = {**os.environ, **(VLLM_ENV if self.vllm else {})}
        if self.vllm:
            env.pop("PYTHONPATH", None)  # our `kernels` is not the package of that name
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=env, cwd=None if self.vllm is None else "/", start_new_session=True
            )

    def wait(self) -> None:
        """Wait until the server answers, and has answered one request: vLLM's first takes many seconds."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not self._answers():
            assert self._process is not None
            assert self._process.poll() is None, self.log.read_text(errors="replace")[-3000:]
            assert time.monotonic() < deadline, self.log.read_text(errors="replace")[-3000:]
            time.sleep(0.2)

    def kill(self) -> None:
        """Kill the server and all its processes, as a crash does."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        """Kill the server if it runs."""
        if self._process is not None and self._process.poll() is None:
            self.kill()

    def models(self) -> dict[str, dict]:
        return {model["id"]: model for model in httpx.get(f"{self.url}/v1/models", timeout=60).json()["data"]}

    def _answers(self) -> bool:
        body = {"model": str(self.folder), "prompt": [1, 2], "max_tokens": 1, "stream": True}
        try:
            return httpx.post(f"{self.url}/v1/completions", json=body, timeout=READY_TIMEOUT_S).status_code == 200
        except httpx.TransportError:
            return False


class HuggingFace:
    """The reference: greedy answers of transformers and PEFT."""

    def __init__(self, base: Path):
        self._base = base
        self._tokenizer = AutoTokenizer.from_pretrained(base)

    @torch.inference_mode()
    def texts(self, adapter: Path | None, prompts: Sequence[str], max_tokens: int) -> list[str]:
        """Return the answer to each prompt, up to the end token."""
        model = AutoModelForCausalLM.from_pretrained(self._base, dtype=torch.float32)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, str(adapter))
        model.eval()
        return [self._text(model, prompt, max_tokens) for prompt in prompts]

    def _text(self, model: torch.nn.Module, prompt: str, max_tokens: int) -> str:
        tokens = self._tokenizer(prompt, return_tensors="pt")
        out = model.generate(**tokens, max_new_tokens=max_tokens, do_sample=False)
        return self._tokenizer.decode(out[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
