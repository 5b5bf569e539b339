"""The records of the re-adaptation benchmark's runs, and the files from which it resumes."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from bench.specialists import BenchTask

# v1 is the old specialist on the old base, which the others are compared with.
Arm = Literal["v1", "zero_shot", "copy", "copy_ft", "paper", "ours", "scratch", "data_free"]
# tune: chooses a learning rate. full: runs the whole budget, for the quality (scratch's also for the gate).
# timed: runs up to readiness. final: is reported.
Purpose = Literal["tune", "full", "timed", "final"]
Stop = Literal["ready", "budget"]


@dataclass(frozen=True)
class RunSpec:
    """Everything a run depends on except the code. `base` is the new base's fingerprint.

    `reference` is the quality that the gate compares with, in points on the gate's rows; None if there is no gate.
    `scratch_rate` is the learning rate of the scratch rung, for ladders that have one. `config` is the hash of the
    arm's configuration (`arms.digest`); empty if no ladder is run.
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
        """A short hash of the spec: equal runs have equal keys."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Scored:
    """One adapter's quality in points, on the gate's rows, on the test rows, and on each test row.

    Runs that only choose a learning rate have no test scores.
    """

    gate: float
    test: float | None = None
    test_rows: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Point:
    """One evaluation on the gate's rows, `seconds` after the run's start; an estimate if the evaluation ended early.

    The data-free arm has no true answers, so its quality is agreement with the old service.
    """

    rung: str
    step: int
    seconds: float
    quality: float


@dataclass(frozen=True)
class ReadyPoint:
    """The checkpoint that passed the gate, `seconds` after the run's start, and its score."""

    rung: str
    step: int
    seconds: float
    score: Scored


@dataclass(frozen=True)
class Record:
    """One run. `seconds` (wall clock) and `cpu_seconds` are of the whole run, `stages` of its parts.

    `ready` is None if the gate was not passed within the budget. Times exclude the scoring of finished adapters, which
    is done for the report only.
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
    """An append-only file of records. One process writes to it at a time.

    Lines that a killed process left unfinished are skipped.
    """

    def __init__(self, path: Path):
        self._path = path
        self._records = dict(_read(path))
        self._used: dict[str, Record] = {}

    def __len__(self) -> int:
        return len(self._records)

    def find(self, spec: RunSpec) -> Record | None:
        """Return the run's record, if there is one."""
        found = self._records.get(spec.key)
        if found is not None:
            self._used[spec.key] = found
        return found

    def records(self) -> list[Record]:
        """Return the records that were found or added here. The file may hold others, of other settings."""
        return list(self._used.values())

    def add(self, spec: RunSpec, record: Record) -> None:
        """Add a record; it is on disk when this returns."""
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
            continue  # unfinished line of a killed process
        yield line.key, line.record


def forget(folder: Path, arms: Iterable[str]) -> None:
    """Delete the records of these arms from all journals in `folder`, so that the arms run again."""
    dropped = set(arms)
    for path in sorted(folder.glob("*.jsonl")):
        kept = [(key, record) for key, record in _read(path) if record.arm not in dropped]
        path.write_bytes(b"".join(_LINES.dump_json(_Line(key, record)) + b"\n" for key, record in kept))
