"""The ladder: carry one adapter over to a new base by trying rungs, cheapest first, until one passes the gate.

    copy        the old adapter, unchanged
    transplant  a closed-form adapter that does on the task's rows what the old service did (`transplant`). If it misses
                the gate by more than `FAR_POINTS`, a second one with more rows and higher ranks: rung "wide"
    fused       alpha * T + beta * E: the old adapter plus the evolution, with coefficients found by search
    train       fine-tuning from the best of the starts above, with scheduled regularisation. Steps up to `short_steps`
                are reported as rung "short", later ones as "full"
    scratch     a new adapter, trained as if there were no old one

Where the gate is decided, always on the gate's rows and by `Gate.passes`:
    a start          once, in `_add_start`
    a training run   after each evaluation, in `Watcher` (readapt.training.evaluate): two passes in a row are needed
    the whole climb  in `_outcome`, for the best adapter found. If no rung passed but scratch was trained,
                     `_lower_gate` first lowers the gate to what scratch reached

The fleet file chooses the rungs, so known methods are choices of rungs: ReLoRA is fused and train, copying and
fine-tuning is copy and train without a pull, retraining is scratch alone. A rung that fails (a search without a trial,
a transplant for an unknown model family) is noted and skipped. The climb fails only if no rung leads to an adapter.
"""

import math
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

from cluster.adapters.files import Adapter
from cluster.config.readapt import ReadaptConfig, TransplantConfig
from cluster.errors import ReloraError, TrainingError
from readapt.fusion.objective import FusionObjective, SearchResult
from readapt.ladder.inputs import Bases, LadderTask
from readapt.ladder.outcome import Attempt, Outcome, Ready, attempts_by_rung
from readapt.ladder.rungs import REUSING, rungs_for
from readapt.ladder.runs import anchor_adapter, scratch_settings, scratch_start, warm_settings
from readapt.ladder.starts import Start, transplanted
from readapt.lowrank.delta import cosine
from readapt.training.data import EncodedRows
from readapt.training.evaluate import Evaluation, Evaluator, Watcher
from readapt.training.lora import attached
from readapt.training.training_group import fine_tune
from readapt.training.training_run import BrokenRunError, CurvePoint, RunError, RunSettings, TrainingResult, TrainingRun

FAR_POINTS = 3.0  # a smaller gap is closed by short training; measured: a gap of 8 points took it 440 steps

FusionSearch = Callable[[FusionObjective], SearchResult | None]
"""Searches for the fused start. None means: still searching elsewhere, ask again."""

ReturnT = TypeVar("ReturnT")
LadderSteps = Generator[TrainingRun | None, TrainingResult | None, ReturnT]
"""Yields each training run it wants and is sent the result, or has the run's error thrown in.

Yields None while its search runs elsewhere, and is sent None. One driver can thus train many ladders' runs together.
"""


@dataclass(frozen=True)
class _Candidate:
    """An adapter that was evaluated on the gate's rows."""

    rung: str
    adapter: Adapter
    evaluation: Evaluation
    alpha: float
    beta: float

    @property
    def quality(self) -> float:
        return self.evaluation.quality


