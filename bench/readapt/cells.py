"""Run one update x task on one core: all seeds and arms, in the order of their dependencies.

    v1         the old specialist on the old base: one half of the gate
    scratch    at the full budget, on the first seed at each learning rate: the other half of the gate
    the rest   on the first seed, each learning rate up to readiness, but for no more steps than the fastest so far.
               Then the best rate: at the full budget on the first seed, up to readiness on later seeds
    ours       at the full budget on all seeds, for its quality. If it was not ready before training, it runs again up
               to readiness to be timed, as in a campaign: only there is a run that trails dropped

The first run of a process is repeated and its first time discarded, because it includes imports and cold caches. The
gate asks for the lower of v1's and fully trained scratch's quality, less the tolerance. If scratch is the lower one, it
runs a second time to be timed, because its first run was evaluated against v1's gate.

An arm's learning rate is chosen once, on the first seed and the gate's rows: the rate that is ready after the fewest
steps, or the one with the highest quality if none is ready. Scratch's rate is chosen among those within `EQUAL_POINTS`
of its best quality. If the best rate is the highest or lowest tried, the next one beyond is tried too, at most
`MAX_EXTRA_RATES` times. An arm that is ready before any training gets the first rate. If ours trains from scratch, it
uses the rate chosen for scratch.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from bench.readapt.arms import ARM_SETTINGS, TOLERANCE_POINTS, ArmResult, Place, ReadyAdapter, digest, search_config
from bench.readapt.records import Arm, Journal, Point, Purpose, ReadyPoint, Record, RunSpec, Scored, Stop
from bench.readapt.scoring import score
from bench.readapt.updates import Update
from bench.specialists import BenchTask, make_specialist, write_bench_task
from cluster.adapters.files import Adapter, load_adapter
from cluster.errors import ReloraError
from cluster.storage.checkpoints import open_checkpoint
from readapt.ladder.inputs import TaskRows
from readapt.training.causal_lm import CausalLM
from readapt.training.data import Task, encoder_for, load_task
from readapt.training.lora import load_base

EQUAL_POINTS = 1.0
MAX_EXTRA_RATES = 1
TUNED: tuple[Arm, ...] = ("copy_ft", "paper", "ours", "data_free")

FULL_BUDGET: tuple[Arm, ...] = ("ours", "scratch")  # on all seeds; the other arms on the first seed only

STARTS = ("copy", "transplant", "wide", "fused")

RunArm = Callable[[RunSpec, Place, float], ArmResult]


@dataclass(frozen=True)
class Unit:
    """One update x task, for all seeds; the first seed chooses the learning rates."""

    update: Update
    task: BenchTask
    seeds: tuple[int, ...]
    kit: Path
    work: Path

    @property
    def journal(self) -> Path:
        """The file of its records."""
        return self.work / "records" / f"{self.update.name}-{self.task.name}.jsonl"


def run_unit(unit: Unit, run_arm: RunArm, say: Callable[[str], None] = print) -> list[Record]:
    """Run what is missing of the unit; return all its records."""
    rates: dict[Arm, float] = {}
    context = _UnitContext(unit, run_arm, say)
    for seed in unit.seeds:
        _Cell(context, seed, rates).run()
    return context.journal.records()


class _UnitContext:
    """What the cells of a unit share: models and rows for scoring, loaded on first use, and the journal."""

    def __init__(self, unit: Unit, run_arm: RunArm, say: Callable[[str], None]):
        self.unit, self.run_arm, self.say = unit, run_arm, say
        self.journal = Journal(unit.journal)
        self.base = open_checkpoint(unit.update.new).fingerprint()[:16]
        self._is_warm = False
        self.data = write_bench_task(unit.task, unit.kit, unit.update.old, unit.work)

    @cached_property
    def _old_model(self) -> CausalLM:
        return load_base(self.unit.update.old)

    @cached_property
    def _new_model(self) -> CausalLM:
        return load_base(self.unit.update.new)

    @cached_property
    def _task(self) -> Task:
        return load_task(self.data)

    def climb(self, spec: RunSpec, place: Place, limit_steps: float) -> ArmResult:
        """Run an arm, timed. The process's first call runs a short arm before it, to warm up."""
        if not self._is_warm:
            short = replace(spec, arm="copy_ft", task=replace(spec.task, steps=1), learning_rate=1e-6, stop="budget")
            self.run_arm(short, place, math.inf)
            self._is_warm = True
        return self.run_arm(spec, place, limit_steps)

    def score(self, adapter: Adapter | None, *, on_old: bool = False, on_test: bool = True) -> Scored:
        """Return the quality of an adapter (None: of the bare base) on gate and test rows."""
        task = self.unit.task
        model = self._old_model if on_old else self._new_model
        encoder = encoder_for(self.unit.update.old if on_old else self.unit.update.new, task.max_tokens)
        rows = TaskRows.split(self._task, search_config(task))
        gate, _ = score(model, adapter, encoder, rows.gate, task.metric)
        if not on_test:
            return Scored(gate)
        test, test_rows = score(model, adapter, encoder, self._task.test, task.metric)
        return Scored(gate, test, test_rows)


