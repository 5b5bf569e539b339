"""The arms of the re-adaptation benchmark. Each is a configuration of the ladder, so the same code times all of them.

    copy       the old adapter, unchanged
    copy_ft    fine-tuning from the copy, without a pull
    paper      alpha * T + beta * E by Bayesian search, then fine-tuning with two-phase scheduled regularisation
    ours       the ladder with its default settings
    scratch    a new adapter
    data_free  ours without labels: the old service's answers to logged prompts replace them. No scratch rung, which
               would double its budget

The clock starts with the bases, the old adapter and the rows on disk. It counts loading, extracting E if an arm needs
it, search, closed forms, training and all evaluations on the gate's rows. It does not count the start of the process,
nor measuring the old service and scratch for the gate, which is the same for all arms.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from bench.readapt.records import Arm, Point, RunSpec
from bench.specialists import BenchTask
from cluster.adapters.files import Adapter, load_adapter
from cluster.config.readapt import LadderConfig, ReadaptConfig, SearchConfig
from cluster.errors import TrainingError
from cluster.storage.checkpoints import open_checkpoint
from readapt.fusion.search import find
from readapt.ladder.inputs import Bases, LadderTask, TaskRows
from readapt.ladder.ladder import Ladder
from readapt.ladder.outcome import Ready
from readapt.ladder.relabel import PROMPTS, load_prompts, relabelled
from readapt.lowrank.delta import base_evolution
from readapt.training.data import encoder_for, load_task
from readapt.training.evaluate import Gate
from readapt.training.lora import load_base
from readapt.training.training_run import CurvePoint

TOLERANCE_POINTS = 0.5
# About the best for all arms. A run of T steps, evaluated every k steps at the cost of c steps each, is ready after
# about T + 1.5 k + c T / k. In long runs k grows by itself (`RunSettings.is_due`).
EVAL_EVERY = 10
MAX_TOKENS = 256  # enough for every row
PERFECT = 100.0  # the old service's agreement with itself
NEEDS_OLD_BASE = {"transplant"}
DEFAULT_RUNGS = LadderConfig().rungs


@dataclass(frozen=True)
class ArmSettings:
    """An arm's rungs, and the learning rates to try, the likely best first."""

    rungs: tuple[str, ...]
    learning_rates: tuple[float, ...] = ()
    has_pull: bool = True
    has_averaging: bool = False


ARM_SETTINGS: dict[Arm, ArmSettings] = {
    "copy": ArmSettings(("copy",)),
    "copy_ft": ArmSettings(("copy", "train"), (1e-3, 5e-4, 2e-3), has_pull=False),
    "paper": ArmSettings(("fused", "train"), (1e-3, 5e-4, 2e-3)),
    "ours": ArmSettings(DEFAULT_RUNGS, (5e-4, 2.5e-4, 1e-3), has_averaging=True),
    "scratch": ArmSettings(("scratch",), (3e-3, 1.5e-3, 6e-3)),
    "data_free": ArmSettings(("copy", "transplant", "train"), (5e-4, 2.5e-4, 1e-3), has_averaging=True),
}


def search_config(task: BenchTask) -> SearchConfig:
    """Return the default search on the task's number of rows. Its seed also splits the validation rows."""
    return TypeAdapter(SearchConfig).validate_python({"subset_rows": task.search_rows})


def ladder_config(spec: RunSpec) -> ReadaptConfig:
    """Return the ladder's configuration for this run. What the arm does not set keeps its default."""
    arm, task = ARM_SETTINGS[spec.arm], spec.task
    train: dict[str, float] = {
        "full_steps": task.steps,
        "scratch_steps": task.steps,
        "batch_rows": task.batch_rows,
        "eval_every": EVAL_EVERY,
        "max_tokens": MAX_TOKENS,
        "seed": spec.seed,
    }
    if spec.learning_rate is not None:
        train["scratch_learning_rate" if spec.arm == "scratch" else "learning_rate"] = spec.learning_rate
    if spec.scratch_rate is not None:
        train["scratch_learning_rate"] = spec.scratch_rate
    if not arm.has_pull:
        train |= {"pull_strong": 0.0, "pull_weak": 0.0}
    if not arm.has_averaging:  # not part of the methods that these arms stand for
        train["averaging"] = 0.0
    settings = {
        "search": search_config(task),
        "train": train,
        "ladder": {"rungs": arm.rungs, "stop": spec.stop},
    }
    return TypeAdapter(ReadaptConfig).validate_python(settings)


