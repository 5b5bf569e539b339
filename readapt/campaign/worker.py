"""A worker holds the base models, loaded once, and carries adapters over, job after job."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from cluster.adapters.files import Adapter, load_adapter
from cluster.config.settings import Fleet
from cluster.fleet import open_blobs
from cluster.storage.blobs import BlobStore
from readapt.campaign.jobs import AdapterJob, AdapterResult, RungReached
from readapt.fusion.objective import FusionObjective, SearchResult
from readapt.ladder.inputs import Bases, LadderTask, TaskRows
from readapt.ladder.ladder import Ladder, LadderSteps
from readapt.ladder.outcome import Outcome
from readapt.ladder.relabel import is_data_free, prompts_to_answer, relabelled
from readapt.ladder.smaller import Fitted, fitted
from readapt.training.data import Encoder, Row, Task, encoder_for, joined
from readapt.training.evaluate import Evaluation, Evaluator, Gate, golden, judge
from readapt.training.lora import attached, load_base
from readapt.training.reference import reference
from readapt.training.selection import usable_rows
from readapt.training.training_run import CurvePoint

NUM_OLD_BASES_HELD = 2  # beside the new one; adapters seldom come from more
NUM_ENCODERS_HELD = 16  # two for each adapter under way
GOLDEN_TOKENS = 16

JobSearch = Callable[[AdapterJob, FusionObjective], SearchResult | None]
"""Searches for a job's fused start. None means: still searching elsewhere, ask again."""


