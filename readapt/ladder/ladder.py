"""One adapter's way to the new base: the ladder of rungs, cheapest first, up to the first that passes the gate.

    copy        the old adapter as it is
    transplant  the closed-form adapter that does on the task's rows what the old service did (`transplant`); one that
                misses the gate by far is made again on more rows with higher ranks: rung "wide"
    fused       alpha * T + beta * E, found by search
    train       from the best of these starts: fine-tuning with scheduled regularisation; what it reaches within its
                first `short_steps` counts as rung "short", the rest as "full"
    scratch     a new adapter, trained as if there had been no old one

Which of them are tried is the fleet file's choice, and each known method is one: ReLoRA is fused and train, copying and
fine-tuning is copy and train without a pull, retraining is scratch alone. A rung that cannot be climbed (a search
without a trial, a transplant between models that it does not know) is noted and left out; the climb fails only where no
rung leads to an adapter.
"""

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from cluster.adapter_files import Adapter
from cluster.config import ReadaptConfig, TransplantConfig
from cluster.errors import InvalidDataError, ReloraError, TrainingError
from readapt.fusion.objective import FusionObjective, SearchResult
from readapt.fusion.search import split_valid, subset
from readapt.ladder.runs import anchor_adapter, scratch_plan, warm_plan
from readapt.ladder.transplant import calibration_rows, transplant
from readapt.lowrank.delta import cosine
from readapt.training.data import EncodedRows, Encoder, Task
from readapt.training.evaluate import Evaluation, Evaluator, Gate, Metric, Watcher, golden
from readapt.training.lora import attached, blank_like, row_norms
from readapt.training.training_group import fine_tune
from readapt.training.training_run import BrokenRunError, CurvePoint, End, RunSettings, TrainingResult, TrainingRun

RUNGS = ("copy", "transplant", "wide", "fused", "short", "full", "scratch")
FAR_POINTS = 3.0  # less than this a short training makes up for; measured: 8 points took it 440 steps
REUSING = frozenset({"copy", "transplant", "fused", "train"})

Search = Callable[[FusionObjective], SearchResult | None]  # None: not found yet, ask again
Climb = Generator[TrainingRun | None, End | None, "Outcome"]


@dataclass(frozen=True)
class Attempt:
    """What one rung cost and reached: the best quality on it, and the evaluations made there.

    `energy` is of a transplant: the least share of a module's map that its rank holds, 0 to 1. `error` says why the
    rung led to nothing; the quality is 0 then.
    """

    rung: str
    quality: float
    seconds: float
    curve: tuple[CurvePoint, ...] = ()
    energy: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Ready:
    """The first checkpoint that passed the gate, `seconds` after the climb began."""

    rung: str
    step: int
    seconds: float
    quality: float
    adapter: Adapter


@dataclass(frozen=True)
class Outcome:
    """Where the ladder ended. `adapter` is the one to ship if `accepted`, else the best that there was.

    `alpha` and `beta` are of the fused start, (1, 0) of the old adapter that a copy is and a transplant leans on, and
    (0, 0) for scratch. `reference` is the quality that the gate measured against: the old specialist's, or that of
    scratch training where this is lower. `copy_quality` is None where the copy was not tried.
    """

    rung: str
    adapter: Adapter
    alpha: float
    beta: float
    quality: float
    copy_quality: float | None
    reference: float
    attempts: tuple[Attempt, ...]
    accepted: bool
    ready: Ready | None
    golden: tuple[dict[str, str], ...]


@dataclass(frozen=True)
class _Start:
    adapter: Adapter
    alpha: float
    beta: float
    energy: float | None = None


@dataclass(frozen=True)
class _Candidate:
    rung: str
    adapter: Adapter
    evaluation: Evaluation
    alpha: float
    beta: float

    @property
    def quality(self) -> float:
        return self.evaluation.quality


