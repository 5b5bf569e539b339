"""Training runs side by side: many adapters trained in one pass over the base that they share."""

import math
import time
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from functools import partial
from itertools import islice

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cluster.adapters.files import Adapter, check_fits
from cluster.errors import ReloraError
from readapt.training.causal_lm import CausalLM
from readapt.training.data import Encoded, shuffled_batches
from readapt.training.evaluate import Evaluation, Verdict
from readapt.training.lora import linear_shapes
from readapt.training.lora_stack import ALL_ROWS, LoraHooks, LoraStack, Segment, layout_of, values_of
from readapt.training.optimiser import MAX_GRADIENT_NORM, adamw_, clip_, learning_rate, pull
from readapt.training.packed_batch import PackedBatch, pack_batch
from readapt.training.training_run import BrokenRunError, CurvePoint, RunError, TrainingResult, TrainingRun

READY_GROWTH = 4  # intervals between evaluations of a run that is ready and runs on
SAMPLED_ROWS = 64  # their mean length decides which runs share a cohort


class TrainingGroup:
    """Trains adapters side by side on one model. They may join and leave between any two steps.

    The model is bare between the calls. Each run has its own rows, loss, clipping, schedule, optimiser state and end,
    so it goes as it would alone, up to rounding. Runs of one cohort (equal layout and batch size, rows of similar
    length) share every product; all runs share those of the base.
    """

    def __init__(self, model: CausalLM):
        self.model = model
        self._hooks = LoraHooks(model)
        self._cohorts: dict[Hashable, _Cohort] = {}

    def add(self, key: Hashable, run: TrainingRun) -> None:
        """Take in a run, which begins with the next step. InvalidAdapterError if it does not fit the model."""
        check_fits(run.start, linear_shapes(self.model))
        assert all(key != state.key for cohort in self._cohorts.values() for state in cohort.states), (
            f"two runs {key!r}"
        )
        self._cohorts.setdefault(_cohort_key(run), _Cohort(self.model.device)).add(_RunState(key, run))
        self._update_hooks()

    def step(self) -> list[tuple[Hashable, TrainingResult | RunError]]:
        """Evaluate the runs that are due, then train each run one step. Return the runs that ended, with their ends.

        A run whose loss is no longer finite ends with a BrokenRunError. A run whose evaluation or rows fail ends with
        that error. The other runs continue. An error in the shared pass is raised.
        """
        ended = self._remove_ended([cohort.evaluate(self._hooks) for cohort in self._cohorts.values()])
        ended += self._remove_ended([cohort.draw() for cohort in self._cohorts.values()])
        if self._cohorts:
            losses = iter(self._compute_gradients())
            cohorts = self._cohorts.values()
            ended += self._remove_ended([cohort.update(list(islice(losses, len(cohort.states)))) for cohort in cohorts])
        return ended

    def close(self) -> None:
        """Drop all runs that have not ended and leave the model bare."""
        self._cohorts = {}
        self._update_hooks()

    def _remove_ended(
        self, ends: Sequence[Mapping[int, TrainingResult | RunError]]
    ) -> list[tuple[Hashable, TrainingResult | RunError]]:
        """Remove the runs that ended. `ends` has one mapping per cohort, from the run's row to its end."""
        ended: list[tuple[Hashable, TrainingResult | RunError]] = []
        for cohort, by_row in zip(self._cohorts.values(), ends, strict=True):
            ended += [(cohort.states[row].key, end) for row, end in by_row.items()]
            if by_row:
                cohort.remove(by_row)
        self._cohorts = {key: cohort for key, cohort in self._cohorts.items() if cohort.states}
        self._update_hooks()
        return ended

    def _update_hooks(self) -> None:
        self._hooks.set_modules(name for cohort in self._cohorts.values() for name in cohort.stack.factors)

    def _compute_gradients(self) -> list[float]:
        """Return the losses of every run's next batch, from one pass over the base. The stacks keep the gradients."""
        cohorts = list(self._cohorts.values())
        batch = pack_batch([[state.batch for state in cohort.states] for cohort in cohorts])
        segments = [Segment(cohort.stack, rows) for cohort, rows in zip(cohorts, batch.cohort_rows, strict=True)]
        with self._hooks.running(*segments):
            losses_A = mean_losses(self.model, batch, sum(len(cohort.states) for cohort in cohorts))
            losses_A.sum().backward()
        return [float(loss) for loss in losses_A.tolist()]


