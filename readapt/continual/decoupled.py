"""A warm start of the upgrade ladder whose parts are learned apart: old adapter, base evolution, one fresh direction.

The old adapter T and the evolution E are frozen directions whose magnitudes (the alpha and beta of a fused start) are
trained by gradient together with a fresh direction (see `directions`). Judged, and returned, is what would be served:
the sum, cut to the serving rank.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cluster.adapter_files import Adapter
from readapt.continual.directions import Decoupled, DirectionWeights, decouple, fold
from readapt.continual.learn import MAX_GRADIENT_NORM
from readapt.training.data import Encoded, collate, shuffled_batches
from readapt.training.evaluate import Evaluation, Verdict, label_logits
from readapt.training.lora import attached, blank
from readapt.training.schedule import learning_rate
from readapt.training.train import BrokenRunError, CurvePoint, RunSettings, TrainingResult, go_on


@dataclass(frozen=True)
class DecoupledJob:
    """A run from alpha T + beta E; as `train.TrainJob`, with the start in its parts.

    Modules and serving rank are those of `old`. `plan.learning_rate` is that of the fresh direction,
    `magnitude_learning_rate` that of all magnitudes; a plan's anchor and pulls have no meaning here.
    """

    old: Adapter
    evolution: Adapter
    rows: Sequence[Encoded]
    plan: RunSettings
    evaluate: Callable[[], Evaluation]
    alpha: float = 1.0
    beta: float = 0.0
    magnitude_learning_rate: float = 1e-2
    watch: Callable[[Evaluation], Verdict] = go_on
    report: Callable[[CurvePoint], None] = lambda point: None


def train_decoupled(model: Any, job: DecoupledJob) -> TrainingResult:
    """Trains magnitudes and fresh direction on a bare model, which is bare again afterwards.

    The result's `last` is the adapter of the last evaluation.
    The fresh direction starts with the length of the old adapter's and, as B is zero, adds nothing at first: the run's
    start is the fused start. BrokenRunError when the loss is no longer finite.
    """
    return _Run(model, job).to_its_end()


class _Run:
    """One run: its state between two evaluations, and what it has kept."""

    def __init__(self, model: Any, job: DecoupledJob):
        self._model, self._job = model, job
        start = decoupled_start(job.old, job.evolution, job.alpha, job.beta)
        shapes = {name: factors.shape for name, factors in job.old.factors.items()}
        fresh = blank(shapes, job.old.max_rank, alpha=job.old.max_rank, seed=job.plan.seed)
        self._weights = DirectionWeights(model, start, fresh, magnitude=_length(start))
        self._weights.detach()  # it is on the model only where it is trained
        self._started = time.perf_counter()
        self._curve: list[CurvePoint] = []
        self._best: tuple[Evaluation, Adapter, int] | None = None
        self._last = job.old
        self._ready: tuple[CurvePoint, Adapter] | None = None

    def to_its_end(self) -> TrainingResult:
        """Steps and evaluations in turn, as in `train.fine_tune`."""
        job, plan = self._job, self._job.plan
        groups = [
            {"params": self._weights.factors(), "lr": plan.learning_rate},
            {"params": [self._weights.magnitudes_N], "lr": job.magnitude_learning_rate},
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, foreach=True)
        batches = shuffled_batches(job.rows, plan.batch_rows, plan.seed)
        for step in range(plan.steps + 1):
            if plan.is_due(step):
                verdict = self._judge(step)
                if self._is_over(verdict) or step == plan.steps:
                    break
            share = learning_rate(step, plan.steps, 1.0, plan.warmup_steps)
            for group, peak in zip(
                optimizer.param_groups, (plan.learning_rate, job.magnitude_learning_rate), strict=True
            ):
                group["lr"] = peak * share
            self._descend(optimizer, next(batches), step)
        return self._result(step, verdict)

    def _judge(self, step: int) -> Verdict:
        self._last = adapter = fold(self._weights.export(), self._job.old.max_rank)
        with attached(self._model, adapter):
            evaluation = self._job.evaluate()
        if self._best is None or _merit(evaluation) > _merit(self._best[0]):
            self._best = (evaluation, adapter, step)
        seconds = time.perf_counter() - self._started
        self._curve.append(CurvePoint(step, seconds, evaluation.loss, evaluation.quality))
        self._job.report(self._curve[-1])
        verdict = self._job.watch(evaluation)
        if verdict is Verdict.READY and self._ready is None:
            self._ready = (self._curve[-1], adapter)
        return verdict

    def _is_over(self, verdict: Verdict) -> bool:
        return verdict is Verdict.DROP or (verdict is Verdict.READY and not self._job.plan.runs_on)

    def _descend(self, optimizer: torch.optim.Optimizer, rows: list[Encoded], step: int) -> None:
        self._weights.attach()
        with self._weights:
            optimizer.zero_grad()
            loss = self._loss(rows)
            loss.backward()
        if not math.isfinite(loss.item()):
            raise BrokenRunError(f"the loss became {loss.item()} at step {step}", self._result(step, Verdict.GO_ON))
        nn.utils.clip_grad_norm_(self._weights.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()

    def _loss(self, rows: list[Encoded]) -> Tensor:
        logits_LV, labels_L, _ = label_logits(self._model, collate(rows))
        return cross_entropy(logits_LV, labels_L)

    def _result(self, steps_done: int, verdict: Verdict) -> TrainingResult:
        assert self._best is not None, "the start has been judged"
        evaluation, adapter, step = self._best
        return TrainingResult(self._curve, adapter, evaluation, step, self._last, steps_done, verdict, self._ready)


def decoupled_start(old: Adapter, evolution: Adapter, alpha: float = 1.0, beta: float = 0.0) -> Decoupled:
    """The ladder's initialisation: the old adapter and the base's evolution as two frozen directions.

    Adds alpha * T + beta * E at its start, exactly; their magnitudes are then learned beside a fresh direction (see
    `train_decoupled`). The evolution of modules that the old adapter leaves alone is left out.
    """
    shared = {name: factors for name, factors in evolution.factors.items() if name in old.factors}
    parts = [(decouple(old), alpha), (decouple(Adapter(shared)), beta)]
    directions = tuple(direction for part, _ in parts for direction in part.directions)
    return Decoupled(directions, tuple(m * weight for part, weight in parts for m in part.magnitudes))


def _length(start: Decoupled) -> float:
    """The old adapter's mean length by module; 1 where it adds nothing."""
    return start.magnitudes[0] or 1.0 if start.magnitudes else 1.0


def _merit(evaluation: Evaluation) -> tuple[float, float]:
    return evaluation.quality, -evaluation.loss if math.isfinite(evaluation.loss) else -math.inf
