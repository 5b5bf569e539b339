"""Extraction: what full fine-tuning changed in a checkpoint, as LoRA adapters (PHLoRA, arXiv 2509.10971).

Every matrix that a module of the model class uses becomes its truncated SVD, A = sqrt(S) V^T and B = U sqrt(S), with
alpha = rank. One decomposition serves any number of ranks. Tensors are read, decomposed and written aside one by one,
so that memory is a few times the largest tensor, a killed run goes on where it was, and the work can be spread over
machines that share the output folder. What is no matrix goes whole to a remainder file; what cannot be carried is
listed in the report. Shape letters: D in, F out, R rank.
"""

import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from cluster.checkpoints import Checkpoint
from cluster.errors import ConfigError, ConflictError, InvalidCheckpointError, StorageError
from readapt.extraction.anatomy import Anatomy, Kind, anatomy_of
from readapt.extraction.files import Extraction, Part, Status, read_part, write_adapter, write_part, write_remainder
from readapt.extraction.pairs import TensorPair, pair_tensors
from readapt.extraction.report import report_of, write_report
from readapt.lowrank.spectra import EnergyShare, Rule
from readapt.lowrank.svd import decompose, squared_norm

REMAINDER_VALUES = 1 << 20  # a tensor that is no vector and larger than this is not carried
PLAIN_DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16}  # what is stored is what is meant
Spread = Callable[[Callable[[TensorPair], None], Sequence[TensorPair]], Iterable[TensorPair]]


@dataclass(frozen=True)
class Settings:
    """What to extract: rules for the ranks, a cap for all of them, and which tensors (patterns searched in names)."""

    rules: tuple[Rule, ...] = (EnergyShare(0.95),)
    max_rank: int | None = None
    include: str | None = None
    exclude: str | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for option, pattern in (("include", self.include), ("exclude", self.exclude)):
            try:
                re.compile(pattern or "")
            except re.error as error:
                raise ConfigError(f"extraction: {option} {pattern!r} is no regular expression: {error}") from error
        if len({rule.label for rule in self.rules}) < len(self.rules):
            raise ConfigError("extraction: a rule for the ranks is given twice")

    def leaves_out(self, path: str) -> bool:
        """Whether the patterns exclude a tensor."""
        is_included = self.include is None or re.search(self.include, path)
        return not is_included or (self.exclude is not None and re.search(self.exclude, path) is not None)


@dataclass(frozen=True)
class Extractor:
    """Turns one tensor of the pair into its part file; holds all that a worker elsewhere needs to know."""

    base: Checkpoint
    tuned: Checkpoint
    settings: Settings
    folder: Path

    def __call__(self, job: TensorPair) -> None:
        """Work off one tensor. InvalidCheckpointError where a value is not finite, StorageError for a full disk."""
        start_s = time.perf_counter()
        part, tensors = self._extract(job)
        part.seconds = time.perf_counter() - start_s
        write_part(self.folder, part, tensors)

    def _extract(self, job: TensorPair) -> tuple[Part, dict[str, Tensor]]:
        tuned = self.tuned.load(job.tuned)
        part = Part(job.index, job.path, Status.EQUAL, tuple(tuned.shape), job.places)
        base = None if job.base is None else self.base.load(job.base)
        if base is not None and base.dtype == tuned.dtype and torch.equal(base, tuned):
            return part, {}
        if self.settings.leaves_out(job.path):
            part.status, part.reason = Status.LEFT_OUT, "left out by the include and exclude patterns"
            return part, {}
        if base is None or not job.places:
            return self._whole(part, tuned, job.reason)
        if not {base.dtype, tuned.dtype} <= PLAIN_DTYPES:
            part.status, part.reason = Status.LEFT_OUT, f"its values are quantised ({base.dtype}, {tuned.dtype})"
            return part, {}
        part.shape = (base.shape[0], *tuned.shape[1:])
        rows = tuned[base.shape[0] :].clone()
        part.num_new_rows = len(rows)
        self._check_finite(squared_norm(rows), job)
        delta = tuned[: base.shape[0]].to(torch.float32, copy=True)
        delta -= base
        part.base_total = squared_norm(base)
        del base, tuned  # their files' pages count
        return self._low_rank(part, job, delta, {"new_rows": rows} if part.num_new_rows else {})

    def _whole(self, part: Part, tuned: Tensor, reason: str) -> tuple[Part, dict[str, Tensor]]:
        """A tensor that is stored as it is, or not at all."""
        if tuned.is_floating_point() and not math.isfinite(squared_norm(tuned)):
            raise InvalidCheckpointError(f"{self.tuned.folder}: {part.path} has values that are not finite.")
        part.reason = reason
        part.status = Status.REMAINDER
        if tuned.ndim > 1 and tuned.numel() > REMAINDER_VALUES:
            part.status = Status.LEFT_OUT
            return part, {}
        return part, {"value": tuned.contiguous()}

    def _low_rank(
        self, part: Part, job: TensorPair, delta: Tensor, tensors: dict[str, Tensor]
    ) -> tuple[Part, dict[str, Tensor]]:
        total = squared_norm(delta)
        self._check_finite(total, job)
        part.status = Status.CARRIED if total else Status.REMAINDER if tensors else Status.EQUAL
        if not total:
            return part, tensors
        w_FD = _as_matrix(delta, job.places[0].kind)
        side = min(w_FD.shape)
        limit = max(rule.limit(side) for rule in self.settings.rules)
        found = decompose(w_FD, min(limit, self.settings.max_rank or side))
        spectrum = found.spectrum()
        part.spectrum = replace(spectrum, cost=spectrum.cost * len(part.places))
        part.is_exact, part.gap_bound = found.is_exact, found.gap_bound
        rank = max(max(rule.ranks({part.path: part.spectrum}).values()) for rule in self.settings.rules)
        a_RD, b_FR = found.factors(max(rank, 1))
        return part, {**tensors, "a": a_RD, "b": b_FR}

    def _check_finite(self, norm: float, job: TensorPair) -> None:
        if not math.isfinite(norm):
            tuned_is_fine = math.isfinite(squared_norm(self.tuned.load(job.tuned)))
            folder = self.base.folder if tuned_is_fine else self.tuned.folder
            raise InvalidCheckpointError(f"{folder}: {job.path} has values that are not finite.")


