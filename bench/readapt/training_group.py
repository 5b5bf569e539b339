"""Training adapters side by side against one after the other: seconds of a round, which is one step of every adapter.

    relora bench training-group --base DIR [--device cuda] [--adapters 8] [--batch-rows 4] [--out FILE.json]

Both sides run the same code on the same rows. A training group runs the base once for all its adapters.
"""

import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from cluster.adapters.files import Adapter
from readapt.training.causal_lm import CausalLM
from readapt.training.data import Encoded
from readapt.training.evaluate import Evaluation
from readapt.training.lora import blank, linear_shapes, load_base
from readapt.training.training_group import TrainingGroup
from readapt.training.training_run import RunSettings, TrainingRun

NUM_ROWS = 256
COMPLETION_TOKENS = 4
WARMUP_ROUNDS = 2


def group_speedup(
    base_folder: Path,
    num_adapters: int = 8,
    batch_rows: int = 4,
    *,
    mean_tokens: int = 32,
    rank: int = 8,
    rounds: int = 10,
    device: str = "cpu",
) -> dict[str, Any]:
    """Time rounds of a group and of single runs in turn, so that a busy machine slows both; medians over `rounds`.

    Rows are random tokens, between half and one and a half times `mean_tokens` long. Keys: the settings, `group_s` and
    `one_by_one_s` (seconds a round), and their ratio `packed_training_speedup`.
    """
    model = load_base(base_folder, device)
    rows = _random_rows(int(model.config.vocab_size), mean_tokens)
    starts = [blank(linear_shapes(model), rank, 2.0 * rank, seed=seed) for seed in range(num_adapters)]
    group = _group(model, starts, rows, batch_rows)
    singles = [_group(model, [start], rows, batch_rows) for start in starts]
    group_s, one_by_one_s = (median(seconds) for seconds in zip(*_rounds(group, singles, rounds, device), strict=True))
    return {
        "base": base_folder.name,
        "device": torch.cuda.get_device_name()
        if device.startswith("cuda")
        else f"cpu, {torch.get_num_threads()} threads",
        "num_adapters": num_adapters,
        "batch_rows": batch_rows,
        "mean_tokens": mean_tokens,
        "rank": rank,
        "rounds": rounds,
        "group_s": group_s,
        "one_by_one_s": one_by_one_s,
        "packed_training_speedup": one_by_one_s / group_s,
    }


def _random_rows(vocab_size: int, mean_tokens: int) -> list[Encoded]:
    rng = random.Random(0)
    lengths = [rng.randint(mean_tokens // 2, mean_tokens * 3 // 2) for _ in range(NUM_ROWS)]
    return [Encoded(tuple(rng.choices(range(3, vocab_size), k=n)), n - COMPLETION_TOKENS) for n in lengths]


def _group(model: CausalLM, starts: Sequence[Adapter], rows: Sequence[Encoded], batch_rows: int) -> TrainingGroup:
    """Return a group of endless runs, which evaluate only before their first step."""
    group = TrainingGroup(model)
    for index, start in enumerate(starts):
        settings = RunSettings(steps=10**9, learning_rate=1e-3, batch_rows=batch_rows, eval_every=10**9, seed=index)
        group.add(index, TrainingRun(start, rows, settings, lambda: Evaluation(loss=1.0, quality=0.0)))
    return group


def _rounds(
    group: TrainingGroup, singles: Sequence[TrainingGroup], rounds: int, device: str
) -> Iterator[tuple[float, float]]:
    for index in range(WARMUP_ROUNDS + rounds):
        seconds = _timed([group], device), _timed(singles, device)
        if index >= WARMUP_ROUNDS:
            yield seconds


def _timed(groups: Sequence[TrainingGroup], device: str) -> float:
    started = time.perf_counter()
    for group in groups:
        group.step()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started
