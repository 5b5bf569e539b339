"""The figures of the re-adaptation benchmark, from its records.

**Time-to-readiness** (TTR) is a record's `ready.seconds`. **Censored** runs were not ready within their budget. A
censored baseline counts with the seconds of its whole budget, so the speed-up over it is a lower bound. If ours is
censored, it counts with its own seconds plus the baseline's TTR, because one would then turn to the baseline, so its
speed-up is below 1. Fleet speed-ups are ratios of sums over all adapters, by the same rule. Figures over updates leave
out the negative control, which has its own figure.

**A regression shipped** is an adapter that passed the gate and is worse on the test rows than the gate's tolerance and
chance allow. It is compared with the lower of v1's and scratch's test quality. It counts if it is worse by more than
`TOLERANCE_POINTS` plus `NUM_STANDARD_ERRORS` standard errors of the mean paired difference over the rows. For chrF
these are the rows' own scores, while the gate and the tables use corpus chrF. The report also counts all adapters below
the tolerance, by chance or not.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from statistics import mean, median, stdev
from typing import Any

from bench.readapt.records import Arm, Record, Scored

TOLERANCE_POINTS = 0.5
NUM_STANDARD_ERRORS = 2.0
CONTROL = "control"
BASELINES: tuple[Arm, ...] = ("scratch", "copy_ft")


@dataclass(frozen=True)
class Cell:
    """The reported runs of one update, task and seed, by arm."""

    update: str
    task: str
    seed: int
    runs: dict[Arm, Record]
    spared_share: float = 0.0  # of the time for extracting E, if other adapters of the fleet share it

    @property
    def is_control(self) -> bool:
        """Whether its two bases have nothing in common."""
        return self.update == CONTROL

    def has(self, *arms: Arm) -> bool:
        """Return whether all of these arms were run."""
        return all(arm in self.runs for arm in arms)

    def waited_s(self, arm: Arm) -> float:
        """Return an arm's TTR, or the time of its whole budget if it was not ready."""
        run = self.runs[arm]
        seconds = run.seconds if run.ready is None else run.ready.seconds
        return seconds - self.spared_share * run.stages.get("evolution", 0.0)

    def ours_s(self, baseline: Arm, arm: Arm = "ours") -> float:
        """Return our TTR, or if ours was not ready, our time plus the baseline's."""
        is_ready = self.runs[arm].ready is not None
        return self.waited_s(arm) + (0.0 if is_ready else self.waited_s(baseline))

    def speedup(self, baseline: Arm, arm: Arm = "ours") -> float:
        """Return how many times sooner the arm was ready than the baseline."""
        return self.waited_s(baseline) / self.ours_s(baseline, arm)


@dataclass(frozen=True)
class Regression:
    """A shipped adapter compared with the reference on the test rows: mean paired difference and standard error."""

    update: str
    task: str
    seed: int
    arm: Arm
    reference: Arm
    difference: float
    standard_error: float

    @property
    def is_established(self) -> bool:
        """Whether it is worse by more than tolerance and chance allow."""
        return self.difference < -TOLERANCE_POINTS - NUM_STANDARD_ERRORS * self.standard_error

    @property
    def is_below_tolerance(self) -> bool:
        """Whether it is worse by more than the tolerance, by chance or not."""
        return self.difference < -TOLERANCE_POINTS


def cells_of(records: Iterable[Record]) -> list[Cell]:
    """Group the reported runs by cell."""
    final = sorted((r for r in records if r.purpose == "final"), key=lambda record: record.cell)
    groups = ((cell, list(runs)) for cell, runs in groupby(final, key=lambda record: record.cell))
    return [Cell(update, task, seed, {run.arm: run for run in runs}) for (update, task, seed), runs in groups]


