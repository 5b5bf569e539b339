"""Predict where a ladder ends and how long it takes, by rules of thumb with measured thresholds.

A prediction orders a campaign and tells a person what to expect. It decides nothing else.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.config.readapt import ReadaptConfig, Rung
from readapt.ladder.runs import scratch_settings, warm_settings
from readapt.training.evaluate import Evaluation

ORDER: tuple[Rung, ...] = ("copy", "transplant", "fused", "train", "scratch")
READY_EXCESS = 0.05  # nats per token above today's loss up to which a start needs no training, if it answers as well
# Share of the way from no adapter to today's adapter; a start below it is no help to training. Measured: strong updates
# of one base keep 0.55 to 0.97, independent bases 0 to 0.08.
WORTH_SHARE = 0.25
BACKWARD_COST = 3.0  # of a training step, in forwards of the same rows
TRANSPLANT_COST = 5.0  # likewise: two forwards, and the products and solves of the regressions


@dataclass(frozen=True)
class Corners:
    """Four evaluations before any training: the adapter on its `old` base, and three starts on the new one.

    Loss in nats per completion token. Quality is the share of rows answered exactly, in points, for every metric.
    """

    old: Evaluation
    copy: Evaluation
    undo: Evaluation
    bare: Evaluation


def predict(corners: Corners, tolerance_points: float) -> tuple[Rung, str]:
    """Return the rung where the ladder will probably end, and why. Thresholds: see docs/experiments/readapt.md.

    A start is ready if it answers as many rows exactly as today (less the gate's tolerance, or one row), and its loss
    is at most `READY_EXCESS` above today's. The copy is tried first, then the undo. Otherwise the better of the two
    is rated from 0 (no better than no adapter) to 1 (as good as today) by its loss. From `WORTH_SHARE` on, a few steps
    of training make it ready; below that it does not help.
    """
    old = corners.old
    starts = {"copy": corners.copy, "undo": corners.undo}
    if not math.isfinite(old.loss):
        return "scratch", "the adapter's own loss on its own base is not a number"
    rungs: dict[str, Rung] = {"copy": "copy", "undo": "fused"}
    least = old.quality - max(tolerance_points, 100.0 / max(old.num_rows, 1)) - 1e-6
    for name, start in starts.items():
        if start.loss - old.loss <= READY_EXCESS and start.quality >= least:
            return rungs[name], f"the {name} is as good as today: {start.loss:.2f} nats per token, today {old.loss:.2f}"
    worth = max(corners.bare.loss - old.loss, 1e-9)
    shares = {
        name: (corners.bare.loss - start.loss) / worth if math.isfinite(start.loss) else -math.inf
        for name, start in starts.items()
    }
    best = max(shares, key=lambda name: shares[name])
    if shares[best] >= WORTH_SHARE:
        return "train", f"the {best} keeps {100 * shares[best]:.0f} % of what the adapter is worth"
    return "scratch", f"no start keeps more than {100 * max(shares[best], 0.0):.0f} % of what the adapter is worth"


def with_transplant(rung: Rung, reason: str, corners: Corners) -> tuple[Rung, str]:
    """Correct a prediction for a ladder with a transplant, which uses what the old service did and not copy or undo.

    In `relora bench readapt` 45 of 54 adapters on related bases needed no training (docs/results.md).
    """
    if rung not in ("train", "scratch") or not math.isfinite(corners.old.loss):
        return rung, reason
    return "transplant", f"{reason}; a transplant does not start from there"


def configured(rung: Rung, rungs: Sequence[Rung]) -> Rung:
    """Return the predicted rung among those configured: another start instead of "fused", else the next higher one."""
    starts = [r for r in rungs if r in ("transplant", "fused")]
    if rung == "fused" and starts:
        return starts[0]
    return next((r for r in ORDER[ORDER.index(rung) :] if r in rungs), rungs[-1])


def climb_seconds(
    rung: Rung, row_s: float, num_gate_rows: int, num_calibration_rows: int, config: ReadaptConfig
) -> float:
    """Estimate how long a worker climbs to a rung, if a forward of one row takes `row_s`."""
    train, search = config.train, config.search
    settings = {"train": warm_settings(train, None), "scratch": scratch_settings(train)}
    evaluations = {name: sum(map(run.is_due, range(1, run.steps + 1))) for name, run in settings.items()}
    rows: dict[Rung, float] = {
        "copy": num_gate_rows,
        "transplant": TRANSPLANT_COST * num_calibration_rows + num_gate_rows,
        "fused": search.trials * search.subset_rows + num_gate_rows,
        "train": BACKWARD_COST * train.full_steps * train.batch_rows + evaluations["train"] * num_gate_rows,
        "scratch": BACKWARD_COST * train.scratch_steps * train.batch_rows + evaluations["scratch"] * num_gate_rows,
    }
    climbed = [r for r in config.ladder.rungs if ORDER.index(r) <= ORDER.index(rung)]
    return row_s * (num_gate_rows + sum(rows[r] for r in climbed))
