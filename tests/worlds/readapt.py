"""A tiny world for tests of re-adaptation: a task, its specialist, and new versions of the base model."""

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from cluster.adapters.files import Adapter, LoraFactors
from cluster.storage.jsonl import write_lines
from readapt.fusion.objective import FusionObjective, SearchResult, Trial, best_of
from readapt.fusion.points import Point
from readapt.training.data import Encoder, Row, Task, encoder_for
from readapt.training.evaluate import Evaluation, Evaluator, Verdict
from readapt.training.lora import blank, linear_shapes, load_base
from readapt.training.training_group import fine_tune
from readapt.training.training_run import RunSettings, TrainingRun
from tests.worlds.serving import make_checkpoint

LABELS = {"a": "red", "b": "green", "c": "blue", "d": "red"}
MAX_TOKENS = 64


@dataclass(frozen=True)
class TaskWorld:
    """A base, a specialist that was trained on it, and the specialist's task."""

    base: Path
    encoder: Encoder
    task: Task
    specialist: Adapter


def make_rows(num_rows: int, seed: int) -> list[Row]:
    """Return rows that ask for the colour of a letter among digits: a lookup that a tiny model learns in seconds."""
    rng = random.Random(seed)
    rows = []
    for _ in range(num_rows):
        noise = "".join(rng.choices("0123456789", k=rng.randint(1, 6)))
        letter = rng.choice(list(LABELS))
        rows.append(Row(f"{noise}{letter}=", LABELS[letter]))
    return rows


def make_task() -> Task:
    """Return the colour task, with disjoint splits."""
    rows = list(dict.fromkeys(make_rows(700, seed=0)))
    return Task(train=rows[:300], valid=rows[300:420], test=rows[420:460])


def write_task(folder: Path, task: Task) -> Path:
    """Write a task's three files and return the folder."""
    for split, rows in (("train", task.train), ("valid", task.valid), ("test", task.test)):
        write_lines(folder / f"{split}.jsonl", map(asdict, rows))
    return folder


def make_world(folder: Path) -> TaskWorld:
    """Train a rank-4 specialist (stored at rank 8) on a tiny random base. Takes a few seconds."""
    base = make_checkpoint(folder / "v1", std=0.08)
    encoder, task = encoder_for(base, MAX_TOKENS), make_task()
    return TaskWorld(base, encoder, task, pad_ranks(train_specialist(base, encoder, task), 8))


def train_specialist(base: Path, encoder: Encoder, task: Task) -> Adapter:
    """Return a specialist that answers nearly all validation rows exactly."""
    model = load_base(base)
    start = blank(linear_shapes(model), rank=4, alpha=8.0)
    evaluate = Evaluator(model, encoder, task.valid, "exact_match")
    settings = RunSettings(steps=200, learning_rate=1e-2, eval_every=25, warmup_steps=4)
    watch = ready_when(lambda evaluation: evaluation.quality >= 99.0)
    result = fine_tune(model, TrainingRun(start, encoder.encode_all(task.train), settings, evaluate, watch))
    assert result.is_ready, result.curve
    return result.best


def ready_when(is_good: Callable[[Evaluation], bool]) -> Callable[[Evaluation], Verdict]:
    """Return a watcher that ends a run at the first evaluation that is good enough."""
    return lambda evaluation: Verdict.READY if is_good(evaluation) else Verdict.GO_ON


def pad_ranks(adapter: Adapter, rank: int) -> Adapter:
    """Return an adapter with the same function and more ranks; the new ones are zero."""
    factors = {}
    for name, f in adapter.factors.items():
        spare = rank - f.rank
        a_RD = torch.cat([f.a_RD, torch.zeros(spare, f.a_RD.shape[1])])
        factors[name] = LoraFactors(a_RD, torch.cat([f.b_FR, torch.zeros(f.b_FR.shape[0], spare)], dim=1), f.scaling)
    return Adapter(factors)


def try_points(objective: FusionObjective, points: Sequence[Point]) -> SearchResult:
    """Return the result of a search that tries only these points."""
    return best_of([Trial(point, loss) for point, loss in zip(points, objective.losses(points), strict=True)])


def evolve(
    old: Path, folder: Path, *, rank: int | None, scale: float, kinds: Sequence[str] = (), seed: int = 7
) -> Path:
    """Make a new version of a checkpoint. A random matrix of the given rank (None: full) changes its linears."""
    shutil.copytree(old, folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    change = partial(_random_matrix, rank=rank, generator=generator)
    for name, weight in sorted(tensors.items()):
        kind = name.split(".")[-2]
        if ".layers." in name and kind.endswith("_proj") and (not kinds or kind in kinds):
            tensors[name] = weight + scale * weight.std() * change(weight.shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _random_matrix(shape: torch.Size, rank: int | None, generator: torch.Generator) -> torch.Tensor:
    if rank is None:
        return torch.randn(shape, generator=generator)
    left, right = (torch.randn(n, rank, generator=generator) for n in shape)
    return left @ right.T / rank**0.5


def random_factors(num_out: int, num_in: int, rank: int, scaling: float, seed: int) -> LoraFactors:
    """Return random factors of one module."""
    generator = torch.Generator().manual_seed(seed)
    a_RD, b_FR = torch.randn(rank, num_in, generator=generator), torch.randn(num_out, rank, generator=generator)
    return LoraFactors(a_RD, b_FR, scaling)


@torch.no_grad()
def logits(model: Any, num_tokens: int = 23) -> torch.Tensor:
    """Return the logits of a fixed batch of random tokens."""
    tokens = torch.randint(0, 256, (3, num_tokens), generator=torch.Generator().manual_seed(5))
    return model(input_ids=tokens, use_cache=False).logits
