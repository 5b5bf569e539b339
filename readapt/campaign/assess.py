"""What awaits each adapter on a new base, before anything is trained: a report cheap enough for a whole fleet.

The evolution is extracted once per pair of bases and shared with the campaign. An adapter costs four forwards over few
validation rows (those of the search, so that the gate's stay unseen): on the old base what it can do today, on the new
base the copy, the undo (the old adapter minus the evolution), and no adapter at all.

The prediction is a rule of thumb on what these forwards say, with thresholds that are measured and not derived (see
`predict`); it orders a campaign and tells a person what to expect, and decides nothing else.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from cluster.adapter_files import Adapter, load_adapter
from cluster.blobs import BlobStore
from cluster.config import Fleet, ReadaptConfig
from cluster.errors import InvalidAdapterError, ReloraError
from cluster.records import jsonable
from cluster.registry import Registry, Version
from readapt.campaign.base_pair import BasePair, BasePairs
from readapt.campaign.order import ASSESSED
from readapt.fusion.fuse import Fusion
from readapt.fusion.points import BARE, COPY, UNDO
from readapt.fusion.search import split_valid
from readapt.ladder.relabel import PROMPTS, answered, is_data_free, load_prompts
from readapt.ladder.runs import scratch_settings, warm_settings
from readapt.lowrank.delta import cosine
from readapt.training.data import Row, encoder_for, load_rows, task_folders
from readapt.training.evaluate import Evaluation, judge
from readapt.training.lora import load_base

Rung = Literal["copy", "transplant", "fused", "train", "scratch"]
Prediction = Rung | Literal["none"]
ORDER: tuple[Rung, ...] = ("copy", "transplant", "fused", "train", "scratch")
SPECTRUM_RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
READY_EXCESS = 0.05  # nats a token above today's loss at which no training is needed, if the answers are as right too
# Of the way from no adapter to today's: below, a warm start is not worth having. Measured: strong updates of one base
# keep 0.55 to 0.97, independent bases 0 to 0.08.
WORTH_SHARE = 0.25
NUM_ANSWERED = 64  # prompts that the old service answers for an assessment where there are no rows
BACKWARD_COST = 3.0  # a training step in forwards of the same rows
TRANSPLANT_COST = 5.0  # likewise: two forwards, and the products and solves of the regressions


@dataclass(frozen=True)
class Energy:
    """The evolution on the modules of one adapter; shares are of the squared Frobenius norm, 0 to 1.

    `relative_norm` is the mean of |E| / |W1| over the modules. `spectrum` is the share that a given rank holds, of the
    ranks that were extracted; `at_rank` that of the adapter's own rank, `at_evolution_rank` all that was extracted.
    """

    relative_norm: float
    at_rank: float
    at_evolution_rank: float
    spectrum: dict[int, float]


@dataclass(frozen=True)
class Corners:
    """What is there before any training: the adapter on its `old` base, and three starts on the new one.

    Loss in nats per completion token, quality as the share of rows answered exactly, in points, whatever the metric.
    """

    old: Evaluation
    copy: Evaluation
    undo: Evaluation
    bare: Evaluation


@dataclass(frozen=True)
class Assessment:
    """One adapter's prospects. Where `error` says why nothing could be measured, `rung` is "none" and the rest None.

    `rung` is where the ladder will probably end, `expected_s` how long one worker will need for it at the speed of this
    machine, and `reason` the words for both.
    """

    version: str
    traffic: float
    base: str
    tokenizer: str | None
    num_new_tokens: int | None
    energy: Energy | None
    corners: Corners | None
    rung: Prediction
    reason: str
    expected_s: float | None
    error: str | None = None


class Assessor:
    """Assesses the adapters of a fleet that are live on other bases than `target`; writes to the registry's log."""

    def __init__(
        self, fleet: Fleet, registry: Registry, blobs: BlobStore, target: str, say: Callable[[str], None] = print
    ):
        self._fleet, self._registry, self._blobs, self._target = fleet, registry, blobs, target
        self._pairs = BasePairs(fleet, registry, blobs, target, say)
        self._base = lru_cache(maxsize=2)(load_base)  # the new base and one old one
        self._encoder = lru_cache(maxsize=2)(lambda base: encoder_for(base, fleet.readapt.train.max_tokens))

    def assess_all(self) -> list[Assessment]:
        """Every adapter, busiest first. An adapter that cannot be assessed is told as such and holds up no other."""
        traffic = {record.name: record.traffic for record in self._registry.adapters()}
        live = [route.live for route in self._registry.routes().values() if route.live.base != self._target]
        live.sort(key=lambda version: (version.base, -traffic[version.adapter], version.adapter))
        found = [self.assess(version) for version in live]
        return sorted(found, key=lambda assessment: -assessment.traffic)

    def assess(self, version: Version) -> Assessment:
        """One adapter, by its live version."""
        try:
            assessment = self._measure(version, self._pairs.of(version.base))
        except (ReloraError, RuntimeError) as error:  # torch's: out of memory, shapes that do not fit
            traffic = self._registry.adapter(version.adapter).traffic
            words = "it cannot be assessed"
            return Assessment(
                version.label, traffic, version.base, None, None, None, None, "none", words, None, str(error)
            )
        news = {"to": self._target, "expected_s": assessment.expected_s, "rung": assessment.rung}
        self._registry.log(ASSESSED, version_id=version.id, adapter=None, **news)
        return assessment

    def _measure(self, version: Version, pair: BasePair) -> Assessment:
        record = self._registry.adapter(version.adapter)
        if version.blob_key is None:
            raise InvalidAdapterError(f"{version.label} has no files in the blob store.")
        data = task_folders(record, version)
        task = load_adapter(self._blobs.fetch_folder(version.blob_key))
        evolution = self._pairs.evolution(version.base)
        config = self._fleet.readapt
        rows, gate_rows = split_valid(self._valid(version.base, task, data), config.search)
        corners, row_s = self._corners(version.base, task, evolution, rows)
        energy = energy_of(pair, evolution, task)
        rung, reason = predict(corners, config.gate.tolerance_points)
        before, after = self._folders(version.base)
        similarity = cosine(self._base(before), self._base(after), task.factors)
        if similarity < config.ladder.min_cosine:
            rung, reason = "scratch", f"the bases are unrelated: their weights have a cosine of {similarity:.2f}"
        elif "transplant" in config.ladder.rungs:
            rung, reason = with_transplant(rung, reason, corners)
        rung = configured(rung, config.ladder.rungs)
        return Assessment(
            version=version.label,
            traffic=record.traffic,
            base=version.base,
            tokenizer=pair.tokenizer,
            num_new_tokens=pair.num_new_tokens,
            energy=energy,
            corners=corners,
            rung=rung,
            reason=reason,
            expected_s=expected_seconds(rung, row_s, len(gate_rows), self._num_calibration_rows(after, rows), config),
        )

    def _num_calibration_rows(self, base: Path, rows: Sequence[Row]) -> int:
        """How many rows a transplant is fitted on, if these tell how long rows are."""
        config = self._fleet.readapt.transplant
        tokens = sum(len(row.input_ids) for row in self._encoder(base).encode_all(rows)) / len(rows)
        return min(config.rows, math.ceil(config.tokens_per_width * self._base(base).config.hidden_size / tokens))

    def _valid(self, base: str, task: Adapter, data: Sequence[Path]) -> list[Row]:
        """Validation rows; where there are only prompts, some of them as the old service answers them."""
        rows = [row for folder in data if not is_data_free(folder) for row in load_rows(folder / "valid.jsonl")]
        prompts = [p for folder in data if is_data_free(folder) for p in load_prompts(folder / PROMPTS)[:NUM_ANSWERED]]
        if not prompts:
            return rows
        folder = self._fleet.base(base).path
        return rows + answered(self._base(folder), task, self._encoder(folder), list(dict.fromkeys(prompts)))

    def _corners(self, old: str, task: Adapter, evolution: Adapter, rows: Sequence[Row]) -> tuple[Corners, float]:
        """The four, and the seconds that a forward of one row takes."""
        before, after = self._folders(old)
        fusion = Fusion(task, evolution)
        copy, undo = (self._judge(after, fusion.at(point), rows) for point in (COPY, UNDO))
        started = time.perf_counter()
        bare = self._judge(after, fusion.at(BARE), rows)
        row_s = (time.perf_counter() - started) / len(rows)
        return Corners(self._judge(before, task, rows), copy, undo, bare), row_s

    def _folders(self, old: str) -> tuple[Path, Path]:
        return self._fleet.base(old).path, self._fleet.base(self._target).path

    def _judge(self, base: Path, adapter: Adapter, rows: Sequence[Row]) -> Evaluation:
        return judge(self._base(base), adapter, self._encoder(base), rows, "exact_match")