class _Cell:
    """Runs one seed. `rates` are the learning rates per arm; the first cell chooses them and fills them in."""

    def __init__(self, context: _UnitContext, seed: int, rates: dict[Arm, float]):
        unit = context.unit
        self._context, self._rates = context, rates
        adapter = make_specialist(unit.task, seed, unit.update.old, unit.kit, unit.work)
        self._place = Place(unit.update.old, unit.update.new, adapter, context.data)
        self._bare = RunSpec(unit.update.name, context.base, unit.task, seed, "v1")

    def run(self) -> None:
        """Run all arms."""
        v1 = self._scored("v1")
        self._scored("zero_shot")
        scratch = self._scratch(v1.final.gate)
        assert scratch.reference is not None
        self._run("copy", scratch.reference)
        for arm in TUNED:
            if arm not in self._rates:
                self._rates[arm] = _rate(self._tune(arm, scratch.reference, _fastest))
            run = self._ours if arm == "ours" else self._run
            run(arm, scratch.reference, self._rates[arm])

    def _scratch(self, v1_gate: float) -> Record:
        """Return scratch's reported run: its quality at the full budget, and when it passes the gate made from that."""
        if "scratch" not in self._rates:
            self._rates["scratch"] = _rate(self._tune("scratch", v1_gate, lambda runs: _scratch_choice(runs, v1_gate)))
        rate = self._rates["scratch"]
        tuned = self._context.journal.find(self._spec("scratch", v1_gate, rate, "tune"))
        full = tuned or self._run("scratch", v1_gate, rate, "full")
        reference = min(v1_gate, full.final.gate)
        ready = full.ready if reference == v1_gate else self._run("scratch", reference, rate, "timed").ready
        final = replace(full, purpose="final", reference=reference, ready=ready)
        return self._kept(self._spec("scratch", reference, rate, "final"), lambda: final)

    def _ours(self, arm: Arm, reference: float, rate: float) -> Record:
        full = self._run(arm, reference, rate, "full")
        is_timed = full.ready is not None and full.ready.rung in STARTS
        timed = full if is_timed else self._run(arm, reference, rate, "timed")
        final = replace(full, purpose="final", ready=timed.ready, stages=timed.stages)
        return self._kept(self._spec(arm, reference, rate, "final"), lambda: final)

    def _tune(self, arm: Arm, reference: float, choose: Callable[[Sequence[Record]], Record]) -> Record:
        runs: list[Record] = []

        def run(rate: float) -> None:
            runs.append(self._run(arm, reference, rate, "tune", _limit_steps(arm, runs)))

        for rate in ARM_SETTINGS[arm].learning_rates:
            run(rate)
            if _has_nothing_to_tune(runs[0]):
                return runs[0]
        for _ in range(MAX_EXTRA_RATES):
            beyond = _beyond(_rate(choose(runs)), [_rate(run) for run in runs])
            if beyond is not None:
                run(beyond)
        return choose(runs)

    def _spec(self, arm: Arm, reference: float, rate: float | None, purpose: Purpose) -> RunSpec:
        is_full = arm == "scratch" if purpose == "tune" else purpose != "timed" and self._has_full_budget(arm)
        stop: Stop = "budget" if is_full else "ready"
        may_end_at_scratch = arm != "scratch" and "scratch" in ARM_SETTINGS[arm].rungs
        spec = replace(
            self._bare,
            arm=arm,
            purpose=purpose,
            stop=stop,
            learning_rate=rate,
            reference=round(reference, 4),
            scratch_rate=self._rates["scratch"] if may_end_at_scratch else None,
        )
        return replace(spec, config=digest(spec))

    def _has_full_budget(self, arm: Arm) -> bool:
        return arm in FULL_BUDGET or self._bare.seed == self._context.unit.seeds[0]

    def _run(
        self,
        arm: Arm,
        reference: float,
        rate: float | None = None,
        purpose: Purpose = "final",
        limit_steps: float = math.inf,
    ) -> Record:
        spec = self._spec(arm, reference, rate, purpose)
        return self._kept(spec, lambda: self._climb(spec, limit_steps))

    def _climb(self, spec: RunSpec, limit_steps: float) -> Record:
        started = time.perf_counter()
        try:
            result = self._context.climb(spec, self._place, limit_steps)
        except ReloraError as error:
            seconds = time.perf_counter() - started
            bare = self._context.score(None)
            return replace(_blank_record(spec, bare), seconds=seconds, error=f"{type(error).__name__}: {error}")
        on_test = spec.purpose != "tune" or spec.arm == "scratch"
        final = self._context.score(result.final, on_test=on_test)
        ready = result.ready
        return replace(
            _blank_record(spec, final),
            ready=None if ready is None else self._ready(ready, result.final, final, on_test),
            rung=result.rung,
            seconds=result.seconds,
            cpu_seconds=result.cpu_seconds,
            stages=result.stages,
            curve=result.curve,
            details=result.details,
        )

    def _ready(self, ready: ReadyAdapter, final: Adapter, final_score: Scored, on_test: bool) -> ReadyPoint:
        is_same = ready.adapter is final
        ready_score = final_score if is_same else self._context.score(ready.adapter, on_test=on_test)
        return ReadyPoint(ready.rung, ready.step, ready.seconds, ready_score)

    def _scored(self, arm: Arm) -> Record:
        """Score the old service, or the bare new base, which need no run."""
        spec = replace(self._bare, arm=arm)
        adapter = load_adapter(self._place.adapter) if arm == "v1" else None
        return self._kept(spec, lambda: _blank_record(spec, self._context.score(adapter, on_old=arm == "v1")))

    def _kept(self, spec: RunSpec, make: Callable[[], Record]) -> Record:
        """Return the run's record; make it if there is none yet."""
        record = self._context.journal.find(spec)
        if record is None:
            record = make()
            self._context.journal.add(spec, record)
            self._context.say(_line(record))
        return record