def all_figures(records: Sequence[Record], packed_training_speedup: float | None) -> dict[str, Any]:
    """Return the figures by name; None for those without any data."""
    cells = cells_of(records)
    updated = [c for c in cells if not c.is_control and c.has("ours", *BASELINES, "v1")]
    control = [c for c in cells if c.is_control and c.has("ours", "scratch")]
    shipped = [r for c in cells if (r := compare_shipped(c, "ours")) is not None]
    against_scratch = [c.speedup("scratch") for c in updated]
    return {
        "ttr_speedup_vs_scratch_median": median(against_scratch) if updated else None,
        "ttr_speedup_vs_scratch_max": max(against_scratch, default=None),
        "ttr_speedup_vs_copy_ft_median": median(c.speedup("copy_ft") for c in updated) if updated else None,
        "fleet_speedup_vs_scratch": _fleet_speedup(updated, "scratch"),
        "fleet_speedup_vs_copy_ft": _fleet_speedup(updated, "copy_ft"),
        "quality_minus_scratch_mean_points": _gain(updated, "ours", "scratch"),
        "regressions_shipped": sum(r.is_established for r in shipped),
        "negative_control_overhead": _overhead(control),
        "packed_training_speedup": packed_training_speedup,
    }


def details(records: Sequence[Record]) -> dict[str, Any]:
    """Return the details behind the figures: arms by update and by task, learning rates, and each regression."""
    cells = cells_of(records)
    updated = [c for c in cells if not c.is_control and c.has("ours", *BASELINES, "v1")]
    shipped = [r for c in cells for arm in ("ours", "paper", "data_free") if (r := compare_shipped(c, arm)) is not None]
    return {
        "with_one_extraction_of_E_per_update": _amortised(updated),
        "by_update": {name: _summary(group) for name, group in _grouped(cells, lambda c: c.update)},
        "by_task": {name: _summary(group) for name, group in _grouped(updated, lambda c: c.task)},
        "by_update_and_task": {name: _summary(g) for name, g in _grouped(cells, lambda c: f"{c.update}/{c.task}")},
        "shipped": {
            arm: {
                "adapters": sum(r.arm == arm for r in shipped),
                "established_regressions": sum(r.arm == arm and r.is_established for r in shipped),
                "below_tolerance_with_or_without_chance": sum(r.arm == arm and r.is_below_tolerance for r in shipped),
                "mean_difference_points": mean([r.difference for r in shipped if r.arm == arm] or [0.0]),
            }
            for arm in ("ours", "paper", "data_free")
        },
        "established_regressions": [vars(r) for r in shipped if r.is_established],
        "learning_rates": _learning_rates(records),
    }


def _amortised(cells: list[Cell]) -> dict[str, float | None]:
    """Return the speed-ups if the adapters of an update and seed share one extraction of E, as in a campaign."""
    shared = []
    for cell in cells:
        num_adapters = sum((c.update, c.seed) == (cell.update, cell.seed) for c in cells)
        shared.append(replace(cell, spared_share=1 - 1 / num_adapters))
    return {
        f"{kind}_vs_{baseline}": figure
        for baseline in BASELINES
        for kind, figure in (
            ("ttr_speedup_median", median(c.speedup(baseline) for c in shared) if shared else None),
            ("fleet_speedup", _fleet_speedup(shared, baseline)),
        )
    }


def _grouped(cells: Iterable[Cell], key: Any) -> Iterable[tuple[str, list[Cell]]]:
    return ((name, list(group)) for name, group in groupby(sorted(cells, key=key), key=key))


def _summary(cells: list[Cell]) -> dict[str, Any]:
    arms = sorted({arm for cell in cells for arm in cell.runs})
    return {
        "arms": {arm: _arm_summary([c.runs[arm] for c in cells if arm in c.runs]) for arm in arms},
        "ttr_speedup_median": {
            f"{arm}_vs_{baseline}": median(c.speedup(baseline, arm) for c in both)
            for arm in ("ours", "paper", "data_free")
            for baseline in ("scratch", "copy_ft")
            if (both := [c for c in cells if c.has(arm, baseline)])
        },
        "quality_minus_scratch_points": {arm: _gain(cells, arm, "scratch") for arm in ("ours", "paper", "copy_ft")},
        "quality_when_ready_minus_scratch_points": {
            arm: _gain_when_ready(cells, arm, "scratch") for arm in ("ours", "paper", "copy_ft", "data_free")
        },
    }


