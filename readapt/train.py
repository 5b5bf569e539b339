"""Fine-tuning of one adapter: one flat loop.

Shape letters as in `evaluate`: L label positions, V vocabulary.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cluster.adapter_files import Adapter
from cluster.errors import TrainingError
from readapt.data import Encoded, collate
from readapt.evaluate import Evaluation, label_logits
from readapt.lora import LoraWeights
from readapt.schedule import learning_rate, pull

MAX_GRADIENT_NORM = 1.0


class BrokenRunError(TrainingError):
    """The loss is no longer finite; `kept` is what the run had reached before."""

    def __init__(self, message: str, kept: "TrainResult"):
        super().__init__(message, kept)
        self.kept = kept

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Plan:
    """What a run does. `anchor` is the adapter that the pull goes to: None for the run's own start."""

    steps: int
    learning_rate: float
    batch_rows: int = 16
    eval_every: int = 20
    warmup_steps: int = 0
    pull_strong: float = 0.0
    pull_weak: float = 0.0
    strong_fraction: float = 0.0
    anchor: Adapter | None = None
    seed: int = 0


@dataclass(frozen=True)
class CurvePoint:
    """A held-out evaluation after `step` steps, `seconds` after the run's start (evaluations included)."""

    step: int
    seconds: float
    loss: float
    quality: float


@dataclass(frozen=True)
class TrainResult:
    """`best` is the best evaluated checkpoint, the start among them; `accepted`: `accept` stopped the run."""

    curve: list[CurvePoint]
    best: Adapter
    best_quality: float
    best_step: int
    steps_done: int
    accepted: bool


def fine_tune(
    model: Any,
    lora: LoraWeights,
    rows: Sequence[Encoded],
    plan: Plan,
    *,
    evaluate: Callable[[], Evaluation],
    accept: Callable[[Evaluation], bool],
    report: Callable[[CurvePoint], None] = lambda point: None,
) -> TrainResult:
    """Trains the adapter on `model` from where it stands, until `accept` is content or the steps are used up.

    Evaluates before the first step, every `eval_every` steps and after the last; `report` hears of each evaluation.
    AdamW on the LoRA factors alone; the pull to the anchor is decoupled from it. Leaves `lora` at the last step's
    weights. BrokenRunError when the loss is no longer finite.
    """
    started = time.perf_counter()
    parameters = lora.parameters()
    anchor = _anchor(parameters, plan.anchor, lora)
    optimizer = torch.optim.AdamW(parameters, lr=plan.learning_rate, weight_decay=0.0, foreach=True)
    batches = _batches(rows, plan.batch_rows, plan.seed)
    keeper = _Keeper(lora)
    for step in range(plan.steps + 1):
        is_last = step == plan.steps
        if step % plan.eval_every == 0 or is_last:
            evaluation = evaluate()
            report(keeper.keep(step, time.perf_counter() - started, evaluation))
            if accept(evaluation):
                return keeper.result(step, accepted=True)
        if is_last:
            break
        rate = learning_rate(step, plan.steps, plan.learning_rate, plan.warmup_steps)
        _set_rate(optimizer, rate)
        loss = _compute_gradients(model, parameters, next(batches))
        if not math.isfinite(loss):
            raise BrokenRunError(f"the loss became {loss} at step {step}", keeper.result(step, accepted=False))
        nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
        optimizer.step()
        strength = pull(step, plan.steps, plan.pull_strong, plan.pull_weak, plan.strong_fraction)
        _pull_to(anchor, parameters, strength * rate / plan.learning_rate)
    return keeper.result(plan.steps, accepted=False)


class _Keeper:
    """Keeps the curve and the best checkpoint: highest quality, among equals the lowest loss."""

    def __init__(self, lora: LoraWeights):
        self._lora = lora
        self._curve: list[CurvePoint] = []
        self._best: tuple[Evaluation, Adapter, int] | None = None

    def keep(self, step: int, seconds: float, evaluation: Evaluation) -> CurvePoint:
        if self._best is None or _merit(evaluation) > _merit(self._best[0]):
            self._best = (evaluation, self._lora.export(), step)
        self._curve.append(CurvePoint(step, seconds, evaluation.loss, evaluation.quality))
        return self._curve[-1]

    def result(self, steps_done: int, *, accepted: bool) -> TrainResult:
        assert self._best is not None
        evaluation, best, best_step = self._best
        return TrainResult(self._curve, best, evaluation.quality, best_step, steps_done, accepted)


def _merit(evaluation: Evaluation) -> tuple[float, float]:
    return evaluation.quality, -evaluation.loss if math.isfinite(evaluation.loss) else -math.inf


def _anchor(parameters: list[nn.Parameter], anchor: Adapter | None, lora: LoraWeights) -> list[Tensor]:
    if anchor is None:
        return [p.detach().clone() for p in parameters]
    factors = [anchor.factors[name] for name in lora.modules]
    tensors = [f.a_RD for f in factors] + [f.b_FR for f in factors]
    return [t.to(p.device, p.dtype) for t, p in zip(tensors, parameters, strict=True)]


def _batches(rows: Sequence[Encoded], batch_rows: int, seed: int) -> Iterator[list[Encoded]]:
    """Epoch after epoch in ever new order; a batch may reach from one epoch into the next."""
    generator = torch.Generator().manual_seed(seed)
    assert rows, "files without rows are refused when they are read"
    queue: list[int] = []
    while True:
        while len(queue) < batch_rows:
            queue += torch.randperm(len(rows), generator=generator).tolist()
        yield [rows[index] for index in queue[:batch_rows]]
        del queue[:batch_rows]


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _compute_gradients(model: Any, parameters: list[nn.Parameter], rows: list[Encoded]) -> float:
    for parameter in parameters:
        parameter.grad = None
    logits_LV, labels_L, _ = label_logits(model, collate(rows))
    loss = cross_entropy(logits_LV, labels_L)
    loss.backward()
    return loss.item()


@torch.no_grad()
def _pull_to(anchor: list[Tensor], parameters: list[nn.Parameter], share: float) -> None:
    if share:
        torch._foreach_lerp_(parameters, anchor, share)
