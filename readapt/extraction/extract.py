"""Extracts what full fine-tuning changed in a checkpoint, as LoRA adapters (PHLoRA, arXiv 2509.10971).

The change of each module's weight becomes a truncated SVD, A = sqrt(S) V^T and B = U sqrt(S), with alpha = rank. One
decomposition serves any number of ranks. Vectors and new tensors go whole to a remainder file. The report lists what
neither file can carry.

Tensors are processed one at a time into part files, so memory stays at a few times the largest tensor. A killed run
resumes from its parts, and several machines can share the work through a common output folder.
"""

import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from cluster.errors import ConfigError, ConflictError, InvalidCheckpointError, StorageError
from cluster.storage.checkpoints import Checkpoint
from readapt.extraction.anatomy import Anatomy, Kind, anatomy_of
from readapt.extraction.files import Extraction, Part, Status, read_part, write_adapter, write_part, write_remainder
from readapt.extraction.pairs import TensorPair, pair_tensors
from readapt.extraction.report import report_of, write_report
from readapt.lowrank.spectra import EnergyShare, Knee, Rule, Spectrum
from readapt.lowrank.svd import decompose, squared_norm

REMAINDER_VALUES = 1 << 20  # a larger tensor that is not a vector is left out of the remainder
PLAIN_DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16}  # other dtypes hold quantised values
Spread = Callable[[Callable[[TensorPair], None], Sequence[TensorPair]], Iterable[TensorPair]]


@dataclass(frozen=True)
class Settings:
    """What to extract: the rank rules, a cap on all ranks, and patterns that are searched in tensor names."""

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
                raise ConfigError(f"extraction: {option} {pattern!r} is not a regular expression: {error}") from error
        if len({rule.label for rule in self.rules}) < len(self.rules):
            raise ConfigError("extraction: the same rank rule is given twice")

    def limit(self, rule: Rule, side: int) -> int:
        """Return how many singular values a rule needs. A knee needs all, whatever the cap: it compares them."""
        is_capped = self.max_rank is not None and not isinstance(rule, Knee)
        return min(rule.limit(side), self.max_rank) if is_capped and self.max_rank else rule.limit(side)

    def ranks(self, rule: Rule, spectra: Mapping[str, Spectrum]) -> dict[str, int]:
        """Return a rule's ranks, at most `max_rank`."""
        return {path: min(rank, self.max_rank or rank) for path, rank in rule.ranks(spectra).items()}

    def leaves_out(self, path: str) -> bool:
        """Whether the patterns exclude a tensor."""
        is_included = self.include is None or re.search(self.include, path)
        return not is_included or (self.exclude is not None and re.search(self.exclude, path) is not None)