def digest(spec: RunSpec) -> str:
    """Return a short hash of the arm's configuration. Runs with another configuration are measured again."""
    config = ladder_config(spec)
    used = asdict(config)
    used["workers"]["pack"] = used["workers"].pop("adapters_per_worker")  # its name when the records were measured
    used["transplant"]["rank"], used["transplant"]["wide_rank"] = config.transplant.ranks
    if "transplant" not in ARM_SETTINGS[spec.arm].rungs:
        del used["transplant"]  # changing it must not invalidate the records of the other arms
    return hashlib.sha256(json.dumps([used, TOLERANCE_POINTS], sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Place:
    """What an arm finds on disk: two bases, the old adapter and the task's rows."""

    old_base: Path
    new_base: Path
    adapter: Path
    data: Path


@dataclass(frozen=True)
class ReadyAdapter:
    """The adapter that passed the gate, `seconds` after the clock started."""

    rung: str
    step: int
    seconds: float
    adapter: Adapter


@dataclass(frozen=True)
class ArmResult:
    """One run's result: the adapter that was ready, if any, and the best one at the end."""

    ready: ReadyAdapter | None
    rung: str
    final: Adapter
    seconds: float
    cpu_seconds: float
    stages: dict[str, float]
    curve: list[Point]
    details: dict[str, str | float | bool] = field(default_factory=dict)


class GivenUpError(TrainingError):
    """The run took more steps than allowed."""


def climb(spec: RunSpec, place: Place, limit_steps: float) -> ArmResult:
    """Run one arm once, timed.

    Raises GivenUpError at the first evaluation after `limit_steps` steps, and the ladder's error if it fails.
    """
    clock = _Clock()
    ladder, points = _ladder(spec, place, clock, limit_steps)
    began_s = clock.seconds()
    outcome = ladder.climb_alone()
    return ArmResult(
        None if outcome.ready is None else _timed(outcome.ready, points),
        outcome.rung,
        outcome.adapter,
        clock.seconds(),
        clock.cpu_seconds(),
        clock.stages | {"climb": clock.seconds() - began_s},
        points,
        {"alpha": outcome.alpha, "beta": outcome.beta, "accepted": outcome.accepted},
    )


def _timed(ready: Ready, points: Sequence[Point]) -> ReadyAdapter:
    """Return the ready adapter with the time, by this module's clock, of the evaluation that passed the gate."""
    seconds = next(point.seconds for point in points if (point.rung, point.step) == (ready.rung, ready.step))
    return ReadyAdapter(ready.rung, ready.step, seconds, ready.adapter)


class _Clock:
    """Measures wall clock and CPU seconds since its creation, and the seconds of named stages."""

    def __init__(self) -> None:
        self._started_s, self._cpu_started_s = time.perf_counter(), time.process_time()
        self.stages: dict[str, float] = {}

    def seconds(self) -> float:
        return time.perf_counter() - self._started_s

    def cpu_seconds(self) -> float:
        return time.process_time() - self._cpu_started_s

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began_s = self.seconds()
        yield
        self.stages[name] = self.seconds() - began_s


def _ladder(spec: RunSpec, place: Place, clock: _Clock, limit_steps: float) -> tuple[Ladder, list[Point]]:
    """Load what the arm's ladder needs; return it, and the list that will receive its evaluations."""
    config, task = ladder_config(spec), spec.task
    with clock.stage("load"):
        new_model = load_base(place.new_base)
        encoder = encoder_for(place.new_base, config.train.max_tokens)
        old = load_adapter(place.adapter)
        old_model = load_base(place.old_base) if NEEDS_OLD_BASE & set(config.ladder.rungs) else new_model
        rows = load_task(place.data)
    if spec.arm == "data_free":
        with clock.stage("relabel"):
            rows = relabelled(old_model, old, encoder, load_prompts(place.data / "logged" / PROMPTS))
    evolution = Adapter({})
    if "fused" in config.ladder.rungs:
        with clock.stage("evolution"):
            evolution = _evolution(place, config)
    points: list[Point] = []

    def report(rung: str, point: CurvePoint) -> None:
        points.append(Point(rung, point.step, clock.seconds(), point.quality))
        if point.step >= limit_steps:
            raise GivenUpError(f"given up after {point.step} steps")

    ladder_task = LadderTask(old, TaskRows.split(rows, config.search), _gate(spec, config), task.metric)
    bases = Bases(old_model, new_model, encoder, evolution)
    return Ladder(bases, ladder_task, config, find, report=report), points


def _gate(spec: RunSpec, config: ReadaptConfig) -> Gate:
    """Return the gate. Without labels it asks for agreement.

    It is never lowered, because the reference already is the lower of v1's and scratch's quality.
    """
    if spec.arm == "data_free":
        return Gate(PERFECT, config.gate.agreement_points, floor=PERFECT)
    assert spec.reference is not None
    return Gate(spec.reference, TOLERANCE_POINTS, floor=spec.reference)


def _evolution(place: Place, config: ReadaptConfig) -> Adapter:
    old, new = open_checkpoint(place.old_base), open_checkpoint(place.new_base)
    return base_evolution(old, new, config.search.evolution_rank, config.search.evolution_energy)[0]