class Ladder:
    """Climbs for one adapter. Both base models must be bare, and are bare again afterwards.

    `search` finds the fused start. `report` is called with (rung, point) after each evaluation.
    """

    def __init__(
        self,
        bases: Bases,
        task: LadderTask,
        config: ReadaptConfig,
        search: FusionSearch,
        *,
        report: Callable[[str, CurvePoint], None] = lambda rung, point: None,
    ):
        self._bases, self._task, self._config = bases, task, config
        self._search, self._report = search, report
        self._gate = task.gate
        self._evaluator = Evaluator(
            bases.new, bases.encoder, task.rows.gate, task.metric, gate=task.gate, confidence=config.gate.confidence
        )
        self._train_rows = EncodedRows(bases.encoder, task.rows.train)
        self._uses_budget = config.ladder.stop == "budget"
        self._attempts: list[Attempt] = []
        self._starts: list[_Candidate] = []
        self._candidates: list[_Candidate] = []  # the starts among them
        self._ready: Ready | None = None
        self._last_error: ReloraError | None = None

    def climb(self) -> LadderSteps[Outcome]:
        """Try the rungs in order, stop as `config.ladder.stop` says, and return the outcome.

        Raises TrainingError with the last rung's error if no rung led to an adapter.
        """
        self._began = time.perf_counter()
        for rung in self._rungs():
            yield from self._try(rung)
            if self._ready is not None and (not self._uses_budget or rung == "train"):
                break
        if self._ready is None:
            self._lower_gate()
        return self._outcome()

    def climb_alone(self) -> Outcome:
        """Climb to the end, with each training run alone on the new base."""
        climb = self.climb()
        result: TrainingResult | BrokenRunError | None = None
        while True:
            try:
                run = advance(climb, result)
            except StopIteration as stop:
                outcome: Outcome = stop.value
                return outcome
            try:
                result = None if run is None else fine_tune(self._bases.new, run)
            except BrokenRunError as error:
                result = error

    def _rungs(self) -> Iterable[str]:
        config = self._config.ladder
        if REUSING.isdisjoint(config.rungs):
            return config.rungs
        return rungs_for(config, cosine(self._bases.old, self._bases.new, self._task.old.factors))

    def _try(self, rung: str) -> LadderSteps[None]:
        match rung:
            case "copy":
                self._try_start("copy", lambda: Start(self._task.old, 1.0, 0.0))
            case "transplant":
                self._try_transplants(self._config.transplant)
            case "fused":
                yield from self._try_fused()
            case "train":
                yield from self._train()
            case "scratch":
                yield from self._train_scratch()

    # Starts

    def _try_start(self, rung: str, make: Callable[[], Start]) -> None:
        started = time.perf_counter()
        try:
            start = make()
        except ReloraError as error:  # the other rungs may not need what is missing here
            self._add_failure(rung, error, started)
            return
        self._add_start(rung, start, started)

    def _try_transplants(self, config: TransplantConfig) -> None:
        seed = self._config.train.seed
        self._try_start("transplant", lambda: transplanted(self._bases, self._task, config, seed))
        narrow = next((start for start in self._starts if start.rung == "transplant"), None)
        is_far = narrow is not None and narrow.quality < self._gate.least - FAR_POINTS
        rank, wide_rank = config.ranks
        if is_far and wide_rank > rank:
            self._try_start("wide", lambda: transplanted(self._bases, self._task, config.widened(), seed))

    def _try_fused(self) -> LadderSteps[None]:
        started = time.perf_counter()
        bases, task = self._bases, self._task
        try:
            objective = FusionObjective(
                bases.new, task.old, bases.evolution, task.rows.search, bases.encoder, self._config.search
            )
            while (found := self._search(objective)) is None:
                yield None
        except ReloraError as error:
            self._add_failure("fused", error, started)
            return
        self._add_start("fused", Start(objective.adapter(found.point), found.point.alpha, found.point.beta), started)

    def _add_start(self, rung: str, start: Start, started: float) -> None:
        """Evaluate a start. If it passes the gate it is ready: a second evaluation would give the same answers."""
        with attached(self._bases.new, start.adapter):
            evaluation = self._evaluator()
        seconds = time.perf_counter() - started
        point = CurvePoint(0, seconds, evaluation.loss, evaluation.quality)
        self._report(rung, point)
        self._attempts.append(Attempt(rung, evaluation.quality, seconds, (point,), start.energy))
        candidate = _Candidate(rung, start.adapter, evaluation, start.alpha, start.beta)
        self._starts.append(candidate)
        self._candidates.append(candidate)
        if self._gate.passes(evaluation.quality):
            self._set_ready(rung, point, start.adapter, time.perf_counter())

    def _add_failure(self, rung: str, error: ReloraError, started: float) -> None:
        self._last_error = error
        seconds = time.perf_counter() - started
        self._attempts.append(Attempt(rung, 0.0, seconds, error=f"{type(error).__name__}: {error}"))

    def _best_start(self) -> _Candidate:
        """Return the start with the lowest loss on the search rows; the gate's rows must not choose."""
        if len(self._starts) == 1:
            return self._starts[0]
        evaluator = Evaluator(self._bases.new, self._bases.encoder, self._task.rows.search, "exact_match")

        def loss(start: _Candidate) -> float:
            with attached(self._bases.new, start.adapter):
                found = evaluator.loss()
            return found if math.isfinite(found) else math.inf

        return min(self._starts, key=loss)

    # Training

    def _train(self) -> LadderSteps[None]:
        """Fine-tune the best start, if there is one. A diverged run keeps its best checkpoint."""
        if not self._starts:
            return
        start = self._best_start()
        config = self._config.train
        anchor = anchor_adapter(config.anchor, start.adapter, self._task.old)
        settings = warm_settings(config, anchor, runs_on=self._uses_budget)
        try:
            result = yield self._run(start.adapter, settings, self._warm_rung, start.evaluation)
        except BrokenRunError as error:
            result = error.kept
        assert result is not None, "the driver sends each run's result"
        self._attempts += attempts_by_rung(result, self._warm_rung)
        rung = self._warm_rung(result.best_step)
        self._candidates.append(_Candidate(rung, result.best, result.best_evaluation, start.alpha, start.beta))
        self._note_ready(result, self._warm_rung)

    def _train_scratch(self) -> LadderSteps[None]:
        """Train a new adapter. A diverged run is no candidate: it does not show what scratch training can reach."""
        start = scratch_start(self._bases.new, self._task.old, self._config.train.seed)
        settings = scratch_settings(self._config.train, runs_on=self._uses_budget)
        try:
            result = yield self._run(start, settings, lambda step: "scratch")
        except BrokenRunError as error:
            self._last_error = error
            return
        assert result is not None, "the driver sends each run's result"
        self._attempts.append(Attempt("scratch", result.best_quality, result.curve[-1].seconds, tuple(result.curve)))
        self._candidates.append(_Candidate("scratch", result.best, result.best_evaluation, 0.0, 0.0))
        self._note_ready(result, lambda step: "scratch")

    def _run(
        self, start: Adapter, settings: RunSettings, rung: Callable[[int], str], known: Evaluation | None = None
    ) -> TrainingRun:
        """Return the training run from `start`; `rung` names the rung of a step, `known` is the start's evaluation.

        A warm run is on trial if it may stop early and scratch training could do better: it is dropped if its loss does
        not fall within `short_steps`.
        """

        def report(point: CurvePoint) -> None:
            if point.step > 0 or known is None:
                self._report(rung(point.step), point)

        self._run_began = time.perf_counter()
        is_on_trial = known is not None and not self._uses_budget and "scratch" in self._config.ladder.rungs
        trial = max(1, self._config.train.short_steps // settings.eval_every) if is_on_trial else None
        watcher = Watcher(self._gate, trial)
        return TrainingRun(start, self._train_rows, settings, self._evaluator, watcher, report, known)

    def _warm_rung(self, step: int) -> str:
        return "short" if step <= self._config.train.short_steps else "full"

    # The end

    def _note_ready(self, result: TrainingResult, rung: Callable[[int], str]) -> None:
        if result.ready is not None:
            point, adapter = result.ready
            self._set_ready(rung(point.step), point, adapter, self._run_began + point.seconds)

    def _set_ready(self, rung: str, point: CurvePoint, adapter: Adapter, at: float) -> None:
        if self._ready is None:
            self._ready = Ready(rung, point.step, at - self._began, point.quality, adapter)

    def _lower_gate(self) -> None:
        """Ask for no more than scratch training reached: the task may have become harder on the new base."""
        scratch = next((c for c in self._candidates if c.rung == "scratch"), None)
        if scratch is not None:
            self._gate = self._gate.lowered(self._complete(scratch).quality)

    def _complete(self, candidate: _Candidate) -> _Candidate:
        """Return the candidate with its quality on all of the gate's rows, if its evaluation ended early."""
        if candidate.evaluation.is_complete:
            return candidate
        with attached(self._bases.new, candidate.adapter):
            return replace(candidate, evaluation=self._evaluator.complete())

    def _outcome(self) -> Outcome:
        if not self._candidates:
            raise TrainingError(f"no rung of the ladder led to an adapter: {self._last_error}") from self._last_error
        if self._ready is None:  # some evaluations may have ended early, so their qualities are estimates
            self._candidates = [self._complete(candidate) for candidate in self._candidates]
        best = max(self._candidates, key=lambda candidate: candidate.quality)
        return Outcome(
            rung=best.rung,
            adapter=best.adapter,
            alpha=best.alpha,
            beta=best.beta,
            quality=best.quality,
            copy_quality=next((c.quality for c in self._candidates if c.rung == "copy"), None),
            reference=self._gate.reference,
            attempts=tuple(self._attempts),
            accepted=self._gate.passes(best.quality),
            ready=self._ready,
        )


def advance(climb: LadderSteps[ReturnT], result: TrainingResult | RunError | None) -> TrainingRun | None:
    """Send the last run's result to a climb, or throw its error in; return what the climb yields next."""
    return climb.throw(result) if isinstance(result, Exception) else climb.send(result)