@dataclass(frozen=True)
class Extractor:
    """Turns one tensor pair into its part file. It can be sent to a worker on another machine."""

    base: Checkpoint
    tuned: Checkpoint
    settings: Settings
    folder: Path

    def __call__(self, pair: TensorPair) -> None:
        """Extract one pair. Raises InvalidCheckpointError for values that are not finite, OSError for a full disk."""
        start_s = time.perf_counter()
        part, tensors = self._extract(pair)
        part.seconds = time.perf_counter() - start_s
        write_part(self.folder, part, tensors)

    def _extract(self, pair: TensorPair) -> tuple[Part, dict[str, Tensor]]:
        tuned = self.tuned.load(pair.tuned)
        part = Part(pair.index, pair.path, Status.EQUAL, tuple(tuned.shape), pair.places)
        base = None if pair.base is None else self.base.load(pair.base)
        if base is not None and base.dtype == tuned.dtype and torch.equal(base, tuned):
            return part, {}
        if self.settings.leaves_out(pair.path):
            return _left_out(part, "the include and exclude patterns leave it out")
        if base is not None and not pair.places and base.shape != tuned.shape:
            return _left_out(part, f"its shape has changed from {tuple(base.shape)} to {tuple(tuned.shape)}")
        if base is None or not pair.places:
            return self._whole(part, tuned, pair.reason)
        if not {base.dtype, tuned.dtype} <= PLAIN_DTYPES:
            return _left_out(part, f"its values are quantised ({base.dtype}, {tuned.dtype})")
        part.shape = tuple(base.shape)
        part.num_cut_rows = max(len(base) - len(tuned), 0)
        new_rows = tuned[len(base) :].clone()
        part.num_new_rows = len(new_rows)
        self._check_finite(squared_norm(new_rows), pair)
        delta = torch.zeros(base.shape)
        delta[: len(tuned)] = tuned[: len(base)]
        delta[: len(tuned)] -= base[: len(tuned)]
        part.base_total = squared_norm(base)
        del base, tuned  # frees the mapped pages of both files before the decomposition
        return self._low_rank(part, pair, delta, {"new_rows": new_rows} if part.num_new_rows else {})

    def _whole(self, part: Part, tuned: Tensor, reason: str) -> tuple[Part, dict[str, Tensor]]:
        """Put a tensor into the remainder as it is, or leave it out if it is too large."""
        if tuned.is_floating_point() and not math.isfinite(squared_norm(tuned)):
            raise InvalidCheckpointError(f"{self.tuned.folder}: {part.path} has values that are not finite.")
        if tuned.ndim > 1 and tuned.numel() > REMAINDER_VALUES:
            return _left_out(part, reason)
        part.status, part.reason = Status.REMAINDER, reason
        return part, {"value": tuned.contiguous()}

    def _low_rank(
        self, part: Part, pair: TensorPair, delta: Tensor, tensors: dict[str, Tensor]
    ) -> tuple[Part, dict[str, Tensor]]:
        total = squared_norm(delta)
        self._check_finite(total, pair)
        part.status = Status.CARRIED if total else Status.REMAINDER if tensors else Status.EQUAL
        if not total:
            return part, tensors
        w_FD = _as_matrix(delta, pair.places[0].kind)
        side = min(w_FD.shape)
        found = decompose(w_FD, max(self.settings.limit(rule, side) for rule in self.settings.rules))
        spectrum = found.spectrum()
        part.spectrum = replace(spectrum, cost=spectrum.cost * len(part.places))
        part.is_exact, part.gap_bound = found.is_exact, found.gap_bound
        rank = max(self.settings.ranks(rule, {part.path: part.spectrum})[part.path] for rule in self.settings.rules)
        a_RD, b_FR = found.factors(max(rank, 1))
        return part, {**tensors, "a": a_RD, "b": b_FR}

    def _check_finite(self, norm: float, pair: TensorPair) -> None:
        if not math.isfinite(norm):
            is_tuned_finite = math.isfinite(squared_norm(self.tuned.load(pair.tuned)))
            folder = self.base.folder if is_tuned_finite else self.tuned.folder
            raise InvalidCheckpointError(f"{folder}: {pair.path} has values that are not finite.")


def _left_out(part: Part, reason: str) -> tuple[Part, dict[str, Tensor]]:
    part.status, part.reason = Status.LEFT_OUT, reason
    return part, {}


