"""One adapter's way to the new base: the ladder of rungs, cheapest first, up to the first that passes the gate.

    copy     the old adapter as it is
    fused    alpha * T + beta * E, found by search
    short    fused, then a few steps of fine-tuning with scheduled regularisation
    full     the same run, to its end
    scratch  a new adapter, trained as if there had been no old one

"fused", "short" and "full" are milestones of one training run: its start, its first `short_steps`, its end.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from cluster.adapter_files import Adapter, LoraFactors
from cluster.config import ReadaptConfig, TrainConfig
from readapt.data import Encoded, Encoder, Row, Task
from readapt.evaluate import Evaluation, Evaluator, Gate, Metric, Watcher, golden
from readapt.fuse import align
from readapt.lora import LoraWeights, attach, blank_like
from readapt.search import FusionObjective, SearchResult, split_valid
from readapt.train import BrokenRunError, CurvePoint, Plan, TrainResult, fine_tune

RUNGS = ("copy", "fused", "short", "full", "scratch")
SCRATCH_WARMUP_SHARE = 0.02

Search = Callable[[FusionObjective], SearchResult]


@dataclass(frozen=True)
class Attempt:
    """What one rung cost and reached: the best quality on it, and the evaluations made there."""

    rung: str
    quality: float
    seconds: float
    curve: tuple[CurvePoint, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """Where the ladder ended. `adapter` is the one to ship if `accepted`, else the best that there was.

    `alpha` and `beta` are the fused start's, (1, 0) for a copy and (0, 0) for scratch. `reference` is the quality that
    the gate measured against: the old specialist's, or that of scratch training where this is lower.
    """

    rung: str
    adapter: Adapter
    alpha: float
    beta: float
    quality: float
    copy_quality: float
    reference: float
    attempts: tuple[Attempt, ...]
    accepted: bool
    golden: tuple[dict[str, str], ...]


@dataclass(frozen=True)
class _Candidate:
    rung: str
    adapter: Adapter
    quality: float
    alpha: float
    beta: float


class Ladder:
    """Climbs for one adapter. `model` is the bare new base; it is bare again after `climb`.

    `reference_quality` is the old specialist's quality on the old base on the gate rows (`split_valid(...)[1]`). The
    search sees the other validation rows only, and nothing here sees the test rows. `search` is the seam at which the
    distributed search comes in. `report` hears of each evaluation as (rung, point).
    """

    def __init__(
        self,
        model: Any,
        encoder: Encoder,
        task: Task,
        old: Adapter,
        evolution: Adapter,
        config: ReadaptConfig,
        reference_quality: float,
        metric: Metric,
        search: Search,
        *,
        report: Callable[[str, CurvePoint], None] = lambda rung, point: None,
        num_golden: int = 4,
    ):
        self._model, self._encoder, self._task, self._old = model, encoder, task, old
        self._evolution, self._config, self._search = evolution, config, search
        self._report, self._num_golden = report, num_golden
        self._search_rows, gate_rows = split_valid(task.valid, config.search)
        self._evaluate = Evaluator(model, encoder, gate_rows, metric)
        self._gate = Gate(reference_quality, config.gate.tolerance_points)
        self._attempts: list[Attempt] = []
        self._candidates: list[_Candidate] = []

    def climb(self) -> Outcome:
        """Tries the rungs in their order and stops at the first that passes; see `Outcome`."""
        lora = attach(self._model, self._old)
        try:
            if not self._try_copy() and not self._try_warm(lora) and not self._try_scratch(lora):
                self._lower_gate()
            return self._outcome(lora)
        finally:
            lora.detach()

    def _try_copy(self) -> bool:
        started = time.perf_counter()
        evaluation = self._evaluate()
        seconds = time.perf_counter() - started
        point = CurvePoint(0, seconds, evaluation.loss, evaluation.quality)
        self._report("copy", point)
        self._attempts.append(Attempt("copy", evaluation.quality, seconds, (point,)))
        self._candidates.append(_Candidate("copy", self._old, evaluation.quality, 1.0, 0.0))
        return self._gate.passes(evaluation.quality)

    def _try_warm(self, lora: LoraWeights) -> bool:
        """Search, then the run that starts there. Of a run that breaks down counts what it had reached before."""
        started = time.perf_counter()
        objective = FusionObjective(self._model, lora, self._old, self._evolution, self._search_rows, self._encoder)
        found = self._search(objective)
        start = objective.adapter(found.alpha, found.beta)
        search_s = time.perf_counter() - started
        lora.load(start)
        plan = warm_plan(self._config.train, anchor_adapter(self._config.train.anchor, start, self._old))
        try:
            result = self._train(lora, plan, self._warm_rung)
        except BrokenRunError as error:
            result = error.kept
        self._attempts += self._milestones(result, search_s)
        rung = self._warm_rung(result.best_step)
        self._candidates.append(_Candidate(rung, result.best, result.best_quality, found.alpha, found.beta))
        return result.accepted

    def _try_scratch(self, lora: LoraWeights) -> bool:
        """A run that breaks down is no candidate: it does not tell what scratch training can reach."""
        config = self._config.train
        lora.load(blank_like(self._old, config.seed))
        try:
            result = self._train(lora, scratch_plan(config), lambda step: "scratch")
        except BrokenRunError:
            return False
        seconds = result.curve[-1].seconds
        self._attempts.append(Attempt("scratch", result.best_quality, seconds, tuple(result.curve)))
        self._candidates.append(_Candidate("scratch", result.best, result.best_quality, 0.0, 0.0))
        return result.accepted

    def _train(self, lora: LoraWeights, plan: Plan, rung: Callable[[int], str]) -> TrainResult:
        return fine_tune(
            self._model,
            lora,
            self._train_rows,
            plan,
            evaluate=self._evaluate,
            accept=Watcher(self._gate),
            report=lambda point: self._report(rung(point.step), point),
        )

    @cached_property
    def _train_rows(self) -> list[Encoded]:
        return self._encoder.encode_all(self._task.train)

    def _warm_rung(self, step: int) -> str:
        if step == 0:
            return "fused"
        return "short" if step <= self._config.train.short_steps else "full"

    def _milestones(self, result: TrainResult, search_s: float) -> list[Attempt]:
        attempts, rung_started_s = [], -search_s
        for rung in ("fused", "short", "full"):
            points = tuple(p for p in result.curve if self._warm_rung(p.step) == rung)
            if points:
                quality = max(p.quality for p in points)
                attempts.append(Attempt(rung, quality, points[-1].seconds - rung_started_s, points))
                rung_started_s = points[-1].seconds
        return attempts

    def _lower_gate(self) -> None:
        """What scratch training cannot reach either is not asked for: the task has become harder on the new base."""
        scratch = [c.quality for c in self._candidates if c.rung == "scratch"]
        self._gate = replace(self._gate, reference=min([self._gate.reference, *scratch]))

    def _outcome(self, lora: LoraWeights) -> Outcome:
        best = max(self._candidates, key=lambda c: c.quality)
        lora.load(best.adapter)
        return Outcome(
            rung=best.rung,
            adapter=best.adapter,
            alpha=best.alpha,
            beta=best.beta,
            quality=best.quality,
            copy_quality=self._candidates[0].quality,
            reference=self._gate.reference,
            attempts=tuple(self._attempts),
            accepted=self._gate.passes(best.quality),
            golden=tuple(golden(self._model, self._encoder, self._golden_prompts(), max_tokens=16)),
        )

    def _golden_prompts(self) -> list[str]:
        prompts = list(dict.fromkeys(row.prompt for row in self._task.valid))
        fitting = (p for p in prompts if len(self._encoder.encode_prompt(p)) + 16 <= self._encoder.max_tokens)
        return [p for p, _ in zip(fitting, range(self._num_golden), strict=False)]


def warm_plan(config: TrainConfig, anchor: Adapter | None) -> Plan:
    """The run from a fused start."""
    return Plan(
        steps=config.full_steps,
        learning_rate=config.learning_rate,
        batch_rows=config.batch_rows,
        eval_every=config.eval_every,
        pull_strong=config.pull_strong,
        pull_weak=config.pull_weak,
        strong_fraction=config.strong_fraction,
        anchor=anchor,
        seed=config.seed,
    )


def scratch_plan(config: TrainConfig) -> Plan:
    """The run of a new adapter: its own learning rate, a short warm-up, nothing to be pulled to."""
    return Plan(
        steps=config.scratch_steps,
        learning_rate=config.scratch_learning_rate,
        batch_rows=config.batch_rows,
        eval_every=config.eval_every,
        warmup_steps=round(SCRATCH_WARMUP_SHARE * config.scratch_steps),
        seed=config.seed,
    )


def anchor_adapter(kind: str, start: Adapter, old: Adapter) -> Adapter | None:
    """What the pull goes to: the run's start ("init", None), the old adapter ("old") or nothing at all ("zero")."""
    if kind == "init":
        return None
    return align(old, start) if kind == "old" else _zeros(start)


def _zeros(like: Adapter) -> Adapter:
    factors = {
        name: LoraFactors(torch.zeros_like(f.a_RD), torch.zeros_like(f.b_FR), f.scaling)
        for name, f in like.factors.items()
    }
    return Adapter(factors=factors, is_rslora=like.is_rslora)


def train_scratch(
    model: Any,
    encoder: Encoder,
    rows: Sequence[Row],
    like: Adapter,
    config: TrainConfig,
    *,
    evaluate: Callable[[], Evaluation],
    accept: Callable[[Evaluation], bool] = lambda evaluation: False,
    report: Callable[[CurvePoint], None] = lambda point: None,
) -> TrainResult:
    """Trains a new adapter with the modules and ranks of `like` on a bare model, which is bare again afterwards."""
    lora = attach(model, blank_like(like, config.seed))
    try:
        encoded = encoder.encode_all(rows)
        plan = scratch_plan(config)
        return fine_tune(model, lora, encoded, plan, evaluate=evaluate, accept=accept, report=report)
    finally:
        lora.detach()