def _arm_summary(runs: list[Record]) -> dict[str, Any]:
    ready = [run.ready for run in runs if run.ready is not None]
    return {
        "runs": len(runs),
        "ready": len(ready),
        "ttr_s_median_of_ready": median(r.seconds for r in ready) if ready else None,
        "steps_median_of_ready": median(r.step for r in ready) if ready else None,
        "test_quality_at_readiness": mean(tested(r.score) for r in ready) if ready else None,
        "test_quality_at_the_end": mean(tested(run.final) for run in runs),
        "rungs": {rung: sum(r.rung == rung for r in ready) for rung in sorted({r.rung for r in ready})},
    }


def _learning_rates(records: Iterable[Record]) -> dict[str, dict[str, Any]]:
    tuned: dict[str, dict[str, Any]] = {}
    for r in records:
        if r.purpose == "tune":
            ttr = None if r.ready is None else round(r.ready.seconds, 3)
            tried = tuned.setdefault(f"{r.update}/{r.task}/{r.arm}", {})
            tried[f"{r.learning_rate:g}"] = {"ttr_s": ttr, "gate_quality": round(r.final.gate, 2)}
    return tuned


def _fleet_speedup(cells: list[Cell], baseline: Arm) -> float | None:
    ours_s = sum(c.ours_s(baseline) for c in cells)
    return sum(c.waited_s(baseline) for c in cells) / ours_s if cells else None


def _gain(cells: list[Cell], arm: Arm, baseline: Arm) -> float | None:
    both = [c for c in cells if c.has(arm, baseline) and c.runs[arm].stop == c.runs[baseline].stop == "budget"]
    gains = [tested(c.runs[arm].final) - tested(c.runs[baseline].final) for c in both]
    return mean(gains) if gains else None


def _gain_when_ready(cells: list[Cell], arm: Arm, baseline: Arm) -> float | None:
    """Return the test quality of the shipped checkpoint minus the baseline's at the end of its budget."""
    both = [(ready, c.runs[baseline].final) for c in cells if c.has(arm, baseline) and (ready := c.runs[arm].ready)]
    return mean(tested(ready.score) - tested(final) for ready, final in both) if both else None


def _overhead(control: list[Cell]) -> float | None:
    """Return (our TTR - scratch's) / scratch's, from the sums over the control's cells."""
    scratch_s = sum(c.waited_s("scratch") for c in control)
    return (sum(c.ours_s("scratch") for c in control) - scratch_s) / scratch_s if control else None


def compare_shipped(cell: Cell, arm: Arm) -> Regression | None:
    """Compare the checkpoint that the arm ships with the lower of v1 and scratch; None if it ships none."""
    run = cell.runs.get(arm)
    if run is None or run.ready is None or not cell.has("v1", "scratch"):
        return None
    references: list[Arm] = ["v1", "scratch"]
    reference = min(references, key=lambda name: tested(cell.runs[name].final))
    difference, error = paired(run.ready.score, cell.runs[reference].final)
    return Regression(*run.cell, arm, reference, difference, error)


def tested(score: Scored) -> float:
    """Return the quality on test rows; reported runs have one."""
    assert score.test is not None
    return score.test


def paired(new: Scored, old: Scored) -> tuple[float, float]:
    """Return the mean difference over the rows, in points, and its standard error."""
    differences = [a - b for a, b in zip(new.test_rows, old.test_rows, strict=True)]
    return mean(differences), stdev(differences) / len(differences) ** 0.5