def mean_losses(model: CausalLM, batch: PackedBatch, num_adapters: int) -> Tensor:
    """Return each adapter's mean loss [A] over its label tokens. The head runs only where a label is predicted."""
    device = model.device
    hidden_BTD = model.base_model(
        input_ids=batch.input_ids_BT.to(device), position_ids=batch.position_ids_BT.to(device), use_cache=False
    ).last_hidden_state
    logits_YV = model.get_output_embeddings()(hidden_BTD.flatten(0, 1)[batch.predictors_Y.to(device)])
    losses_Y = cross_entropy(logits_YV.float(), batch.labels_Y.to(device), reduction="none")
    num_labels_A = batch.owners_Y.bincount(minlength=num_adapters).to(device)
    return losses_Y.new_zeros(num_adapters).index_add(0, batch.owners_Y.to(device), losses_Y) / num_labels_A


def fine_tune(model: CausalLM, run: TrainingRun) -> TrainingResult:
    """Train one adapter on a bare model to the end of its run: a group of one.

    The model is bare again afterwards. BrokenRunError if the loss is no longer finite; errors of the evaluation and of
    the rows are raised as they are.
    """
    group = TrainingGroup(model)
    group.add(0, run)
    try:
        while not (ended := group.step()):
            pass
    finally:
        group.close()
    [(_, end)] = ended
    if isinstance(end, Exception):
        raise end
    return end


def _cohort_key(run: TrainingRun) -> Hashable:
    """Return what runs of one cohort have in common, so that each fills about as much of a batch as the others.

    It is the layout, the rows per batch, and the mean length of a row within a factor of two.
    """
    sample = run.rows[:SAMPLED_ROWS]
    mean_tokens = sum(len(row.input_ids) for row in sample) / len(sample)
    return layout_of(run.start), run.settings.batch_rows, round(math.log2(mean_tokens))


class _RunState:
    """What one run has done and reached so far."""

    def __init__(self, key: Hashable, run: TrainingRun):
        self.key = key
        self.run = run
        self._batches = shuffled_batches(run.rows, run.settings.batch_rows, run.settings.seed)
        self.batch: list[Encoded] = []
        self.num_steps = 0
        self._started = time.perf_counter()
        self._curve: list[CurvePoint] = []
        self._best: tuple[Evaluation, Adapter, int] | None = None
        self._ready: tuple[CurvePoint, Adapter] | None = None

    @property
    def is_due(self) -> bool:
        """Whether it is evaluated before its next step: when its settings say so, less often once it is ready."""
        settings = self.run.settings
        runs_on = self._ready is not None and self.num_steps < settings.steps
        return settings.is_due(self.num_steps) and not (
            runs_on and self.num_steps % (READY_GROWTH * settings.eval_every)
        )

    def draw(self) -> None:
        """Take the rows of the next step. InvalidDataError if one cannot be encoded."""
        self.batch = next(self._batches)

    def evaluate(self, export: Callable[[], Adapter]) -> TrainingResult | None:
        """Evaluate the adapter, which `export` copies. Return the result if the run is over."""
        known = self.run.known if self.num_steps == 0 else None
        evaluation = known or self.run.evaluate()
        if self._best is None or _merit(evaluation) > _merit(self._best[0]):
            self._best = (evaluation, export(), self.num_steps)
        seconds = time.perf_counter() - self._started
        self._curve.append(CurvePoint(self.num_steps, seconds, evaluation.loss, evaluation.quality))
        self.run.report(self._curve[-1])
        verdict = self.run.watch(evaluation)
        if verdict is Verdict.READY and self._ready is None:
            self._ready = (self._curve[-1], export())
        is_ended = verdict is Verdict.DROP or (verdict is Verdict.READY and not self.run.settings.runs_on)
        is_over = is_ended or self.num_steps == self.run.settings.steps
        return self._result(export(), verdict) if is_over else None

    def broken(self, loss: float, last: Adapter) -> BrokenRunError:
        """Return the end of this run if its loss is no longer finite."""
        kept = self._result(last, Verdict.GO_ON)
        return BrokenRunError(f"the loss became {loss} at step {self.num_steps}", kept)

    def _result(self, last: Adapter, verdict: Verdict) -> TrainingResult:
        assert self._best is not None
        evaluation, best, best_step = self._best
        return TrainingResult(self._curve, best, evaluation, best_step, last, self.num_steps, verdict, self._ready)

    def rates(self) -> tuple[float, float]:
        """Return the learning rate of the next step, and the share of the way to the anchor that it goes."""
        settings = self.run.settings
        step = self.num_steps
        rate = learning_rate(step, settings.steps, settings.learning_rate, settings.warmup_steps)
        strength = pull(step, settings.steps, settings.pull_strong, settings.pull_weak, settings.strong_fraction)
        return rate, strength * rate / settings.learning_rate


