"""Compares our extractor with mergekit and a plain PEFT script: whole processes, same checkpoints, same rank.

CPU seconds (one thread) and peak resident memory are of the whole process, imports included. `energy` is the share of
the linears' change that the written adapter holds, recomputed from its files in float64.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open

from bench.facts import ROOT
from bench.models import random_llama
from cluster.storage.checkpoints import Checkpoint, open_checkpoint

POLL_S = 0.02
TIMEOUT_S = 1800.0


def write_wide_pair(folder: Path, hidden: int = 2048) -> tuple[Path, Path]:
    """Write a random Llama of two wide layers, and a version whose change has a decaying spectrum, in bfloat16."""
    sizes = {
        "vocab_size": 1024,
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": 2,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 128,
    }
    model = random_llama(sizes)
    model.to(torch.bfloat16).save_pretrained(folder / "base")
    with torch.no_grad():
        for name, weight in model.float().named_parameters():
            if "layers" in name and weight.ndim == 2:
                left, right = (torch.randn(n, 256) for n in weight.shape)
                weight += 5e-4 * ((left * torch.arange(1, 257) ** -0.7) @ right.T + 0.05 * torch.randn(weight.shape))
    model.to(torch.bfloat16).save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned"


def measure(
    base: Path, tuned: Path, work: Path, rank: int, mergekit: Path | None, say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Run each extractor and return its figures. If one fails or is missing, `not_run` says why."""
    results = {}
    for name, command in _commands(base, tuned, work, rank, mergekit).items():
        shutil.rmtree(work / name, ignore_errors=True)
        results[name] = watched(command) if command else {"not_run": "no --mergekit EXECUTABLE was given"}
        if "not_run" not in results[name]:
            results[name] |= _held(open_checkpoint(base), open_checkpoint(tuned), work / name)
        say(f"{name}: {results[name]}")
    return results


def _commands(base: Path, tuned: Path, work: Path, rank: int, mergekit: Path | None) -> dict[str, Sequence[str]]:
    pair = [str(base), str(tuned)]
    options = ["--model", pair[1], "--base-model", pair[0], "--out-path", str(work / "mergekit")]
    options += ["--max-rank", str(rank), "--embed-lora", "--skip-undecomposable"]
    ours = ["--base", pair[0], "--tuned", pair[1], "--out", str(work / "ours"), "--rank", str(rank)]
    return {
        "ours": [sys.executable, str(ROOT / "relora.py"), "extract", *ours],
        "mergekit": [str(mergekit), *options] if mergekit else [],
        "plain_peft": [sys.executable, "-m", "bench.extract.plain", *pair, str(work / "plain_peft"), str(rank)],
    }


def watched(command: Sequence[str]) -> dict[str, Any]:
    """Run a command to its end and return its CPU seconds and peak memory.

    The kernel's high-water mark is polled, so the peak of the last moments may be missed.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    start_s, peak_bytes, cpu_s = time.perf_counter(), 0, 0.0
    with subprocess.Popen(
        command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        watched = psutil.Process(process.pid)
        output: list[str] = []
        while process.poll() is None and time.perf_counter() - start_s < TIMEOUT_S:
            status = Path(f"/proc/{process.pid}/status")
            marks = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
            peak_bytes = max([peak_bytes, *(int(mark.split()[1]) * 1024 for mark in marks)])
            cpu_s = max(cpu_s, _cpu_seconds(watched))
            time.sleep(POLL_S)
        if process.poll() is None:
            process.kill()
        output = (process.stdout.read() if process.stdout else "").splitlines()
    if process.returncode:
        return {"not_run": f"exit {process.returncode}: {' / '.join(output[-3:])}"}
    return {"cpu_s": cpu_s, "wall_s": time.perf_counter() - start_s, "peak_bytes": peak_bytes}


def _cpu_seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0  # the process has just ended
    return float(times.user + times.system)


def _held(base: Checkpoint, tuned: Checkpoint, adapter: Path) -> dict[str, float]:
    """Return the energy of the linears' change that an adapter with alpha = rank holds, and its size."""
    held = total = 0.0
    file = adapter / "adapter_model.safetensors"
    with safe_open(file, framework="pt") as stored:
        names = set(stored.keys())
        for module in base.linear_shapes():
            delta = tuned.load(f"{module}.weight").double() - base.load(f"{module}.weight").double()
            total += float(delta.square().sum())
            prefix = f"base_model.model.{module}.lora_"
            if f"{prefix}A.weight" in names:
                a, b = (stored.get_tensor(f"{prefix}{side}.weight").double() for side in "AB")
                held += float(delta.square().sum() - (delta - b @ a).square().sum())
    return {"energy": held / total, "adapter_bytes": float(file.stat().st_size)}


def likeness(base: Path, tuned: Path, adapters: Mapping[str, Path], data: Path) -> dict[str, dict[str, float]]:
    """Return KL and top-1 agreement with the tuned model for each adapter, loaded by PEFT."""
    from peft import PeftModel

    from readapt.extraction.verify import compare, encode_rows
    from readapt.training.lora import load_base

    reference, found = load_base(tuned), {}
    for name, folder in adapters.items():
        bare = load_base(base)
        rows = encode_rows(data, tuned, len(bare.get_input_embeddings().weight))
        found[name] = vars(compare(reference, PeftModel.from_pretrained(bare, str(folder)).eval(), rows))
    return found
