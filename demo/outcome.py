"""The results of a demo run, as plain records. The table, the report and `result.json` are made from them."""

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
    ready_s: float | None  # from the start of the upgrade until the v2 version takes all of the adapter's traffic
    readapt_s: float | None  # work on this adapter alone: search, training and evaluation
    scratch_s: float | None  # scratch training until it passes the same gate; None: it never did
    quality_scratch: float | None
    reference: float | None = None  # the v1 specialist's quality on the gate's rows, as in the curves
    curve: Curve = field(default_factory=list)
    scratch_curve: Curve = field(default_factory=list)

    @property
    def is_restored(self) -> bool:
        """Whether it is within 1 point of the v1 specialist.

        If scratch training misses the gate with its whole budget, 1 point of its best is enough.
        """
        if self.quality_v2 is None:
            return False
        asked = self.quality_v1
        if self.scratch_s is None and self.quality_scratch is not None:
            asked = min(asked, self.quality_scratch)
        return self.quality_v2 >= asked - 1.0


@dataclass(frozen=True)
class Traffic:
    """How the requests ended. `wrong` answers are ones that no version routed at that time can have given."""

    sent: int
    failed: int
    wrong: int
    failures: list[str]
    latency_p50_ms: float
    latency_p99_ms: float


@dataclass(frozen=True)
class Outcome:
    """The results of a whole run."""

    world: str
    started_at: float  # time.time() when the upgrade was submitted
    upgrade_s: float
    total_s: float
    adapters: list[AdapterOutcome]
    traffic: Traffic
    answers: list[Answer]
    hardware: str

    def to_json(self) -> dict[str, Any]:
        """Return everything but the individual answers, because they are too many."""
        record = asdict(self)
        del record["answers"]
        for row, adapter in zip(record["adapters"], self.adapters, strict=True):
            row["is_restored"] = adapter.is_restored
        return record
