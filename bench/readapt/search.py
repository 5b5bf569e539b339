"""Benchmark of the search for the fused start: scoring candidates at once or one by one, and ways to search.

    relora bench search --kit DIR [--tasks snips,trec] [--work DIR] [--threads 1] [--out FILE.json]

Update: the kit's stories3m-v1 -> stories3m-v2-strong; specialists of rank 8. Held-out figures are of the gate's rows,
which no search sees, for the adapter cut to its serving rank and uncut. The cost of a search is also given in forwarded
rows (a backward pass counts as two forwards), which do not depend on how busy the machine is.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table

from bench.specialists import TASKS, BenchTask, load_bench_task, make_specialist
from cluster.adapters.files import Adapter, load_adapter
from cluster.config.readapt import SearchConfig
from cluster.storage.checkpoints import open_checkpoint
from readapt.fusion.fuse import Rank
from readapt.fusion.objective import FusionObjective
from readapt.fusion.points import COPY, CORNERS, UNDO, Point
from readapt.fusion.search import find, split_valid
from readapt.lowrank.delta import base_evolution
from readapt.training.data import encoder_for
from readapt.training.evaluate import Evaluator, judge
from readapt.training.lora import attached, load_base

ResultT = TypeVar("ResultT")
OLD, NEW = "stories3m-v1", "stories3m-v2-strong"
GATE_ROWS = 200
CANDIDATES = (*CORNERS, *(Point(0.1 * i, -0.07 * i) for i in range(1, 14)))
CORNERS_ONLY = {"trials": len(CORNERS)}
WAYS: dict[str, dict[str, Any]] = {
    "TPE, 16 trials": {"trials": 16},
    "TPE, 32 trials": {"trials": 32},
    "TPE, 32 trials, uncut": {"trials": 32, "rank": "uncut"},
    "TPE, 32 trials, by kind": {"trials": 32, "groups": "kind"},
    "TPE, 64 trials, by kind": {"trials": 64, "groups": "kind"},
    "TPE, 64 trials, by kind+depth": {"trials": 64, "groups": "kind+depth"},
    "corners, gradient 10 steps": {**CORNERS_ONLY, "refine_steps": 10},
    "corners, gradient 20 steps": {**CORNERS_ONLY, "refine_steps": 20},
    "corners, gradient 50 steps": {**CORNERS_ONLY, "refine_steps": 50},
    "corners, gradient 20 steps, uncut": {**CORNERS_ONLY, "refine_steps": 20, "rank": "uncut"},
}


def _config(**settings: Any) -> SearchConfig:
    return TypeAdapter(SearchConfig).validate_python(settings)


@dataclass(frozen=True)
class Found:
    """What one way of searching cost and found; quality in points, loss in nats per token, energy as a mean share."""

    way: str
    seconds: float
    forwarded_rows: int
    alpha: float
    beta: float
    search_loss: float
    loss: float
    quality: float
    uncut_loss: float
    uncut_quality: float
    lost_energy: float


class _Case:
    """One task's specialist on the new base, with the rows to search and to evaluate on."""

    def __init__(self, task: BenchTask, kit: Path, work: Path):
        old, new = (kit / "models" / name for name in (OLD, NEW))
        self.task = load_adapter(make_specialist(task, 0, old, kit, work))
        self.model, self.encoder = load_base(new), encoder_for(new, task.max_tokens)
        defaults = _config(subset_rows=task.search_rows)
        bases = open_checkpoint(old), open_checkpoint(new)
        self.evolution, _ = base_evolution(*bases, defaults.evolution_rank, defaults.evolution_energy)
        valid = load_bench_task(task, kit, self.encoder).valid
        self.rows, gate_rows = split_valid(valid, defaults)
        self.gate_rows = gate_rows[:GATE_ROWS]

    def objective(self, config: SearchConfig) -> FusionObjective:
        return FusionObjective(self.model, self.task, self.evolution, self.rows, self.encoder, config)

    def judge(self, adapter: Adapter) -> tuple[float, float]:
        found = judge(self.model, adapter, self.encoder, self.gate_rows, "exact_match")
        return found.loss, found.quality


def scoring_seconds(case: _Case, config: SearchConfig) -> dict[str, float]:
    """Time the scoring of `CANDIDATES`, at once and one by one; also return the largest relative loss difference."""
    objective = case.objective(config)
    evaluator = Evaluator(case.model, case.encoder, case.rows, "exact_match")
    rank: Rank = None if config.rank == "uncut" else "task"

    def alone() -> list[float]:
        losses = []
        for point in CANDIDATES:
            with attached(case.model, objective.adapter(point, rank)):
                losses.append(evaluator.loss())
        return losses

    objective.losses(CANDIDATES[:1])
    at_once_s, together = _timed(lambda: objective.losses(CANDIDATES))
    one_by_one_s, apart = _timed(alone)
    difference = max(abs(a - b) / b for a, b in zip(together, apart, strict=True))
    return {"at_once_s": at_once_s, "one_by_one_s": one_by_one_s, "largest_relative_difference": difference}


def compare_ways(case: _Case) -> list[Found]:
    """Run every way to search; the copy and the undo come first, for comparison."""
    serving = case.objective(_config())
    known = [_found(case, name, point, serving.losses([point])[0]) for name, point in (("copy", COPY), ("undo", UNDO))]
    return known + [_search(case, way, _config(**settings)) for way, settings in WAYS.items()]


def _search(case: _Case, way: str, config: SearchConfig) -> Found:
    objective = case.objective(config)
    counted: list[int] = []

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        counted.append(len(kwargs["input_ids"]) * (3 if torch.is_grad_enabled() else 1))

    handle = case.model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    seconds, result = _timed(lambda: find(objective))
    handle.remove()
    return replace(_found(case, way, result.point, result.loss), seconds=seconds, forwarded_rows=sum(counted))


def _found(case: _Case, way: str, point: Point, search_loss: float) -> Found:
    objective = case.objective(_config())
    lost = objective.lost_energy(point).values()
    cut, uncut = case.judge(objective.adapter(point)), case.judge(objective.adapter(point, None))
    return Found(way, 0.0, 0, point.alpha, point.beta, search_loss, *cut, *uncut, sum(lost) / len(lost))


def _timed(work: Callable[[], ResultT]) -> tuple[float, ResultT]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def run(kit: Path, work: Path, names: Sequence[str], console: Console) -> dict[str, Any]:
    """Return all figures by task, and print each task's as it finishes."""
    figures: dict[str, Any] = {}
    for task in (task for task in TASKS if task.name in names):
        case = _Case(task, kit, work)
        scoring = {rank: scoring_seconds(case, _config(rank=rank)) for rank in ("uncut", "serving")}
        found = compare_ways(case)
        figures[task.name] = {"scoring": scoring, "ways": [asdict(way) for way in found]}
        console.print(f"{task.name}: {len(CANDIDATES)} candidates x {len(case.rows)} rows: {scoring}")
        console.print(_table(task.name, found))
    return figures


def _table(name: str, found: Sequence[Found]) -> Table:
    table = Table("way", "s", "rows", "search loss", "held-out loss", "quality", "uncut", "energy lost", title=name)
    for way in found:
        held_out = f"{way.loss:.3f}", f"{way.quality:.1f}", f"{way.uncut_quality:.1f}", f"{way.lost_energy:.2f}"
        table.add_row(way.way, f"{way.seconds:.1f}", str(way.forwarded_rows), f"{way.search_loss:.3f}", *held_out)
    return table