def predict(corners: Corners, tolerance_points: float) -> tuple[Rung, str]:
    """Where the ladder will probably end, and why, by thresholds measured on small models (docs/experiments.md).

    A start that answers as many rows exactly as today, but for the gate's tolerance or one row, at a loss at most
    `READY_EXCESS` above today's, passes as it is: the copy, else the undo. Else what counts is how much of the
    adapter's worth the better of the two keeps, from 0 (no better than no adapter) to 1 (as today), by their losses: a
    start that keeps `WORTH_SHARE` is ready after few steps of training, one that does not is no help.
    """
    old, starts = corners.old, {"copy": corners.copy, "undo": corners.undo}
    if not math.isfinite(old.loss):
        return "scratch", "the adapter's own loss on its own base is not a number"
    rungs: dict[str, Rung] = {"copy": "copy", "undo": "fused"}
    asked = old.quality - max(tolerance_points, 100.0 / max(old.num_rows, 1)) - 1e-6
    for name, start in starts.items():
        if start.loss - old.loss <= READY_EXCESS and start.quality >= asked:
            return rungs[name], f"the {name} is as good as today: {start.loss:.2f} nats a token, today {old.loss:.2f}"
    worth = max(corners.bare.loss - old.loss, 1e-9)
    shares = {
        n: (corners.bare.loss - s.loss) / worth if math.isfinite(s.loss) else -math.inf for n, s in starts.items()
    }
    best = max(shares, key=lambda name: shares[name])
    if shares[best] >= WORTH_SHARE:
        return "train", f"the {best} keeps {100 * shares[best]:.0f} % of what the adapter is worth"
    return "scratch", f"no start keeps more than {100 * max(shares[best], 0.0):.0f} % of what the adapter is worth"