class Ladder:
    """Climbs for one adapter. `new_model` is the bare new base, `old_model` the bare old one; both are bare afterwards.

    `gate` asks for the old specialist's quality on the old base, on the gate rows (`split_valid(...)[1]`). The search
    sees the other validation rows only, and nothing here sees the test rows. `search` is the seam at which the
    distributed search comes in. `report` hears of each evaluation as (rung, point).
    """

    def __init__(
        self,
        new_model: Any,
        old_model: Any,
        encoder: Encoder,
        task: Task,
        old: Adapter,
        evolution: Adapter,
        config: ReadaptConfig,
        gate: Gate,
        metric: Metric,
        search: Search,
        *,
        report: Callable[[str, CurvePoint], None] = lambda rung, point: None,
        num_golden: int = 4,
    ):
        self._model, self._old_model = new_model, old_model
        self._encoder, self._task, self._old = encoder, task, old
        self._evolution, self._config, self._search = evolution, config, search
        self._report, self._num_golden = report, num_golden
        self._search_rows, gate_rows = split_valid(task.valid, config.search)
        self._gate = gate
        confidence = config.gate.confidence
        self._evaluate = Evaluator(new_model, encoder, gate_rows, metric, gate=gate, confidence=confidence)
        self._attempts: list[Attempt] = []
        self._starts: list[_Candidate] = []
        self._candidates: list[_Candidate] = []
        self._train_rows = EncodedRows(encoder, task.train)
        self._ready: Ready | None = None
        self._fault: ReloraError | None = None  # the last one
        self._runs_on = config.ladder.stop == "budget"

    def climb(self) -> Climb:
        """Tries the rungs in their order and stops as `config.ladder.stop` says; returns where it ended.

        TrainingError where no rung led to an adapter; it tells what went wrong on the last one.
        Yields each training that it wants and is sent its end, so that whoever drives many climbs trains them together;
        and None, to be sent None, as long as its search goes on elsewhere.
        """
        self._began = time.perf_counter()
        for rung in self._rungs():
            yield from self._try(rung)
            if self._ready is not None and (not self._runs_on or rung == "train"):
                break
        if self._ready is None:
            self._lower_gate()
        return self._outcome()

    def _rungs(self) -> Iterator[str]:
        """Those of the config, but for what the bases have in common.

        Where that is nothing, those that reuse nothing; where it is not nearly all, the transplant before the copy,
        which would seldom pass then, or barely.
        """
        config = self._config.ladder
        if REUSING.isdisjoint(config.rungs):
            return iter(config.rungs)
        similarity = cosine(self._old_model, self._model, self._old.factors)
        if "scratch" in config.rungs and similarity < config.min_cosine:
            return iter(("scratch",))
        return iter(config.rungs if similarity >= config.copy_cosine else _transplant_first(config.rungs))

    def _try(self, rung: str) -> Generator[TrainingRun | None, End | None, None]:
        match rung:
            case "copy":
                self._try_start("copy", lambda: _Start(self._old, 1.0, 0.0))
            case "transplant":
                self._try_transplants(self._config.transplant)
            case "fused":
                yield from self._try_fused()
            case "train":
                yield from self._train()
            case "scratch":
                yield from self._train_scratch()

    # Starts

    def _try_start(self, rung: str, make: Callable[[], _Start]) -> None:
        """A start that passes is ready at once: evaluated again, it would give the same answers."""
        started = time.perf_counter()
        try:
            start = make()
        except ReloraError as error:  # other rungs may do without what is missing here
            self._failed(rung, error, time.perf_counter() - started)
            return
        self._add_start(rung, start, started)

    def _try_transplants(self, config: TransplantConfig) -> None:
        self._try_start("transplant", partial(self._transplanted, config))
        found = next((start for start in self._starts if start.rung == "transplant"), None)
        is_far = found is not None and found.quality < self._gate.least - FAR_POINTS
        first_rank, wide_rank = config.ranks
        if is_far and wide_rank > first_rank:
            self._try_start("wide", partial(self._transplanted, config.widened()))

    def _try_fused(self) -> Generator[None, End | None, None]:
        started = time.perf_counter()
        rows, config = self._search_rows, self._config.search
        try:
            objective = FusionObjective(self._model, self._old, self._evolution, rows, self._encoder, config)
            while (found := self._search(objective)) is None:
                yield None
        except ReloraError as error:
            self._failed("fused", error, time.perf_counter() - started)
            return
        point = found.point
        self._add_start("fused", _Start(objective.adapter(point), point.alpha, point.beta), started)

    def _add_start(self, rung: str, start: _Start, started: float) -> None:
        evaluation = self._judge(start.adapter)
        seconds = time.perf_counter() - started
        point = CurvePoint(0, seconds, evaluation.loss, evaluation.quality)
        self._report(rung, point)
        self._attempts.append(Attempt(rung, evaluation.quality, seconds, (point,), start.energy))
        candidate = _Candidate(rung, start.adapter, evaluation, start.alpha, start.beta)
        self._starts.append(candidate)
        self._candidates.append(candidate)
        if self._gate.passes(evaluation.quality):
            self._is_ready(rung, point, start.adapter)

    def _failed(self, rung: str, error: ReloraError, seconds: float) -> None:
        self._fault = error
        self._attempts.append(Attempt(rung, 0.0, seconds, error=f"{type(error).__name__}: {error}"))

    def _transplanted(self, config: TransplantConfig) -> _Start:
        vocabulary = self._old_model.config.vocab_size
        rows = subset(self._task.train, config.rows, self._config.train.seed)
        num_tokens = round(config.tokens_per_width * self._model.config.hidden_size)
        chosen = calibration_rows((self._encoder.encode(row) for row in rows), vocabulary, num_tokens)
        if not chosen:
            raise InvalidDataError("every row has tokens that the old base does not know: nothing to transplant")
        found = transplant(self._old_model, self._old, self._model, chosen, config)
        return _Start(found.adapter, 1.0, 0.0, min(found.energy.values(), default=None))

    def _judge(self, adapter: Adapter) -> Evaluation:
        with attached(self._model, adapter):
            return self._evaluate()

    def _best_start(self) -> _Candidate:
        """That of the lowest loss on the search rows: the gate's rows are not there to choose by."""
        if len(self._starts) == 1:
            return self._starts[0]
        evaluator = Evaluator(self._model, self._encoder, self._search_rows, "exact_match")

        def loss(start: _Candidate) -> float:
            with attached(self._model, start.adapter):
                found = evaluator.loss()
            return found if math.isfinite(found) else math.inf

        return min(self._starts, key=loss)

    # Training

    def _train(self) -> Generator[TrainingRun | None, End | None, None]:
        """Of a run that breaks down counts what it had reached before. Without a start there is nothing to train."""
        if not self._starts:
            return
        start = self._best_start()
        anchor = anchor_adapter(self._config.train.anchor, start.adapter, self._old)
        plan = warm_plan(self._config.train, anchor, runs_on=self._runs_on)
        end = yield from _trained(self._job(start.adapter, plan, self._warm_rung, start.evaluation))
        result = end.kept if isinstance(end, BrokenRunError) else end
        self._attempts += self._milestones(result)
        rung = self._warm_rung(result.best_step)
        self._candidates.append(_Candidate(rung, result.best, result.best_evaluation, start.alpha, start.beta))
        self._note_ready(result, self._warm_rung)

    def _train_scratch(self) -> Generator[TrainingRun | None, End | None, None]:
        """A run that breaks down is no candidate: it does not tell what scratch training can reach."""
        norms = row_norms(self._model, self._old.factors) if self._old.is_dora else None
        start = blank_like(self._old, self._config.train.seed, norms)
        plan = scratch_plan(self._config.train, runs_on=self._runs_on)
        end = yield from _trained(self._job(start, plan, lambda step: "scratch"))
        if isinstance(end, BrokenRunError):
            self._fault = end
            return
        self._attempts.append(Attempt("scratch", end.best_quality, end.curve[-1].seconds, tuple(end.curve)))
        self._candidates.append(_Candidate("scratch", end.best, end.best_evaluation, 0.0, 0.0))
        self._note_ready(end, lambda step: "scratch")

    def _job(
        self, start: Adapter, plan: RunSettings, rung: Callable[[int], str], known: Evaluation | None = None
    ) -> TrainingRun:
        """`known` is the evaluation of a start that is not blank.

        Training from such a one is on trial where it may end before its budget and scratch training could do better.
        """

        def report(point: CurvePoint) -> None:
            if point.step > 0 or known is None:
                self._report(rung(point.step), point)

        self._run_began = time.perf_counter()
        is_on_trial = known is not None and not self._runs_on and "scratch" in self._config.ladder.rungs
        trial = max(1, self._config.train.short_steps // plan.eval_every) if is_on_trial else None
        return TrainingRun(start, self._train_rows, plan, self._evaluate, Watcher(self._gate, trial), report, known)

    def _warm_rung(self, step: int) -> str:
        return "short" if step <= self._config.train.short_steps else "full"

    def _milestones(self, result: TrainingResult) -> list[Attempt]:
        attempts, rung_started_s = [], 0.0
        for rung in ("short", "full"):
            points = tuple(p for p in result.curve if p.step > 0 and self._warm_rung(p.step) == rung)
            if points:
                quality = max(p.quality for p in points)
                attempts.append(Attempt(rung, quality, points[-1].seconds - rung_started_s, points))
                rung_started_s = points[-1].seconds
        return attempts

    # The end

    def _note_ready(self, result: TrainingResult, rung: Callable[[int], str]) -> None:
        if result.ready is not None:
            point, adapter = result.ready
            self._is_ready(rung(point.step), point, adapter, self._run_began + point.seconds)

    def _is_ready(self, rung: str, point: CurvePoint, adapter: Adapter, at: float | None = None) -> None:
        if self._ready is None:
            seconds = (time.perf_counter() if at is None else at) - self._began
            self._ready = Ready(rung, point.step, seconds, point.quality, adapter)

    def _lower_gate(self) -> None:
        """What scratch training cannot reach either is not asked for: the task has become harder on the new base."""
        scratch = next((c for c in self._candidates if c.rung == "scratch"), None)
        if scratch is not None:
            self._gate = self._gate.lowered(self._complete(scratch).quality)

    def _complete(self, candidate: _Candidate) -> _Candidate:
        """The candidate with its quality on all of the gate's rows, for those that were given up early."""
        if candidate.evaluation.is_complete:
            return candidate
        with attached(self._model, candidate.adapter):
            return replace(candidate, evaluation=self._evaluate.complete())

    def _outcome(self) -> Outcome:
        if not self._candidates:
            raise TrainingError(f"no rung of the ladder led to an adapter: {self._fault}") from self._fault
        if self._ready is None:  # qualities may be estimates then, of evaluations that were given up
            self._candidates = [self._complete(candidate) for candidate in self._candidates]
        best = max(self._candidates, key=lambda c: c.quality)
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
            golden=self._golden(best.adapter),
        )

    def _golden(self, adapter: Adapter) -> tuple[dict[str, str], ...]:
        with attached(self._model, adapter):
            return tuple(golden(self._model, self._encoder, self._golden_prompts(), max_tokens=16))

    def _golden_prompts(self) -> list[str]:
        prompts = list(dict.fromkeys(row.prompt for row in self._task.valid))
        fitting = (p for p in prompts if len(self._encoder.encode_prompt(p)) + 16 <= self._encoder.max_tokens)
        return [p for p, _ in zip(fitting, range(self._num_golden), strict=False)]


def _transplant_first(rungs: Sequence[str]) -> list[str]:
    """The same rungs, with a copy that comes before the transplant put behind it."""
    if "transplant" not in rungs or "copy" not in rungs[: rungs.index("transplant")]:
        return list(rungs)
    others = [rung for rung in rungs if rung != "copy"]
    place = others.index("transplant") + 1
    return [*others[:place], "copy", *others[place:]]


def _trained(job: TrainingRun) -> Generator[TrainingRun, End | None, End]:
    end = yield job
    assert end is not None, "who drives the climb sends each training's end"
    return end


def finish(model: Any, climb: Climb) -> Outcome:
    """One climb to its end, its trainings run alone on `model`, the bare new base."""
    end: End | None = None
    while True:
        try:
            job = climb.send(end)
        except StopIteration as stop:
            outcome: Outcome = stop.value
            return outcome
        try:
            end = None if job is None else fine_tune(model, job)
        except BrokenRunError as error:
            end = error