def extract(
    base: Checkpoint,
    tuned: Checkpoint,
    out: Path,
    settings: Settings,
    spread: Spread | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Extraction:
    """Write the adapters of every rule into a new folder `out`: one rule's directly, several rules' in subfolders.

    Work in progress lies beside it, in `.NAME.partial`; a run of the same settings on the same files goes on from
    there. `spread` maps the work over processes (None: one after the other); `report` hears (tensors done, of all).
    InvalidCheckpointError where the checkpoints do not belong together, are equal or have values that are not finite;
    ConflictError where `out` exists; StorageError where the disk is full or the folder cannot be written.
    """
    if out.exists():
        raise ConflictError(f"{out}: exists already; choose another folder, or remove it first.")
    anatomy = anatomy_of(base, tuned)
    jobs = pair_tensors(base, tuned, anatomy)
    aside = out.parent / f".{out.name}.partial"
    try:
        _prepare(aside, _identity(base, tuned, settings))
        parts = _work_off(Extractor(base, tuned, settings, aside), jobs, spread or _one_by_one, report)
        done = _assemble(aside / "out", parts, settings, anatomy, base.folder)
        write_report(done, report_of(done, base.folder, tuned.folder))
        (aside / "out").rename(out)
    except InvalidCheckpointError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{out}: the adapter cannot be written: {error}") from error
    shutil.rmtree(aside, ignore_errors=True)
    adapters = {label: out / folder.relative_to(aside / "out") for label, folder in done.adapters.items()}
    return Extraction(out, adapters, done.ranks, parts, anatomy)


def _prepare(aside: Path, identity: str) -> None:
    """Keeps what an earlier run of the same work has left, and nothing else."""
    marker = aside / "identity.json"
    if not marker.is_file() or marker.read_text() != identity:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        marker.write_text(identity)
    shutil.rmtree(aside / "out", ignore_errors=True)


def _identity(base: Checkpoint, tuned: Checkpoint, settings: Settings) -> str:
    files = [file for folder in (base.folder, tuned.folder) for file in sorted(folder.glob("*.safetensors"))]
    stats = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return json.dumps({"settings": repr(settings), "files": stats})


def _work_off(
    extractor: Extractor, jobs: Sequence[TensorPair], spread: Spread, report: Callable[[int, int], None]
) -> list[Part]:
    waiting = [job for job in jobs if read_part(extractor.folder, job.index) is None]
    num_done = len(jobs) - len(waiting)
    report(num_done, len(jobs))
    for _ in spread(extractor, waiting):
        num_done += 1
        report(num_done, len(jobs))
    parts = [read_part(extractor.folder, job.index) for job in jobs]
    return [part for part in parts if part is not None]


def _one_by_one(extractor: Callable[[TensorPair], None], jobs: Sequence[TensorPair]) -> Iterator[TensorPair]:
    for job in jobs:
        extractor(job)
        yield job


def _assemble(out: Path, parts: list[Part], settings: Settings, anatomy: Anatomy, base: Path) -> Extraction:
    carried = {part.path: part for part in parts if part.status is Status.CARRIED}
    _check_not_empty(parts, base)
    spectra = {path: part.spectrum for path, part in carried.items() if part.spectrum is not None}
    adapters, ranks = {}, {}
    for rule in settings.rules:
        adapters[rule.label] = out if len(settings.rules) == 1 else out / rule.label
        ranks[rule.label] = {path: rank for path, rank in rule.ranks(spectra).items() if rank}
        if not ranks[rule.label]:
            raise ConfigError(f"extraction: {rule.label} is too small for a single rank of any module")
        chosen = [(carried[path], rank) for path, rank in ranks[rule.label].items()]
        write_adapter(adapters[rule.label], out.parent, chosen, settings.dtype, anatomy, base)
    write_remainder(out, [part for part in parts if part.status is Status.REMAINDER or part.num_new_rows])
    return Extraction(out, adapters, ranks, parts, anatomy)


def _check_not_empty(parts: Sequence[Part], base: Path) -> None:
    statuses = {part.status for part in parts}
    if statuses <= {Status.EQUAL}:
        raise InvalidCheckpointError(f"{base}: the two checkpoints are identical, so the adapter would be empty.")
    if Status.CARRIED not in statuses:
        changed = ", ".join(part.path for part in parts if part.status is not Status.EQUAL)
        raise InvalidCheckpointError(
            f"{base}: no matrix that an adapter can carry differs, so the adapter would be empty; changed: {changed}."
        )


def _as_matrix(delta: Tensor, kind: Kind) -> Tensor:
    """The weight's change as (out, in): a convolution's kernel positions count as inputs."""
    if kind is Kind.TRANSPOSED:
        return delta.T
    return delta.flatten(1) if kind is Kind.CONVOLUTION else delta