def with_transplant(rung: Rung, reason: str, corners: Corners) -> tuple[Rung, str]:
    """The same for a ladder that has a transplant: it starts from what the old service did, not from copy or undo.

    In `relora bench readapt` 45 of 54 adapters on related bases needed no training (docs/results.md).
    """
    if rung not in ("train", "scratch") or not math.isfinite(corners.old.loss):
        return rung, reason
    return "transplant", f"{reason}; a transplant does not start from there"


def configured(rung: Rung, rungs: Sequence[Rung]) -> Rung:
    """The rung of a ladder that has only these: where one start is good enough any will do, else the next higher."""
    starts = [r for r in rungs if r in ("transplant", "fused")]
    if rung == "fused" and starts:
        return starts[0]
    return next((r for r in ORDER[ORDER.index(rung) :] if r in rungs), rungs[-1])


def energy_of(pair: BasePair, evolution: Adapter, task: Adapter) -> Energy:
    """The evolution on the modules of `task`, from the extracted factors and what their extraction reported."""
    modules = [module for module in pair.modules if module.module in task.factors]
    held, total, at_rank, extracted = dict.fromkeys(SPECTRUM_RANKS, 0.0), 0.0, 0.0, 0.0
    for module in modules:
        if module.rank == 0:
            continue
        squares = _squared_singular_values(evolution.factors[module.module])
        extracted += sum(squares)
        total += sum(squares) / module.energy
        at_rank += sum(squares[: task.factors[module.module].rank])
        for rank in held:
            held[rank] += sum(squares[:rank])
    largest = max((module.rank for module in modules), default=0)
    if total == 0.0:
        return Energy(0.0, 1.0, 1.0, {})
    relative_norm = sum(module.relative_norm for module in modules) / len(modules)
    spectrum = {rank: part / total for rank, part in held.items() if rank <= largest}
    return Energy(relative_norm, at_rank / total, extracted / total, spectrum)


def _squared_singular_values(factors: Any) -> list[float]:
    """Of balanced factors, where each row of A has the root of a singular value for its norm."""
    return [float(value) for value in factors.a_RD.double().square().sum(1).square()]


def expected_seconds(
    rung: Rung, row_s: float, num_gate_rows: int, num_calibration_rows: int, config: ReadaptConfig
) -> float:
    """How long a worker climbs to a rung, in forwards of one row at `row_s` each: an estimate to order a fleet by."""
    train, search = config.train, config.search
    settings = {"train": warm_settings(train, None), "scratch": scratch_settings(train)}
    looks = {name: sum(map(run.is_due, range(1, run.steps + 1))) for name, run in settings.items()}
    rows: dict[Rung, float] = {
        "copy": num_gate_rows,
        "transplant": TRANSPLANT_COST * num_calibration_rows + num_gate_rows,
        "fused": search.trials * search.subset_rows + num_gate_rows,
        "train": BACKWARD_COST * train.full_steps * train.batch_rows + looks["train"] * num_gate_rows,
        "scratch": BACKWARD_COST * train.scratch_steps * train.batch_rows + looks["scratch"] * num_gate_rows,
    }
    climbed = [r for r in config.ladder.rungs if ORDER.index(r) <= ORDER.index(rung)]
    return row_s * (num_gate_rows + sum(rows[r] for r in climbed))


def as_table(assessments: Sequence[Assessment], target: str) -> Table:
    """For a person: one line an adapter, losses in nats a token; errors, which have no room in it, are not told."""
    columns = ("version", "traffic", "tokenizer", "|E|/|W|", "E at rank", "E at r_E", "today", "copy", "undo", "bare")
    table = Table(*columns, "predicted", "seconds", "why", title=f"on their way to {target}")
    for a in assessments:
        energy = ["", "", ""]
        if a.energy is not None:
            energy = [f"{a.energy.relative_norm:.3f}", *_percent(a.energy.at_rank, a.energy.at_evolution_rank)]
        losses = ["", "", "", ""] if a.corners is None else [f"{e.loss:.2f}" for e in vars(a.corners).values()]
        seconds = "" if a.expected_s is None else f"{a.expected_s:.0f}"
        table.add_row(a.version, f"{a.traffic:g}", a.tokenizer or "", *energy, *losses, a.rung, seconds, a.reason)
    return table


def _percent(*shares: float) -> list[str]:
    return [f"{100 * share:.0f} %" for share in shares]


def as_json(assessments: Sequence[Assessment], target: str) -> str:
    """The same and more, for a program."""
    adapters = [asdict(assessment) for assessment in assessments]
    return json.dumps(jsonable({"to": target, "adapters": adapters}), indent=2) + "\n"
