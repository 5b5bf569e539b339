"""Training of the demo's adapters on base v1, each in its own process."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers.utils import logging

from cluster.adapters.files import save_adapter
from readapt.training.data import encoder_for, load_rows
from readapt.training.evaluate import Evaluator, judge
from readapt.training.lora import blank, linear_shapes, load_base
from readapt.training.training_group import fine_tune
from readapt.training.training_run import RunSettings, TrainingRun

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Specialist:
    """How one adapter is trained. `alpha` is PEFT's: the scaling is alpha/rank, or alpha/sqrt(rank) with rsLoRA."""

    name: str
    metric: Literal["exact_match", "chrf"]
    rank: int = 8
    alpha: float = 16.0
    is_rslora: bool = False
    modules: tuple[str, ...] = LINEARS
    steps: int = 300
    batch_rows: int = 16
    learning_rate: float = 3e-3
    max_tokens: int = 256
    valid_rows: int = 400
    seed: int = 0


@contextmanager
def single_threaded() -> Iterator[None]:
    """Limit torch to one thread and hide the bars of transformers inside the block. Restore both afterwards."""
    num_threads = torch.get_num_threads()
    shows_bars = logging.is_progress_bar_enabled()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
        if shows_bars:
            logging.enable_progress_bar()


def train_specialist(spec: Specialist, base: Path, data: Path, target: Path) -> float:
    """Train one adapter, write it to `target` in PEFT's format and return its quality in points on valid rows.

    The checkpoint with the best exact match is kept, whatever the task's metric is: chrF would need slow generation.
    """
    model = load_base(base)
    encoder = encoder_for(base, spec.max_tokens)
    valid = load_rows(data / "valid.jsonl")[: spec.valid_rows]
    start = blank(linear_shapes(model), spec.rank, spec.alpha, spec.is_rslora, spec.modules, spec.seed)
    rows = encoder.encode_all(load_rows(data / "train.jsonl"))
    settings = RunSettings(
        spec.steps, spec.learning_rate, spec.batch_rows, eval_every=max(1, spec.steps // 4), seed=spec.seed
    )
    result = fine_tune(model, TrainingRun(start, rows, settings, Evaluator(model, encoder, valid, "exact_match")))
    save_adapter(result.best, target)
    return judge(model, result.best, encoder, valid, spec.metric).quality


def train_all(
    specs: Sequence[Specialist],
    base: Path,
    data: Path,
    target: Path,
    progress: Callable[[float], None],
    meanwhile: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Train all adapters, from `data`/NAME into `target`/NAME. This process runs `meanwhile` at the same time.

    Return the qualities by name. If one fails, its error is raised after the others are done.
    """
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads in an unknown state
    num_workers = min(len(specs), os.cpu_count() or 1)
    with ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        futures = {pool.submit(_train_alone, s, base, data / s.name, target / s.name): s.name for s in specs}
        meanwhile()
        qualities = {}
        for future in as_completed(futures):
            qualities[futures[future]] = future.result()
            progress(len(qualities) / len(specs))
    return {spec.name: qualities[spec.name] for spec in specs}


def _train_alone(spec: Specialist, base: Path, data: Path, target: Path) -> float:
    with single_threaded():
        return train_specialist(spec, base, data, target)