class _Cohort:
    """Runs whose adapters share a `LoraStack`. Row i of every tensor here belongs to run i."""

    def __init__(self, device: torch.device):
        self._device = device
        self.states: list[_RunState] = []

    def add(self, state: _RunState) -> None:
        run = state.run
        start_Z = values_of(run.start)
        anchor = run.settings.anchor
        assert anchor is None or layout_of(anchor) == layout_of(run.start), "the pull goes value by value"
        anchor_Z = start_Z if anchor is None else values_of(anchor)
        moment_Z = torch.zeros_like(start_Z)
        joining_51Z = torch.stack([start_Z, start_Z, anchor_Z, moment_Z, moment_Z])[:, None].to(self._device)
        tensors_5AZ = torch.cat([self._tensors_5AZ, joining_51Z], dim=1) if self.states else joining_51Z
        self.states.append(state)
        self._restack(tensors_5AZ)

    def remove(self, rows: Collection[int]) -> None:
        """Remove the runs of these rows. A cohort without runs cannot be used again."""
        staying = [row for row in range(len(self.states)) if row not in rows]
        self.states = [self.states[row] for row in staying]
        if staying:
            self._restack(self._tensors_5AZ[:, staying])

    def _restack(self, tensors_5AZ: Tensor) -> None:
        self._tensors_5AZ = tensors_5AZ  # values, their averages, anchors, first moments, second moments
        starts = [state.run.start for state in self.states]
        self.stack = LoraStack(starts, tensors_5AZ[0])
        self._averages = LoraStack(starts, tensors_5AZ[1])

    def evaluate(self, hooks: LoraHooks) -> dict[int, TrainingResult | RunError]:
        """Evaluate the runs that are due, each with only its adapter on the model. Return the ends of finished runs."""
        ends: dict[int, TrainingResult | RunError] = {}
        for row, state in enumerate(self.states):
            if state.is_due and (end := self._evaluate(hooks, row, state)) is not None:
                ends[row] = end
        return ends

    def _evaluate(self, hooks: LoraHooks, row: int, state: _RunState) -> TrainingResult | RunError | None:
        try:
            with hooks.running(Segment(self._averages, ALL_ROWS, row)):
                return state.evaluate(partial(self._averages.adapter, row))
        except (ReloraError, RuntimeError) as error:
            return error

    def draw(self) -> dict[int, RunError]:
        """Take every run's next rows. Return the errors of the runs whose rows cannot be used."""
        failed: dict[int, RunError] = {}
        for row, state in enumerate(self.states):
            try:
                state.draw()
            except ReloraError as error:
                failed[row] = error
        return failed

    def update(self, losses_A: Sequence[float]) -> dict[int, BrokenRunError]:
        """Take one step of each run with the gradients in the stack. Return the errors of runs that are broken."""
        broken = {
            row: state.broken(loss, self._averages.adapter(row))
            for row, (state, loss) in enumerate(zip(self.states, losses_A, strict=True))
            if not math.isfinite(loss)
        }
        rates, shares = zip(*(state.rates() for state in self.states), strict=True)
        for state in self.states:
            state.num_steps += 1
        values_AZ, averages_AZ, anchors_AZ, first_AZ, second_AZ = self._tensors_5AZ
        gradients_AZ = self.stack.take_gradients()
        clip_(gradients_AZ, MAX_GRADIENT_NORM)
        adamw_(values_AZ, gradients_AZ, first_AZ, second_AZ, [state.num_steps for state in self.states], rates)
        if any(shares):
            values_AZ.lerp_(anchors_AZ, torch.tensor(shares, device=self._device)[:, None])
        new_shares = [1 - state.run.settings.averaging for state in self.states]
        averages_AZ.lerp_(values_AZ, torch.tensor(new_shares, device=self._device)[:, None])
        return broken


def _merit(evaluation: Evaluation) -> tuple[float, float]:
    return evaluation.quality, -evaluation.loss if math.isfinite(evaluation.loss) else -math.inf
