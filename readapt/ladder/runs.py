"""The settings and starts of a ladder's training runs, made from the fleet file's `[readapt.train]`."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch.nn.functional import pad

from cluster.adapters.files import Adapter, LoraFactors
from cluster.config.readapt import TrainConfig
from readapt.fusion.fuse import align
from readapt.lowrank.svd import decompose
from readapt.training.causal_lm import CausalLM
from readapt.training.data import Encoder, Row
from readapt.training.evaluate import Evaluation, Verdict
from readapt.training.lora import blank_like, row_norms
from readapt.training.training_group import fine_tune
from readapt.training.training_run import CurvePoint, RunSettings, TrainingResult, TrainingRun, go_on

SCRATCH_WARMUP_SHARE = 0.02


def warm_settings(config: TrainConfig, anchor: Adapter | None, *, runs_on: bool = False) -> RunSettings:
    """Return the settings of a run from a start. `anchor` is what the weights are pulled to; None means the start."""
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


def scratch_settings(config: TrainConfig, *, runs_on: bool = False) -> RunSettings:
    """Return the settings of a new adapter's run: its own learning rate, a short warm-up, no pull."""
    return replace(
        warm_settings(config, None, runs_on=runs_on),
        steps=config.scratch_steps,
        learning_rate=config.scratch_learning_rate,
        warmup_steps=round(SCRATCH_WARMUP_SHARE * config.scratch_steps),
        pull_strong=0.0,
        pull_weak=0.0,
    )


def scratch_start(model: CausalLM, like: Adapter, seed: int) -> Adapter:
    """Return an untrained adapter with the modules, ranks and kind of `like`, for the base `model`."""
    return blank_like(like, seed, row_norms(model, like.factors) if like.is_dora else None)


def train_scratch(
    model: CausalLM,
    encoder: Encoder,
    rows: Sequence[Row],
    like: Adapter,
    config: TrainConfig,
    *,
    evaluate: Callable[[], Evaluation],
    watch: Callable[[Evaluation], Verdict] = go_on,
    report: Callable[[CurvePoint], None] = lambda point: None,
) -> TrainingResult:
    """Train a new adapter with the modules, ranks and kind of `like`. `model` is bare before and after."""
    start = scratch_start(model, like, config.seed)
    settings = scratch_settings(config)
    return fine_tune(model, TrainingRun(start, encoder.encode_all(rows), settings, evaluate, watch, report))


def anchor_adapter(kind: str, start: Adapter, old: Adapter) -> Adapter | None:
    """Return what the weights are pulled to: the run's start ("init", None), the `old` adapter, or zeros ("zero")."""
    if kind == "init":
        return None
    return align(_laid_out(old, start), start) if kind == "old" else _zeros(start)


def _laid_out(adapter: Adapter, like: Adapter) -> Adapter:
    """Give the adapter the ranks and scalings of `like`: pad missing ranks with zeros, cut surplus ranks by SVD.

    Magnitudes are those of `like`, if any: a plain adapter is pulled only towards the direction of a DoRA.
    """
    factors = {name: _factors_like(adapter.factors[name], f) for name, f in like.factors.items()}
    return replace(like, factors=factors)


def _factors_like(factors: LoraFactors, like: LoraFactors) -> LoraFactors:
    if factors.rank > like.rank:
        factors = LoraFactors(*decompose(factors.delta(), like.rank).factors(like.rank), 1.0)
    missing = like.rank - factors.rank
    a_RD = pad(factors.a_RD, (0, 0, 0, missing))
    b_FR = pad(factors.b_FR, (0, missing))
    return replace(like, a_RD=a_RD, b_FR=b_FR * (factors.scaling / like.scaling))


def _zeros(like: Adapter) -> Adapter:
    factors = {
        name: replace(f, a_RD=torch.zeros_like(f.a_RD), b_FR=torch.zeros_like(f.b_FR))
        for name, f in like.factors.items()
    }
    return replace(like, factors=factors)
