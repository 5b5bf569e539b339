"""Report each adapter's prospects on a new base before anything is trained, cheaply enough for a whole fleet.

The evolution is extracted once per pair of bases and shared with the campaign. An adapter then costs four forwards over
a few validation rows: on the old base as it is today, and on the new base the copy, the undo (the old adapter minus the
evolution) and no adapter. The rows are the search's, so the gate's rows stay unseen. `prediction` turns the four into a
rung.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from rich.table import Table

from cluster.adapters.files import Adapter, LoraFactors, load_adapter
from cluster.config.settings import Fleet
from cluster.errors import InvalidAdapterError, ReloraError
from cluster.progress import Counted
from cluster.registry.records import jsonable
from cluster.registry.registry import Registry, Version
from cluster.storage.blobs import BlobStore
from readapt.campaign.base_pair import BasePair, BasePairs
from readapt.campaign.order import ASSESSED
from readapt.campaign.prediction import Corners, Rung, climb_seconds, configured, predict, with_transplant
from readapt.fusion.fuse import Fusion
from readapt.fusion.points import BARE, COPY, UNDO
from readapt.fusion.search import split_valid
from readapt.ladder.relabel import answered, is_data_free, prompts_to_answer
from readapt.lowrank.delta import cosine
from readapt.training.data import Encoder, Row, encoder_for, task_folders
from readapt.training.evaluate import Evaluation, judge
from readapt.training.lora import load_base
from readapt.training.selection import usable_rows

SPECTRUM_RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
NUM_ANSWERED = 64  # prompts of a folder without rows that the old adapter answers for an assessment


Encoders = Callable[[Path], Encoder]
"""Gives the encoder of one adapter on a base, by the base's folder."""


@dataclass(frozen=True)
class Energy:
    """The evolution on the modules of one adapter; shares are of the squared Frobenius norm, 0 to 1.

    `relative_norm` is the mean of |E| / |W1| over the modules. `spectrum` maps ranks, up to the highest extracted, to
    the share they hold. `at_rank` is the share at the adapter's own rank, `at_evolution_rank` that of all extracted.
    """

    relative_norm: float
    at_rank: float
    at_evolution_rank: float
    spectrum: dict[int, float]


@dataclass(frozen=True)
class Assessment:
    """One adapter's prospects. If `error` says why nothing could be measured, `rung` is "none" and the rest is None.

    `rung` is where the ladder will probably end, `reason` says why, and `expected_s` is how long one worker will
    probably need at this machine's speed.
    """

    version: str
    traffic: float
    base: str
    tokenizer: str | None
    num_new_tokens: int | None
    energy: Energy | None
    corners: Corners | None
    rung: Rung | Literal["none"]
    reason: str
    expected_s: float | None
    error: str | None = None