def extract(
    base: Checkpoint,
    tuned: Checkpoint,
    out: Path,
    settings: Settings,
    spread: Spread | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Extraction:
    """Write one adapter per rank rule into the new folder `out`; several rules get a subfolder each.

    Unfinished work stays in `.NAME.partial` beside `out`. A run with the same settings and files resumes from there.
    `spread` maps the work over processes; by default this process does all of it. `report` gets the number of finished
    tensors and of all tensors.

    Raises InvalidCheckpointError if the checkpoints do not match, are equal, or have values that are not finite;
    ConflictError if `out` exists; StorageError if the disk is full or the folder cannot be written.
    """
    if out.exists():
        raise ConflictError(f"{out} already exists. Choose another folder, or delete this one.")
    anatomy = anatomy_of(base, tuned)
    pairs = pair_tensors(base, tuned, anatomy, settings.leaves_out)
    aside = out.parent / f".{out.name}.partial"
    try:
        _prepare(aside, _identity(base, tuned, settings))
        parts = _extract_all(Extractor(base, tuned, settings, aside), pairs, spread or _one_by_one, report)
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
    return replace(done, folder=out, adapters=adapters)


def _prepare(aside: Path, identity: str) -> None:
    """Keep the parts of an earlier run on the same input; delete everything else."""
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


def _extract_all(
    extractor: Extractor, pairs: Sequence[TensorPair], spread: Spread, report: Callable[[int, int], None]
) -> list[Part]:
    missing = [pair for pair in pairs if read_part(extractor.folder, pair.index) is None]
    num_done = len(pairs) - len(missing)
    report(num_done, len(pairs))
    for _ in spread(extractor, missing):
        num_done += 1
        report(num_done, len(pairs))
    parts = [read_part(extractor.folder, pair.index) for pair in pairs]
    return [part for part in parts if part is not None]


def _one_by_one(extractor: Callable[[TensorPair], None], pairs: Sequence[TensorPair]) -> Iterator[TensorPair]:
    for pair in pairs:
        extractor(pair)
        yield pair


def _assemble(out: Path, parts: list[Part], settings: Settings, anatomy: Anatomy, base: Path) -> Extraction:
    _check_not_empty(parts, base)
    carried = {part.path: part for part in parts if part.status is Status.CARRIED}
    spectra = {path: part.spectrum for path, part in carried.items() if part.spectrum is not None}
    adapters, ranks = {}, {}
    for rule in settings.rules:
        adapters[rule.label] = out if len(settings.rules) == 1 else out / rule.label
        ranks[rule.label] = {path: rank for path, rank in settings.ranks(rule, spectra).items() if rank}
        if not ranks[rule.label]:
            raise ConfigError(f"extraction: {rule.label} is too small for a rank of 1 in any module")
        chosen = [(carried[path], rank) for path, rank in ranks[rule.label].items()]
        write_adapter(adapters[rule.label], out.parent, chosen, settings.dtype, anatomy, base)
    write_remainder(out, [part for part in parts if part.status is Status.REMAINDER or part.num_new_rows])
    return Extraction(out, adapters, ranks, parts, anatomy, _num_capped(settings, carried, ranks), settings.max_rank)


def _num_capped(
    settings: Settings, parts: Mapping[str, Part], ranks: Mapping[str, Mapping[str, int]]
) -> dict[str, int]:
    """Return for each rule how many modules it would give a higher rank than the cap."""
    return {
        rule.label: sum(
            rank == settings.max_rank and rank < _largest_rank(parts[path]) and rule.asks_more(spectrum, rank)
            for path, rank in ranks[rule.label].items()
            if (spectrum := parts[path].spectrum) is not None
        )
        for rule in settings.rules
    }


def _largest_rank(part: Part) -> int:
    """Return the rank that the change of a weight may have: its smaller side, with a kernel's positions as inputs."""
    return min(part.shape[0], math.prod(part.shape[1:]))


def _check_not_empty(parts: Sequence[Part], base: Path) -> None:
    statuses = {part.status for part in parts}
    if statuses <= {Status.EQUAL}:
        raise InvalidCheckpointError(f"{base}: the two checkpoints are identical, so the adapter would be empty.")
    if Status.CARRIED not in statuses:
        changed = ", ".join(part.path for part in parts if part.status is not Status.EQUAL)
        raise InvalidCheckpointError(
            f"{base}: the adapter would be empty, because only tensors that it cannot carry differ: {changed}."
        )


def _as_matrix(delta: Tensor, kind: Kind) -> Tensor:
    """Return the weight's change as (out, in); a convolution's kernel positions count as inputs."""
    if kind is Kind.TRANSPOSED:
        return delta.T
    return delta.flatten(1) if kind is Kind.CONVOLUTION else delta
