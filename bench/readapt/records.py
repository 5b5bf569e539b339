"""What the re-adaptation benchmark keeps of each run, and the files that let it go on where it was stopped."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from bench.specialists import BenchTask

# v1 is the old specialist on the old base: what the others are measured against.
Arm = Literal["v1", "zero_shot", "copy", "copy_ft", "paper", "ours", "scratch", "data_free"]
# tune: chooses a learning rate. full: goes to the end of the budget, for its quality (and scratch's for the gate).
# timed: the same up to readiness. final: is reported.
Purpose = Literal["tune", "full", "timed", "final"]
Stop = Literal["ready", "budget"]


@dataclass(frozen=True)
class RunSpec:
    """All that a run depends on but the code; two equal ones are one run. `base` is the new base's fingerprint.

    `reference` is the quality that the gate measures against, in points on the gate's rows; None where none is asked.
    `scratch_rate` is the learning rate of a ladder that may end with training from scratch. `config` stands for how
    the arm climbs (`arms.digest`); empty where nothing is climbed.
    """

    update: str
    base: str
    task: BenchTask
    seed: int
    arm: Arm
    purpose: Purpose = "final"
    stop: Stop = "budget"
    learning_rate: float | None = None
    reference: float | None = None
    scratch_rate: float | None = None
    config: str = ""

    @property
    def key(self) -> str:
        """A short hash of the spec."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Scored:
    """One adapter's quality in points: on the gate's rows, on the test rows, and of each test row.

    Runs that only choose a learning rate are not scored on test rows.
    """

    gate: float
    test: float | None = None
    test_rows: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Point:
    """One evaluation, `seconds` after the run's start: an estimate where it ended before all of the gate's rows.

    On the gate's rows, but for the data-free arm, which has no true answers to judge by: its are agreement.
    """

    rung: str
    step: int
    seconds: float
    quality: float


@dataclass(frozen=True)
class ReadyPoint:
    """The checkpoint with which the gate was passed, `seconds` after the run's start, and how good it is."""

    rung: str
    step: int
    seconds: float
    score: Scored


@dataclass(frozen=True)
class Record:
    """One run. `seconds` (wall clock) and `cpu_seconds` are of the whole run, `stages` of its parts.

    `ready` is None where the gate was not passed within the budget. Scoring of finished adapters on the gate's and the
    test rows is for the report and in no time.
    """

    update: str
    task: str
    seed: int
    arm: Arm
    purpose: Purpose
    stop: str
    learning_rate: float | None
    reference: float | None
    ready: ReadyPoint | None
    rung: str
    final: Scored
    seconds: float
    cpu_seconds: float
    stages: dict[str, float] = field(default_factory=dict)
    curve: list[Point] = field(default_factory=list)
    details: dict[str, str | float | bool] = field(default_factory=dict)
    error: str = ""

    @property
    def cell(self) -> tuple[str, str, int]:
        """Update, task and seed."""
        return self.update, self.task, self.seed


@dataclass(frozen=True)
class _Line:
    key: str
    record: Record


_LINES = TypeAdapter(_Line)


class Journal:
    """Owner of one append-only file of records; one process writes to it at a time.

    A line that a killed process left unfinished is skipped.
    """

    def __init__(self, path: Path):
        self._path = path
        self._records = dict(_read(path))
        self._used: dict[str, Record] = {}

    def __len__(self) -> int:
        return len(self._records)

    def find(self, spec: RunSpec) -> Record | None:
        """The run's record, if it has been run before."""
        found = self._records.get(spec.key)
        if found is not None:
            self._used[spec.key] = found
        return found

    def records(self) -> list[Record]:
        """All that was found or added: records of other settings, which may lie in the file too, are not among them."""
        return list(self._used.values())

    def add(self, spec: RunSpec, record: Record) -> None:
        """Keeps a record; it is on disk when this returns."""
        self._records[spec.key] = self._used[spec.key] = record
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as lines:
            lines.write(b"\n" if lines.tell() and not self._ends_with_newline() else b"")
            lines.write(_LINES.dump_json(_Line(spec.key, record)) + b"\n")

    def _ends_with_newline(self) -> bool:
        with self._path.open("rb") as lines:
            lines.seek(-1, 2)
            return lines.read(1) == b"\n"


def _read(path: Path) -> Iterator[tuple[str, Record]]:
    if not path.is_file():
        return
    for text in filter(None, path.read_bytes().split(b"\n")):
        try:
            line = _LINES.validate_json(text)
        except ValidationError:
            continue  # cut short by a kill
        yield line.key, line.record


def forget(folder: Path, arms: Iterable[str]) -> None:
    """Drops the records of these arms from all journals in `folder`, so that they are run again."""
    dropped = set(arms)
    for path in sorted(folder.glob("*.jsonl")):
        kept = [(key, record) for key, record in _read(path) if record.arm not in dropped]
        path.write_bytes(b"".join(_LINES.dump_json(_Line(key, record)) + b"\n" for key, record in kept))
