"""Adds a stage to an adapter of the fleet: from a version in the registry to a candidate that knows more classes.

Everything that can be refused is refused before the base model is loaded. The result is compared with its parent on the
validation rows of every stage. An adapter that has forgotten too much does not go live.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from cluster.adapters.dialect import keep_text_files, store_dialect
from cluster.adapters.files import Adapter, check_fits, load_adapter, save_adapter
from cluster.adapters.size import size_details
from cluster.config.settings import Fleet
from cluster.errors import ConflictError, InvalidAdapterError, InvalidDataError, NotFoundError
from cluster.names import check_name
from cluster.progress import Say
from cluster.registry.registry import Registry, Status, Version
from cluster.storage.blobs import BlobStore
from cluster.storage.checkpoints import open_checkpoint
from readapt.continual.directions import Decoupled, fold
from readapt.continual.learn import Method, learn_stage, remember
from readapt.continual.lineage import STAGES, STATE_KEY, Learned, Stage, open_learned, store_learned
from readapt.continual.recall import KINDS, Top, recall, recall_stage
from readapt.continual.writer import LabelWriter, encode_labels, exact_points, labels_in
from readapt.fusion.fuse import Fusion
from readapt.fusion.points import Point
from readapt.training.causal_lm import CausalLM
from readapt.training.data import Encoded, Encoder, Row, encoder_for
from readapt.training.evaluate import golden
from readapt.training.lora import attached, load_base
from readapt.training.reference import reference
from readapt.training.selection import usable_rows


@dataclass(frozen=True)
class NextStage:
    """What to learn: the name and rows of the stage, the parent version, and the rank of the folded adapter.

    `parent` defaults to the live version. `rank` defaults to the full rank, up to `serving.max_rank`.
    """

    adapter: str
    name: str
    data: Path
    parent: int | None = None
    rank: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class _Prepared:
    """A checked stage: the parent, the folder of its files, its served adapter and learned state, and the rows.

    `valid` has the validation rows of every stage, with the new stage last.
    """

    next_stage: NextStage
    parent: Version
    folder: Path
    served: Adapter
    before: Learned
    stage: Stage
    train: Sequence[Row]
    valid: Mapping[str, Sequence[Row]]
    encoder: Encoder


def add_stage(
    fleet: Fleet,
    registry: Registry,
    blobs: BlobStore,
    next_stage: NextStage,
    method: Method,
    say: Say = lambda line: None,
) -> Version:
    """Train a stage and register the folded adapter as a child of its parent version.

    The new version is a CANDIDATE, or REJECTED and without files (see `setback`). Training uses only the rows of this
    stage. Training rows of earlier stages are read for labels and statistics if the parent lacks them because another
    method or a registration made it.

    Raises ConflictError if the adapter has a stage of that name; InvalidDataError if the rows have no new label, rows
    of an earlier stage are missing or the parent scores nothing on them, or the metric is not exact match;
    InvalidAdapterError for an unusable parent or rank; NotFoundError for an unknown parent.
    """
    say(f"stage {next_stage.name}: reading rows and the parent")
    prepared = _prepare(fleet, registry, blobs, next_stage, method)
    base = fleet.base(prepared.parent.base).path
    model, encoder = load_base(base), prepared.encoder
    old = {  # a parent that scores nothing could forget everything unnoticed
        stage.name: reference(
            model, prepared.served, encoder, prepared.valid[stage.name], "exact_match", fleet.readapt.gate
        ).quality
        for stage in prepared.before.stages
    }
    say(f"stage {next_stage.name}: training on {prepared.parent.base}, from {prepared.parent.label}")
    after = Learned(_learn(model, encoder, prepared, method), (*prepared.before.stages, prepared.stage))
    adapter, lost = _fold(after.state, next_stage.rank or fleet.serving.max_rank)
    say(f"stage {next_stage.name}: judging it and {prepared.parent.label} on the rows of {len(prepared.valid)} stages")
    untaught = {name: rows for name, rows in prepared.valid.items() if name not in old}
    old |= _accuracies(model, encoder, prepared.served, untaught)
    new = _accuracies(model, encoder, adapter, prepared.valid)
    details = {
        "rung": "continual",
        "stage": next_stage.name,
        STAGES: after.as_details,
        "accuracy_by_stage": new,
        "parent_accuracy_by_stage": old,
        "magnitudes": list(after.state.magnitudes),
        "rank": adapter.max_rank,
        "lost_energy": lost,
    }
    add = partial(registry.add_version, next_stage.adapter, prepared.parent.base, parent_id=prepared.parent.id)
    quality = sum(new.values()) / len(new)
    rejected = setback(old, new, next_stage.name, fleet.readapt.gate.max_drop_points)
    if rejected is not None:
        return add(Status.REJECTED, quality=quality, details={**details, "rejected": rejected})
    details |= {"golden": _golden(model, encoder, adapter, prepared, fleet), STATE_KEY: store_learned(blobs, after)}
    key, more = _store(blobs, replace(adapter, base_model=str(base)), prepared.folder, base)
    details |= more
    return add(Status.CANDIDATE, blob_key=key, content_hash=key, quality=quality, details=details)


def setback(old: Mapping[str, float], new: Mapping[str, float], stage: str, max_drop_points: float) -> str | None:
    """Return why a version may not go live, or None if it may.

    `old` and `new` are the points of the parent and of the version by stage. An earlier stage may lose at most
    `max_drop_points`, and the new stage must gain.
    """
    faults = [
        f"stage {name!r} fell from {old[name]:.1f} to {new[name]:.1f} points, and may drop {max_drop_points:g}"
        for name in new
        if name != stage and old[name] - new[name] > max_drop_points
    ]
    if new[stage] <= old[stage]:
        faults.append(f"stage {stage!r} gained nothing: {new[stage]:.1f} points, its parent has {old[stage]:.1f}")
    return "; ".join(faults) or None


# Checks before the base model is loaded


def _prepare(fleet: Fleet, registry: Registry, blobs: BlobStore, next_stage: NextStage, method: Method) -> _Prepared:
    limit = fleet.serving.max_rank
    if next_stage.rank is not None and next_stage.rank > limit:
        raise InvalidAdapterError(
            f"Rank {next_stage.rank} is above serving.max_rank = {limit}. Choose a lower rank, or raise the limit."
        )
    parent, key = _parent(registry, next_stage)
    record = registry.adapter(next_stage.adapter)
    if record.metric != "exact_match":
        raise InvalidDataError(
            f"{next_stage.adapter} has metric {record.metric}, but a stage needs labels (exact_match)."
        )
    base = fleet.base(parent.base).path
    folder = blobs.fetch_folder(key)
    encoder = encoder_for(base, fleet.readapt.train.max_tokens, folder)
    train = usable_rows(next_stage.data / "train.jsonl", [encoder])
    served = load_adapter(folder)
    before = open_learned(blobs, record, parent, served)
    shapes = open_checkpoint(base).linear_shapes()
    check_fits(served, shapes)
    _check_rank(before, method, shapes)
    stage = _stage(before, next_stage, train)
    stages = (*before.stages, stage)
    valid = {stage.name: usable_rows(stage.data / "valid.jsonl", [encoder]) for stage in stages}
    return _Prepared(next_stage, parent, folder, served, before, stage, train, valid, encoder)


def _parent(registry: Registry, next_stage: NextStage) -> tuple[Version, str]:
    """Return the parent version and the blob key of its files."""
    check_name(next_stage.name)
    if next_stage.parent is not None:
        version = registry.find(next_stage.adapter, next_stage.parent)
    else:
        route = registry.routes().get(next_stage.adapter)
        if route is None:
            raise NotFoundError(f"Adapter {next_stage.adapter!r} has no live version. Name a parent version.")
        version = route.live
    if version.blob_key is None:
        raise NotFoundError(f"{version.label} is {version.status} and has no files, so it cannot be a parent.")
    return version, version.blob_key


def _check_rank(before: Learned, method: Method, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise InvalidAdapterError if the rank of the new direction is above a side of a module."""
    if method.recall is None:
        rank, modules = method.rank_of(len(before.stages)), list(before.state.directions[0].factors)
    else:
        rank, modules = method.recall.rank, [name for name in shapes if name.endswith(KINDS)]
    for module in modules:
        if rank > min(shapes[module]):
            raise InvalidAdapterError(
                f"A direction of rank {rank} does not fit {module!r}, whose (out, in) is {shapes[module]}."
            )