class Assessor:
    """Assesses a fleet's adapters that are live on another base than `target`, and logs the result in the registry."""

    def __init__(
        self, fleet: Fleet, registry: Registry, blobs: BlobStore, target: str, say: Callable[[str], None] = print
    ):
        self._fleet, self._registry, self._blobs, self._target = fleet, registry, blobs, target
        self._say = say
        self._pairs = BasePairs(fleet, registry, blobs, target, say)
        self._base = lru_cache(maxsize=2)(load_base)  # the new base and one old one

    def assess_all(self) -> list[Assessment]:
        """Assess every adapter; return them by falling traffic. One that cannot be assessed gets an error."""
        traffic = {record.name: record.traffic for record in self._registry.adapters()}
        live = [route.live for route in self._registry.routes().values() if route.live.base != self._target]
        live.sort(key=lambda version: (version.base, -traffic[version.adapter], version.adapter))
        found = []
        counted = Counted("assessed adapter", self._say, every_s=5.0)
        for version in live:
            found.append(self.assess(version))
            counted.update(len(found), len(live), version.label)
        return sorted(found, key=lambda assessment: -assessment.traffic)

    def assess(self, version: Version) -> Assessment:
        """Assess one adapter, given its live version."""
        try:
            assessment = self._measure(version, self._pairs.of(version.base))
        except (ReloraError, RuntimeError) as error:  # torch's: out of memory, shapes that do not fit
            return Assessment(
                version=version.label,
                traffic=self._registry.adapter(version.adapter).traffic,
                base=version.base,
                tokenizer=None,
                num_new_tokens=None,
                energy=None,
                corners=None,
                rung="none",
                reason="it cannot be assessed",
                expected_s=None,
                error=str(error),
            )
        details = {"to": self._target, "expected_s": assessment.expected_s, "rung": assessment.rung}
        self._registry.log(ASSESSED, version_id=version.id, adapter=None, **details)
        return assessment

    def _measure(self, version: Version, pair: BasePair) -> Assessment:
        record = self._registry.adapter(version.adapter)
        if version.blob_key is None:
            raise InvalidAdapterError(f"{version.label} has no files in the blob store.")
        data = task_folders(record, version)
        folder = self._blobs.fetch_folder(version.blob_key)
        adapter = load_adapter(folder)
        max_tokens = self._fleet.readapt.train.max_tokens
        encoder = lru_cache(maxsize=2)(lambda base: encoder_for(base, max_tokens, folder))
        evolution = self._pairs.evolution(version.base)
        config = self._fleet.readapt
        rows, gate_rows = split_valid(self._valid(version.base, adapter, encoder, data), config.search)
        corners, row_s = self._corners(version.base, adapter, evolution, encoder, rows)
        energy = energy_of(pair, evolution, adapter)
        rung, reason = self._predict(version.base, adapter, corners)
        num_calibration_rows = self._num_calibration_rows(encoder, rows)
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
            expected_s=climb_seconds(rung, row_s, len(gate_rows), num_calibration_rows, config),
        )

    def _predict(self, old: str, adapter: Adapter, corners: Corners) -> tuple[Rung, str]:
        config = self._fleet.readapt
        rung, reason = predict(corners, config.gate.tolerance_points)
        old_folder, new_folder = self._folders(old)
        similarity = cosine(self._base(old_folder), self._base(new_folder), adapter.factors)
        if similarity < config.ladder.min_cosine:
            rung, reason = "scratch", f"the bases are unrelated: their weights have a cosine of {similarity:.2f}"
        elif "transplant" in config.ladder.rungs:
            rung, reason = with_transplant(rung, reason, corners)
        return configured(rung, config.ladder.rungs), reason

    def _num_calibration_rows(self, encoder: Encoders, rows: Sequence[Row]) -> int:
        """Estimate how many rows a transplant is fitted on, from the lengths of these rows."""
        config = self._fleet.readapt.transplant
        new_base = self._fleet.base(self._target).path
        mean_tokens = sum(len(row.input_ids) for row in encoder(new_base).encode_all(rows)) / len(rows)
        num_tokens = config.tokens_per_width * self._base(new_base).config.hidden_size
        return min(config.rows, math.ceil(num_tokens / mean_tokens))

    def _valid(self, base: str, adapter: Adapter, encoder: Encoders, data: Sequence[Path]) -> list[Row]:
        """Return the validation rows. The old adapter answers some prompts of folders that have only prompts."""
        encoders = [encoder(folder) for folder in self._folders(base)]
        files = [folder / "valid.jsonl" for folder in data if not is_data_free(folder)]
        rows = [row for file in files for row in usable_rows(file, encoders)]
        prompts = prompts_to_answer(data, NUM_ANSWERED)
        if not prompts:
            return rows
        folder = self._fleet.base(base).path
        return rows + answered(self._base(folder), adapter, encoder(folder), prompts)

    def _corners(
        self, old: str, adapter: Adapter, evolution: Adapter, encoder: Encoders, rows: Sequence[Row]
    ) -> tuple[Corners, float]:
        """Return the four evaluations, and the seconds that a forward of one row takes."""
        old_folder, new_folder = self._folders(old)
        fusion = Fusion(adapter, evolution)
        new_encoder = encoder(new_folder)
        copy, undo = (self._judge(new_folder, fusion.at(point), new_encoder, rows) for point in (COPY, UNDO))
        started = time.perf_counter()
        bare = self._judge(new_folder, fusion.at(BARE), new_encoder, rows)
        row_s = (time.perf_counter() - started) / len(rows)
        today = self._judge(old_folder, adapter, encoder(old_folder), rows)
        return Corners(today, copy, undo, bare), row_s

    def _folders(self, old: str) -> tuple[Path, Path]:
        return self._fleet.base(old).path, self._fleet.base(self._target).path

    def _judge(self, base: Path, adapter: Adapter, encoder: Encoder, rows: Sequence[Row]) -> Evaluation:
        return judge(self._base(base), adapter, encoder, rows, "exact_match")


