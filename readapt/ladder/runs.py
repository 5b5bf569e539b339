"""What a run of training is, by where it starts: the fleet file's settings as `RunSettings`.

Shape letters: D in, F out, R rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import pad

from cluster.adapter_files import Adapter, LoraFactors
from cluster.config import TrainConfig
from readapt.fusion.fuse import align
from readapt.lowrank.svd import decompose
from readapt.training.data import Encoder, Row
from readapt.training.evaluate import Evaluation, Verdict
from readapt.training.lora import blank_like, row_norms
from readapt.training.training_group import fine_tune
from readapt.training.training_run import CurvePoint, RunSettings, TrainingResult, TrainingRun, go_on

SCRATCH_WARMUP_SHARE = 0.02


def warm_plan(config: TrainConfig, anchor: Adapter | None, *, runs_on: bool = False) -> RunSettings:
    """The run from a start that is not blank."""
    return RunSettings(
        steps=config.full_steps,
        learning_rate=config.learning_rate,
        batch_rows=config.batch_rows,
        eval_every=config.eval_every,
        pull_strong=config.pull_strong,
        pull_weak=config.pull_weak,
        strong_fraction=config.strong_fraction,
        anchor=anchor,
        seed=config.seed,
        runs_on=runs_on,
        averaging=config.averaging,
    )


def scratch_plan(config: TrainConfig, *, runs_on: bool = False) -> RunSettings:
    """The run of a new adapter: its own learning rate, a short warm-up, nothing to be pulled to."""
    return RunSettings(
        steps=config.scratch_steps,
        learning_rate=config.scratch_learning_rate,
        batch_rows=config.batch_rows,
        eval_every=config.eval_every,
        warmup_steps=round(SCRATCH_WARMUP_SHARE * config.scratch_steps),
        seed=config.seed,
        runs_on=runs_on,
        averaging=config.averaging,
    )


def anchor_adapter(kind: str, start: Adapter, old: Adapter) -> Adapter | None:
    """What the pull goes to: the run's start ("init", None), the old adapter ("old") or nothing at all ("zero")."""
    if kind == "init":
        return None
    return align(_laid_out(old, start), start) if kind == "old" else _zeros(start)


def _laid_out(adapter: Adapter, like: Adapter) -> Adapter:
    """The same function with the ranks and scalings of `like`: missing ranks are zero, too many are cut to the best.

    Magnitudes are those of `like`, or none: what a DoRA pulls a plain adapter to is its direction alone.
    """
    factors = {name: _factors_like(adapter.factors[name], f) for name, f in like.factors.items()}
    return replace(like, factors=factors)


def _factors_like(factors: LoraFactors, like: LoraFactors) -> LoraFactors:
    if factors.rank > like.rank:
        factors = LoraFactors(*decompose(factors.delta(), like.rank).factors(like.rank), 1.0)
    spare = like.rank - factors.rank
    a_RD, b_FR = pad(factors.a_RD, (0, 0, 0, spare)), pad(factors.b_FR, (0, spare))
    return replace(like, a_RD=a_RD, b_FR=b_FR * (factors.scaling / like.scaling))


def _zeros(like: Adapter) -> Adapter:
    factors = {
        name: replace(f, a_RD=torch.zeros_like(f.a_RD), b_FR=torch.zeros_like(f.b_FR))
        for name, f in like.factors.items()
    }
    return replace(like, factors=factors)


def train_scratch(
    model: Any,
    encoder: Encoder,
    rows: Sequence[Row],
    like: Adapter,
    config: TrainConfig,
    *,
    evaluate: Callable[[], Evaluation],
    watch: Callable[[Evaluation], Verdict] = go_on,
    report: Callable[[CurvePoint], None] = lambda point: None,
) -> TrainingResult:
    """Trains a new adapter with the modules and ranks of `like` on a bare model, which is bare again afterwards."""
    start = blank_like(like, config.seed, row_norms(model, like.factors) if like.is_dora else None)
    return fine_tune(model, TrainingRun(start, encoder.encode_all(rows), scratch_plan(config), evaluate, watch, report))