def _stage(before: Learned, next_stage: NextStage, train: Sequence[Row]) -> Stage:
    if next_stage.name in [stage.name for stage in before.stages]:
        raise ConflictError(f"{next_stage.adapter} already has a stage {next_stage.name!r}.")
    new = sorted({row.completion for row in train} - set(before.labels))
    if not new:
        raise InvalidDataError(f"{next_stage.data}: {next_stage.adapter} already knows every label of these rows.")
    return Stage(next_stage.name, tuple(new), next_stage.data)


# Learning


def _learn(model: CausalLM, encoder: Encoder, prepared: _Prepared, method: Method) -> Decoupled:
    before, state = prepared.before, prepared.before.state
    shapes = {name: factors.shape for name, factors in state.directions[0].factors.items()}
    if method.contrasts and not state.inputs:
        for rows in _earlier_rows(encoder, before):
            state = remember(model, state, LabelWriter(model, [], [], hides_old=False), rows, list(shapes))
    if method.recall and not state.classes:
        state = recall(Top(model), state, [row for rows in _earlier_rows(encoder, before) for row in rows])
    rows, stage = encoder.encode_all(prepared.train), len(before.stages)
    old = encode_labels(encoder, before.labels, prepared.train[0].prompt)
    learner = LabelWriter(model, old, labels_in(rows))
    learn = recall_stage if method.recall else learn_stage
    return learn(model, state, learner, rows, method, shapes=shapes, stage=stage, seed=prepared.next_stage.seed)


