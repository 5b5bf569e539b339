"""What a run of the main job has shown: plain records that the table, the report and `result.json` are made of."""

from dataclasses import asdict, dataclass, field
from typing import Any

from demo.load import Answer

Curve = list[tuple[float, float]]  # (seconds, quality in points)


@dataclass(frozen=True)
class AdapterOutcome:
    """One adapter before and after the upgrade. Qualities are points (0 to 100) on the test split."""

    name: str
    metric: str
    status: str
    rung: str
    alpha: float | None
    beta: float | None
    quality_v1: float
    quality_copy: float
    quality_v2: float | None
    ready_s: float | None  # from the start of the upgrade to the adapter's v2 version taking all of its traffic
    readapt_s: float | None  # work on this adapter alone: search, training, evaluation
    scratch_s: float | None  # scratch training to its end at the same gate; None: never reached
    quality_scratch: float | None
    reference: float | None = None  # the v1 specialist's quality on the gate's rows, which the curves are of
    curve: Curve = field(default_factory=list)
    scratch_curve: Curve = field(default_factory=list)

    @property
    def is_restored(self) -> bool:
        """Within 1 point of the v1 specialist, or of scratch's best where its whole budget did not reach the gate."""
        if self.quality_v2 is None:
            return False
        asked = self.quality_v1
        if self.scratch_s is None and self.quality_scratch is not None:
            asked = min(asked, self.quality_scratch)
        return self.quality_v2 >= asked - 1.0


@dataclass(frozen=True)
class Traffic:
    """The load's account. `wrong` are answers that no version then routed could have given."""

    sent: int
    failed: int
    wrong: int
    failures: list[str]
    latency_p50_ms: float
    latency_p99_ms: float


@dataclass(frozen=True)
class Outcome:
    """A whole run."""

    world: str
    started_at: float  # time.time() when the upgrade was submitted
    upgrade_s: float
    total_s: float
    adapters: list[AdapterOutcome]
    traffic: Traffic
    answers: list[Answer]
    hardware: str

    def to_json(self) -> dict[str, Any]:
        """Everything but the single answers, which are many."""
        record = asdict(self)
        del record["answers"]
        for row, adapter in zip(record["adapters"], self.adapters, strict=True):
            row["is_restored"] = adapter.is_restored
        return record
