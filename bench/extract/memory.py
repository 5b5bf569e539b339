"""Measures the peak memory of one extraction in a separate process, and writes synthetic checkpoints for it.

`python -m bench.extract.memory BASE TUNED OUT RANK` prints JSON. Rank 0 means the energy rule, which decomposes every
matrix exactly. The peak is the kernel's high-water mark of resident memory, including mapped file pages, minus what the
process held after all imports.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.facts import ROOT

SIDE = 4096
NUM_MATRICES = 4
POWER = 0.7  # of the spectrum: sigma_i = i^-0.7, plus noise


def write_pair(folder: Path, side: int = SIDE) -> tuple[Path, Path]:
    """Write two checkpoints of float32 matrices, one per shard: random weights, and a decaying change."""
    generator = torch.Generator().manual_seed(0)
    for version in ("base", "tuned"):
        (folder / version).mkdir(parents=True, exist_ok=True)
        names = [f"model.layers.{n}.mlp.up_proj.weight" for n in range(NUM_MATRICES)]
        shards = {name: f"model-{n}.safetensors" for n, name in enumerate(names)}
        (folder / version / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
        (folder / version / "config.json").write_text('{"model_type": "synthetic"}')
    values = torch.arange(1, 257) ** -POWER
    for name, shard in shards.items():
        weight = 0.02 * torch.randn(side, side, generator=generator)
        save_file({name: weight}, folder / "base" / shard)
        left, right = (torch.randn(side, 256, generator=generator) for _ in range(2))
        weight += 2e-4 * ((left * values) @ right.T + 0.05 * torch.randn(side, side, generator=generator))
        save_file({name: weight}, folder / "tuned" / shard)
    return folder / "base", folder / "tuned"


def measure(base: Path, tuned: Path, out: Path, rank: int) -> dict[str, Any]:
    """Run one extraction in a new process and return its peak memory, also relative to the largest tensor."""
    command = [sys.executable, "-m", "bench.extract.memory", str(base), str(tuned), str(out), str(rank)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main(base: Path, tuned: Path, out: Path, rank: int) -> None:
    """Run one extraction in this process and print its memory as JSON."""
    import matplotlib.figure  # noqa: F401 (imported early, to count as memory of the interpreter)
    import transformers.pytorch_utils  # noqa: F401

    from cluster.storage.checkpoints import open_checkpoint
    from readapt.extraction.extract import Settings, extract
    from readapt.lowrank.spectra import EnergyShare, FixedRank

    torch.set_num_threads(1)
    checkpoints = open_checkpoint(base), open_checkpoint(tuned)
    largest_bytes = max(4 * torch.Size(checkpoints[1].shape(name)).numel() for name in checkpoints[1].names())
    settings = Settings((FixedRank(rank) if rank else EnergyShare(0.95),))
    own_bytes, start_s = _status_bytes("VmRSS"), time.process_time()
    extract(*checkpoints, out, settings)
    peak_bytes = _status_bytes("VmHWM")
    facts = {
        "own_bytes": own_bytes,
        "peak_bytes": peak_bytes,
        "largest_bytes": largest_bytes,
        "peak_rss_over_largest_tensor": (peak_bytes - own_bytes) / largest_bytes,
        "cpu_seconds": time.process_time() - start_s,
    }
    print(json.dumps(facts))


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