def _earlier_rows(encoder: Encoder, before: Learned) -> list[list[Encoded]]:
    """Return the training rows of earlier stages, for statistics only."""
    files = [stage.data / "train.jsonl" for stage in before.stages]
    return [encoder.encode_all(usable_rows(file, [encoder])) for file in files]


def _fold(state: Decoupled, most: int) -> tuple[Adapter, float]:
    """Return the adapter at a rank of at most `most`, and the largest share of energy that a module lost."""
    whole = fold(state)
    if whole.max_rank <= most:
        return whole, 0.0
    fusion = Fusion(whole, Adapter({}))
    return fusion.at(Point(1.0, 0.0), most), max(fusion.lost_energy(Point(1.0, 0.0), most).values())


# Evaluation and storage


def _accuracies(
    model: CausalLM, encoder: Encoder, adapter: Adapter, valid: Mapping[str, Sequence[Row]]
) -> dict[str, float]:
    """Return the points of an adapter by stage: the share of validation rows that it answers exactly."""
    with attached(model, adapter):
        return {name: exact_points(model, encoder.encode_all(rows)) for name, rows in valid.items()}


def _golden(
    model: CausalLM, encoder: Encoder, adapter: Adapter, prepared: _Prepared, fleet: Fleet
) -> list[dict[str, Any]]:
    """Return answers to prompts of the new stage that an engine must repeat before the version goes live."""
    rows = prepared.valid[prepared.stage.name]
    prompts = [row.prompt for row in rows[: fleet.rollout.golden_prompts]]
    with attached(model, adapter):
        return golden(model, encoder, prompts, max_tokens=max(len(row.completion) for row in rows))


def _store(blobs: BlobStore, adapter: Adapter, parent: Path, base: Path) -> tuple[str, dict[str, Any]]:
    """Store the adapter with the text files of its parent's folder; return its key, and details."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "adapter"
        save_adapter(adapter, folder)
        keep_text_files(parent, folder)
        more = store_dialect(blobs, folder, base) | size_details(adapter.max_rank, folder.rglob("*"))
        return blobs.put_folder(folder), more