def energy_of(pair: BasePair, evolution: Adapter, adapter: Adapter) -> Energy:
    """Return the evolution's energy on the modules of `adapter`, from its factors and its extraction's report."""
    modules = [module for module in pair.modules if module.module in adapter.factors]
    held = dict.fromkeys(SPECTRUM_RANKS, 0.0)
    total = at_rank = extracted = 0.0
    for module in modules:
        if module.rank == 0:
            continue
        squares = _squared_singular_values(evolution.factors[module.module])
        extracted += sum(squares)
        total += sum(squares) / module.energy
        at_rank += sum(squares[: adapter.factors[module.module].rank])
        for rank in held:
            held[rank] += sum(squares[:rank])
    if total == 0.0:
        return Energy(0.0, 1.0, 1.0, {})
    highest_rank = max(module.rank for module in modules)
    relative_norm = sum(module.relative_norm for module in modules) / len(modules)
    spectrum = {rank: part / total for rank, part in held.items() if rank <= highest_rank}
    return Energy(relative_norm, at_rank / total, extracted / total, spectrum)


def _squared_singular_values(factors: LoraFactors) -> list[float]:
    """Return the squared singular values. In balanced factors each row of A has the root of one as its norm."""
    return [float(value) for value in factors.a_RD.double().square().sum(1).square()]


def as_table(assessments: Sequence[Assessment], target: str) -> Table:
    """Return a table for a person: one line per adapter, losses in nats per token. It has no room for errors."""
    columns = ("version", "traffic", "tokenizer", "|E|/|W|", "E at rank", "E at r_E", "today", "copy", "undo", "bare")
    table = Table(*columns, "predicted", "seconds", "why", title=f"prospects on {target}")
    for a in assessments:
        energy = ["", "", ""]
        if a.energy is not None:
            energy = [f"{a.energy.relative_norm:.3f}", *_percent(a.energy.at_rank, a.energy.at_evolution_rank)]
        losses = ["", "", "", ""] if a.corners is None else [f"{e.loss:.2f}" for e in vars(a.corners).values()]
        seconds = "" if a.expected_s is None else f"{a.expected_s:.0f}"
        table.add_row(a.version, f"{a.traffic:g}", a.tokenizer or "", *energy, *losses, a.rung, seconds, a.reason)
    return table


LEGEND = """\
|E|/|W|: the size of the base's change E relative to its weights W, on the adapter's modules
E at rank, E at r_E: the share of E that the adapter's own rank holds, and that the extracted E_r holds
today, copy, undo, bare: loss in nats per token on the adapter's rows; lower is better. today: on its old base.
  On the new base: copy, the adapter as it is; undo, the adapter minus E; bare, no adapter
predicted, seconds: the rung on which its upgrade will probably end; the work of one worker on this machine"""
"""What the columns of `as_table` mean."""


def _percent(*shares: float) -> list[str]:
    return [f"{100 * share:.0f} %" for share in shares]


def as_json(assessments: Sequence[Assessment], target: str) -> str:
    """Return the assessments as JSON, for a program; errors are included."""
    adapters = [asdict(assessment) for assessment in assessments]
    return json.dumps(jsonable({"to": target, "adapters": adapters}), indent=2) + "\n"
