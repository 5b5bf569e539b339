"""Fine-tuning: one adapter, or many side by side in one pass over the base that they share.

Shape letters as in `stack`: K adapters, N values of one, L label positions.
"""

import math
import time
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cluster.adapter_files import Adapter, check_fits
from cluster.errors import ReloraError, TrainingError
from readapt.training.adamw import adamw_, clip_
from readapt.training.causal_lm import CausalLM
from readapt.training.data import Encoded, shuffled_batches
from readapt.training.evaluate import Evaluation, Verdict
from readapt.training.lora import linear_shapes
from readapt.training.lora_stack import ALL_ROWS, LoraHooks, LoraStack, Segment, flatten, layout_of
from readapt.training.packed_batch import PackedBatch, pack
from readapt.training.schedule import learning_rate, pull

MAX_GRADIENT_NORM = 1.0
GROWTH_AFTER = 16
READY_GROWTH = 4  # in evaluation intervals, of a run that is ready but uses up its steps
GROUPING_ROWS = 64  # that tell how long a job's rows are


class BrokenRunError(TrainingError):
    """The loss is no longer finite; `kept` is what the run had reached before."""

    def __init__(self, message: str, kept: "TrainingResult"):
        super().__init__(message, kept)
        self.kept = kept

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class RunSettings:
    """What a run does. `anchor` is the adapter that the pull goes to: None for the run's own start.

    It is evaluated before the first step, after the last, and in between every `eval_every` steps; half as often from
    `GROWTH_AFTER` such intervals on, and so again whenever it has gone on twice as long: there is less to be missed.
    `runs_on`: when it is ready to ship, it goes on to the end of its steps. `averaging` is the decay a step of the
    moving average of the weights, which is what is evaluated and kept; 0 for the weights themselves.
    """

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
    runs_on: bool = False
    averaging: float = 0.0

    def is_due(self, step: int) -> bool:
        """Whether it is evaluated after so many steps."""
        doublings = (step // (self.eval_every * GROWTH_AFTER)).bit_length()
        return step % (self.eval_every << doublings) == 0 or step == self.steps


@dataclass(frozen=True)
class CurvePoint:
    """A held-out evaluation after `step` steps, `seconds` after the run's start (evaluations included)."""

    step: int
    seconds: float
    loss: float
    quality: float


@dataclass(frozen=True)
class TrainingResult:
    """`best` is the best evaluated checkpoint, the start among them; `last` are the weights that the run ended with.

    `ready` is the evaluation, and the checkpoint, at which the watcher first said READY; `verdict` is its last word.
    """

    curve: list[CurvePoint]
    best: Adapter
    best_evaluation: Evaluation
    best_step: int
    last: Adapter
    steps_done: int
    verdict: Verdict
    ready: tuple[CurvePoint, Adapter] | None

    @property
    def best_quality(self) -> float:
        """That of the best checkpoint, an estimate where its evaluation was given up."""
        return self.best_evaluation.quality

    @property
    def is_ready(self) -> bool:
        """Whether the watcher was content."""
        return self.ready is not None


def go_on(evaluation: Evaluation) -> Verdict:
    """The watcher of a run that uses up its steps."""
    return Verdict.GO_ON


@dataclass(frozen=True)
class TrainingRun:
    """One adapter's run: from `start`, on `rows`, as `plan` says.

    `evaluate` is called when `plan` has it due, each time with this adapter alone on the model; `watch` says after each
    evaluation whether the run goes on, `report` hears of it first. `known` is the start's evaluation where it has been
    made already.
    """

    start: Adapter
    rows: Sequence[Encoded]
    plan: RunSettings
    evaluate: Callable[[], Evaluation]
    watch: Callable[[Evaluation], Verdict] = go_on
    report: Callable[[CurvePoint], None] = lambda point: None
    known: Evaluation | None = None


End = TrainingResult | BrokenRunError
Failure = ReloraError | RuntimeError  # RuntimeError is torch's for out of memory and shapes that do not fit


class TrainingGroup:
    """Trains adapters side by side on one model; they may join and leave between any two steps.

    The model is bare between the calls. No job sees the others: each has its own rows, loss, clipping, schedule,
    optimiser state and end, and goes as it would alone, to rounding. Jobs of one layout, batch size and length of rows
    share every product; others only those of the base.
    """

    def __init__(self, model: CausalLM):
        self.model = model
        self._hooks = LoraHooks(model)
        self._groups: dict[Hashable, _Group] = {}

    def add(self, key: Hashable, job: TrainingRun) -> None:
        """Takes in a job, which begins with the next step. InvalidAdapterError where it does not fit the model."""
        check_fits(job.start, linear_shapes(self.model))
        assert all(key != run.key for group in self._groups.values() for run in group.runs), f"two jobs named {key!r}"
        self._groups.setdefault(_group_key(job), _Group(self.model.device)).add(_Run(key, job))
        self._cover()

    def step(self) -> list[tuple[Hashable, End | Failure]]:
        """Evaluates those that are due, then trains each one step further. Returns those that ended, with their ends.

        A run whose loss is no longer finite ends with a BrokenRunError, one whose own evaluation or rows fail with that
        error; the others do not notice. What fails in the pass that all share is raised.
        """
        ended = self._leave([group.watch(self._hooks) for group in self._groups.values()])
        ended += self._leave([group.draw() for group in self._groups.values()])
        if self._groups:
            losses = iter(self._compute_gradients())
            groups = self._groups.values()
            ended += self._leave([group.update(list(islice(losses, len(group.runs)))) for group in groups])
        return ended

    def close(self) -> None:
        """Leaves the model bare, whatever has not ended."""
        self._groups = {}
        self._cover()

    def _leave(self, ends: Sequence[Mapping[int, End | Failure]]) -> list[tuple[Hashable, End | Failure]]:
        """Takes out what has ended; `ends` are by row, for each group."""
        finished: list[tuple[Hashable, End | Failure]] = []
        for group, by_row in zip(self._groups.values(), ends, strict=True):
            finished += [(group.runs[member].key, end) for member, end in by_row.items()]
            if by_row:
                group.remove(by_row)
        self._groups = {key: group for key, group in self._groups.items() if group.runs}
        self._cover()
        return finished

    def _cover(self) -> None:
        self._hooks.cover(name for group in self._groups.values() for name in group.stack.factors)

    def _compute_gradients(self) -> list[float]:
        """Losses of every run's next batch, in one pass over the base; their gradients are left in the stacks."""
        groups = list(self._groups.values())
        batch = pack([[run.batch for run in group.runs] for group in groups])
        segments = [Segment(group.stack, rows) for group, rows in zip(groups, batch.group_rows, strict=True)]
        with self._hooks.running(*segments):
            losses_K = mean_losses(self.model, batch, sum(len(group.runs) for group in groups))
            losses_K.sum().backward()
        return [float(loss) for loss in losses_K.tolist()]


def mean_losses(model: CausalLM, batch: PackedBatch, num_adapters: int) -> Tensor:
    """Mean loss [K] over the labels of each adapter; the head runs at their predictors only."""
    device = model.device
    hidden_BTD = model.base_model(
        input_ids=batch.input_ids_BT.to(device), position_ids=batch.position_ids_BT.to(device), use_cache=False
    ).last_hidden_state
    logits_LV = model.get_output_embeddings()(hidden_BTD.flatten(0, 1)[batch.predictors_L.to(device)])
    losses_L = cross_entropy(logits_LV.float(), batch.labels_L.to(device), reduction="none")
    num_labels_K = batch.owners_L.bincount(minlength=num_adapters).to(device)
    return losses_L.new_zeros(num_adapters).index_add(0, batch.owners_L.to(device), losses_L) / num_labels_K


def fine_tune(model: CausalLM, job: TrainingRun) -> TrainingResult:
    """Trains one adapter on a bare model to the end of its run: a pack of one.

    The model is bare again afterwards. BrokenRunError when the loss is no longer finite; errors of the evaluation and
    of the rows are passed on.
    """
    training = TrainingGroup(model)
    training.add(0, job)
    try:
        while not (ended := training.step()):
            pass
    finally:
        training.close()
    [(_, end)] = ended
    if isinstance(end, Exception):
        raise end
    return end


def _group_key(job: TrainingRun) -> Hashable:
    """Jobs that fill a batch about equally: the same layout and rows a batch, lengths within a factor of two."""
    sample = job.rows[:GROUPING_ROWS]
    mean_tokens = sum(len(row.input_ids) for row in sample) / len(sample)
    return layout_of(job.start), job.plan.batch_rows, round(math.log2(mean_tokens))


class _Run:
    """One job on its way: what it has done and reached so far."""

    def __init__(self, key: Hashable, job: TrainingRun):
        self.key, self.job = key, job
        self._batches = shuffled_batches(job.rows, job.plan.batch_rows, job.plan.seed)
        self.batch: list[Encoded] = []
        self.num_steps = 0
        self._started = time.perf_counter()
        self._curve: list[CurvePoint] = []
        self._best: tuple[Evaluation, Adapter, int] | None = None
        self._ready: tuple[CurvePoint, Adapter] | None = None

    @property
    def is_due(self) -> bool:
        """Whether it is to be evaluated before it goes on: when the plan says so, more rarely once it is ready."""
        plan = self.job.plan
        is_late = self._ready is not None and self.num_steps < plan.steps
        return plan.is_due(self.num_steps) and not (is_late and self.num_steps % (READY_GROWTH * plan.eval_every))

    def draw(self) -> None:
        """Turns to the rows of the next step. InvalidDataError where one cannot be encoded."""
        self.batch = next(self._batches)

    def watch(self, export: Callable[[], Adapter]) -> TrainingResult | None:
        """Evaluates; the result if the run is over."""
        known = self.job.known if self.num_steps == 0 else None
        evaluation = known or self.job.evaluate()
        if self._best is None or _merit(evaluation) > _merit(self._best[0]):
            self._best = (evaluation, export(), self.num_steps)
        seconds = time.perf_counter() - self._started
        self._curve.append(CurvePoint(self.num_steps, seconds, evaluation.loss, evaluation.quality))
        self.job.report(self._curve[-1])
        verdict = self.job.watch(evaluation)
        if verdict is Verdict.READY and self._ready is None:
            self._ready = (self._curve[-1], export())
        is_ended = verdict is Verdict.DROP or (verdict is Verdict.READY and not self.job.plan.runs_on)
        is_over = is_ended or self.num_steps == self.job.plan.steps
        return self._result(export(), verdict) if is_over else None

    def broken(self, loss: float, last: Adapter) -> BrokenRunError:
        """The end of a run whose loss is no longer finite."""
        kept = self._result(last, Verdict.GO_ON)
        return BrokenRunError(f"the loss became {loss} at step {self.num_steps}", kept)

    def _result(self, last: Adapter, verdict: Verdict) -> TrainingResult:
        assert self._best is not None
        evaluation, best, best_step = self._best
        return TrainingResult(self._curve, best, evaluation, best_step, last, self.num_steps, verdict, self._ready)

    def rates(self) -> tuple[float, float]:
        """The learning rate of the step that is due, and the share of the way to the anchor."""
        plan = self.job.plan
        rate = learning_rate(self.num_steps, plan.steps, plan.learning_rate, plan.warmup_steps)
        strength = pull(self.num_steps, plan.steps, plan.pull_strong, plan.pull_weak, plan.strong_fraction)
        return rate, strength * rate / plan.learning_rate


class _Group:
    """Runs whose adapters share a stack; run k has row k of all that is kept for them."""

    def __init__(self, device: torch.device):
        self._device = device
        self.runs: list[_Run] = []

    def add(self, run: _Run) -> None:
        plan, start = run.job.plan, flatten(run.job.start)
        assert plan.anchor is None or layout_of(plan.anchor) == layout_of(run.job.start), "the pull goes value by value"
        anchor = start if plan.anchor is None else flatten(plan.anchor)
        moments = torch.zeros_like(start)
        joining_S1N = torch.stack([start, start, anchor, moments, moments])[:, None].to(self._device)
        state_SKN = torch.cat([self._state_SKN, joining_S1N], dim=1) if self.runs else joining_S1N
        self.runs.append(run)
        self._restack(state_SKN)

    def remove(self, members: Collection[int]) -> None:
        """Takes out the runs of these rows; without runs a group is of no more use."""
        staying = [k for k in range(len(self.runs)) if k not in members]
        self.runs = [self.runs[k] for k in staying]
        if staying:
            self._restack(self._state_SKN[:, staying])

    def _restack(self, state_SKN: Tensor) -> None:
        self._state_SKN = state_SKN  # S: values, their averages, anchors, first and second moments
        starts = [run.job.start for run in self.runs]
        self.stack, self._averages = LoraStack(starts, state_SKN[0]), LoraStack(starts, state_SKN[1])

    def watch(self, hooks: LoraHooks) -> dict[int, TrainingResult | Failure]:
        """Evaluates the runs that are due, each with its adapter alone on the model; ends of those that are over."""
        ends: dict[int, TrainingResult | Failure] = {}
        for member, run in enumerate(self.runs):
            if run.is_due and (end := self._watched(hooks, member, run)) is not None:
                ends[member] = end
        return ends

    def _watched(self, hooks: LoraHooks, member: int, run: _Run) -> TrainingResult | Failure | None:
        try:
            with hooks.running(Segment(self._averages, ALL_ROWS, member)):
                return run.watch(partial(self._averages.adapter, member))
        except (ReloraError, RuntimeError) as error:
            return error

    def draw(self) -> dict[int, Failure]:
        """Turns every run to its next rows; errors of those whose rows cannot be used."""
        failed: dict[int, Failure] = {}
        for member, run in enumerate(self.runs):
            try:
                run.draw()
            except ReloraError as error:
                failed[member] = error
        return failed

    def update(self, losses_K: Sequence[float]) -> dict[int, BrokenRunError]:
        """One step of each run with the gradients that lie ready; errors of those whose loss is not finite."""
        broken = {
            k: run.broken(loss, self._averages.adapter(k))
            for k, (run, loss) in enumerate(zip(self.runs, losses_K, strict=True))
            if not math.isfinite(loss)
        }
        rates, shares = zip(*(run.rates() for run in self.runs), strict=True)
        for run in self.runs:
            run.num_steps += 1
        values_KN, averages_KN, anchors_KN, first_KN, second_KN = self._state_SKN
        gradients_KN = self.stack.take_gradients()
        clip_(gradients_KN, MAX_GRADIENT_NORM)
        adamw_(values_KN, gradients_KN, first_KN, second_KN, [run.num_steps for run in self.runs], rates)
        if any(shares):
            values_KN.lerp_(anchors_KN, torch.tensor(shares, device=self._device)[:, None])
        new_shares = [1 - run.job.plan.averaging for run in self.runs]
        averages_KN.lerp_(values_KN, torch.tensor(new_shares, device=self._device)[:, None])
        return broken


def _merit(evaluation: Evaluation) -> tuple[float, float]:
    return evaluation.quality, -evaluation.loss if math.isfinite(evaluation.loss) else -math.inf