def _blank_record(spec: RunSpec, final: Scored) -> Record:
    return Record(
        update=spec.update,
        task=spec.task.name,
        seed=spec.seed,
        arm=spec.arm,
        purpose=spec.purpose,
        stop=spec.stop,
        learning_rate=spec.learning_rate,
        reference=spec.reference,
        ready=None,
        rung="",
        final=final,
        seconds=0.0,
        cpu_seconds=0.0,
    )


def _rate(record: Record) -> float:
    assert record.learning_rate is not None
    return record.learning_rate


def _has_nothing_to_tune(run: Record) -> bool:
    is_scratch_alone = run.arm != "scratch" and {point.rung for point in run.curve} == {"scratch"}
    return is_scratch_alone or (run.ready is not None and run.ready.rung in STARTS)


def _limit_steps(arm: Arm, runs: Sequence[Record]) -> float:
    """Return the steps after which a run can no longer be the fastest rate; scratch's rates run to their ends."""
    steps = [run.ready.step for run in runs if run.ready is not None and arm != "scratch"]
    return min(steps, default=math.inf)


def _fastest(runs: Sequence[Record]) -> Record:
    return min(runs, key=lambda run: (run.ready is None, run.ready.step if run.ready else -run.final.gate))


def _scratch_choice(runs: Sequence[Record], v1_gate: float) -> Record:
    best = max(run.final.gate for run in runs)
    least = min(best, v1_gate) - TOLERANCE_POINTS
    close = [run for run in runs if run.final.gate >= best - EQUAL_POINTS]
    return min(close, key=lambda run: (_second_pass(run.curve, least), -run.final.gate))


def _second_pass(curve: Sequence[Point], least: float) -> float:
    """Return the step at which a curve reaches `least` for the second time in a row; inf if it never does."""
    passes = (after.step for before, after in pairwise(curve) if min(before.quality, after.quality) >= least)
    return next(passes, float("inf"))


def _beyond(best: float, tried: Sequence[float]) -> float | None:
    """Return the next learning rate, by a factor of 2, if the best is the highest or the lowest of those tried."""
    if best == max(tried):
        return 2 * best
    return best / 2 if best == min(tried) else None


def _line(record: Record) -> str:
    rate = f" lr {record.learning_rate:g}" if record.learning_rate else ""
    state = f"ready {record.ready.seconds:.2f} s ({record.ready.rung} {record.ready.step})" if record.ready else "-"
    where = f"{record.update} {record.task} {record.seed} {record.arm} [{record.purpose}]{rate}"
    test = "" if record.final.test is None else f", test {record.final.test:.1f}"
    ends = f"gate {record.final.gate:.1f}{test}, {record.seconds:.1f} s {record.error}"
    return f"{where}: reference {record.reference}, {state}; {ends}"