class Worker:
    """Carries adapters over to new bases. Holds one new base and a few old ones. Not thread-safe."""

    def __init__(self, fleet: Fleet, device: str = "cpu"):
        self._config = fleet.readapt
        self._num_golden = fleet.rollout.golden_prompts
        self._blobs: BlobStore = open_blobs(fleet)
        self.new_base = lru_cache(maxsize=1)(lambda folder: load_base(folder, device))
        self._old_base = lru_cache(maxsize=NUM_OLD_BASES_HELD)(lambda folder: load_base(folder, device))
        self._encoder = lru_cache(maxsize=NUM_ENCODERS_HELD)(self._open_encoder)

    def carry_over(
        self, job: AdapterJob, search: JobSearch, report: Callable[[RungReached], None]
    ) -> LadderSteps[AdapterResult]:
        """Carry one adapter over. See `LadderSteps` for what is yielded and sent.

        Raises a ReloraError if the adapter's files, its rows or its training are at fault.
        """
        started = time.perf_counter()
        found: list[SearchResult] = []

        def search_and_keep(objective: FusionObjective) -> SearchResult | None:
            result = search(job, objective)
            if result is not None:
                found.append(result)
            return result

        def report_point(rung: str, point: CurvePoint) -> None:
            report(RungReached(rung, point, time.perf_counter() - started))

        left_out: Counter[str] = Counter()
        task = self._task(job, left_out)
        rows = TaskRows.split(task, self._config.search)
        gate = self._gate(job, rows)
        stages = self._stages(job)
        reference_s = time.perf_counter() - started
        bases = self._bases(job)
        ladder_task = LadderTask(self._adapter(job.task_key), rows, gate, job.metric)
        outcome = yield from Ladder(bases, ladder_task, self._config, search_and_keep, report=report_point).climb()
        setback = None
        if outcome.accepted:
            size = self._fitted(job, outcome, ladder_task, bases, stages)
            outcome = replace(outcome, adapter=size.adapter, quality=size.quality)
            setback = size.setback or self._setback(job, outcome.adapter, stages)
        completions = self._golden(bases, task.valid, outcome.adapter)
        climb_s = time.perf_counter() - started - reference_s
        return AdapterResult(
            replace(outcome, ready=None, accepted=outcome.accepted and setback is None),
            found[-1] if found else None,
            {"reference": reference_s, "climb": climb_s},
            completions,
            setback,
            dict(left_out),
        )

    def objective(self, job: AdapterJob) -> FusionObjective:
        """Return the job's search objective, for a search outside the worker."""
        rows = TaskRows.split(self._task(job), self._config.search).search
        return FusionObjective(
            self.new_base(job.new_base),
            self._adapter(job.task_key),
            self._evolution(job),
            rows,
            self._encoder(job.new_base, job.task_key),
            self._config.search,
        )

    def _task(self, job: AdapterJob, left_out: Counter[str] | None = None) -> Task:
        """Join the rows of all the job's folders. The old adapter answers the prompts of folders without answers.

        Rows that cannot be used are counted in `left_out`.
        """
        tasks = [
            Task(
                self._rows(job, folder / "train.jsonl", left_out), self._rows(job, folder / "valid.jsonl", left_out), []
            )
            for folder in job.data
            if not is_data_free(folder)
        ]
        prompts = prompts_to_answer(job.data)
        if prompts:
            old = self._adapter(job.task_key)
            tasks.append(
                relabelled(self._old_base(job.old_base), old, self._encoder(job.old_base, job.task_key), prompts)
            )
        return joined(tasks)

    def _rows(self, job: AdapterJob, file: Path, left_out: Counter[str] | None = None) -> list[Row]:
        """Return the rows of a file that fit both bases, so that old and new are judged on the same rows."""
        encoders = [self._encoder(base, job.task_key) for base in (job.old_base, job.new_base)]
        return usable_rows(file, encoders, left_out)

    def _bases(self, job: AdapterJob) -> Bases:
        return Bases(
            old=self._old_base(job.old_base),
            new=self.new_base(job.new_base),
            encoder=self._encoder(job.new_base, job.task_key),
            evolution=self._evolution(job),
        )

    def _gate(self, job: AdapterJob, rows: TaskRows) -> Gate:
        """Return the gate that asks for the old adapter's quality on the old base."""
        gate = Gate.beside(self._old_quality(job, rows.gate), self._config.gate)
        return gate if has_labels(job) else replace(gate, tolerance_points=self._config.gate.agreement_points)

    def _stages(self, job: AdapterJob) -> dict[Path, float]:
        """Return the old adapter's quality by folder, if it learned stages: each stage has its own reference."""
        folders = [folder for folder in job.data if not is_data_free(folder)] if len(job.data) > 1 else []
        return {folder: self._old_quality(job, self._rows(job, folder / "valid.jsonl")) for folder in folders}

    def _fitted(
        self, job: AdapterJob, outcome: Outcome, task: LadderTask, bases: Bases, stages: Mapping[Path, float]
    ) -> Fitted:
        """Return the smallest adapter that does what the accepted one does (`readapt.ladder.smaller`), on each stage.

        A cut that answers as many rows right in all may still lose those of one stage: such a cut does not pass.
        """
        config = self._config.gate

        def judged(adapter: Adapter, gate: Gate) -> Evaluation:
            with attached(bases.new, adapter):
                found = Evaluator(
                    bases.new, bases.encoder, task.rows.gate, task.metric, gate=gate, confidence=config.confidence
                )()
            passes = found.is_complete and gate.passes(found.quality)
            return replace(found, is_complete=passes and self._setback(job, adapter, stages) is None)

        gate = replace(task.gate, reference=outcome.reference)
        return fitted(outcome.adapter, outcome.quality, outcome.rung, task.old, gate, config.max_growth, judged)

    def _setback(self, job: AdapterJob, adapter: Adapter, stages: Mapping[Path, float]) -> str | None:
        """Name a stage that lost more than `gate.max_drop_points`. The gate, over all rows, may miss a small stage.

        A stage may always lose one row, because one row of few is many points.
        """
        for folder, before in stages.items():
            rows = self._rows(job, folder / "valid.jsonl")
            after = judge(
                self.new_base(job.new_base), adapter, self._encoder(job.new_base, job.task_key), rows, job.metric
            ).quality
            if before - after > max(self._config.gate.max_drop_points, 100.0 / len(rows)) + 1e-6:
                return f"it passed its gate, but fell from {before:.1f} to {after:.1f} points on the rows in {folder}"
        return None

    def _old_quality(self, job: AdapterJob, rows: Sequence[Row]) -> float:
        """Return the old adapter's quality on the old base. InvalidDataError if it is no reference."""
        base, old, gate = self._old_base(job.old_base), self._adapter(job.task_key), self._config.gate
        return reference(base, old, self._encoder(job.old_base, job.task_key), rows, job.metric, gate).quality

    def _golden(self, bases: Bases, rows: list[Row], adapter: Adapter) -> tuple[dict[str, Any], ...]:
        """Return the adapter's golden completions of the first distinct prompts that leave room for an answer."""
        encoder = bases.encoder
        max_tokens = encoder.max_tokens - GOLDEN_TOKENS
        distinct = dict.fromkeys(row.prompt for row in rows)
        fitting = (prompt for prompt in distinct if len(encoder.encode_prompt(prompt)) <= max_tokens)
        prompts = list(islice(fitting, self._num_golden))
        with attached(bases.new, adapter):
            return tuple(golden(bases.new, encoder, prompts, GOLDEN_TOKENS))

    def _adapter(self, key: str) -> Adapter:
        return load_adapter(self._blobs.fetch_folder(key))

    def _evolution(self, job: AdapterJob) -> Adapter:
        return Adapter({}) if job.evolution_key is None else self._adapter(job.evolution_key)

    def _open_encoder(self, base: Path, key: str) -> Encoder:
        """Return the encoder of an adapter on a base. The text files beside the old adapter hold on both bases."""
        return encoder_for(base, self._config.train.max_tokens, self._blobs.fetch_folder(key))


def has_labels(job: AdapterJob) -> bool:
    """Return whether all rows have true answers, with no prompts that the old adapter has to answer."""
    return not any(map(is_data_free, job.data))
