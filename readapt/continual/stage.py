"""The next stage of an adapter of the fleet: from a version in the registry to a candidate that knows more classes.

All that can be refused is refused before the base model is loaded. What has been learned is judged beside the parent,
on the validation rows of every stage: an adapter that has forgotten does not go live.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from cluster.adapter_files import Adapter, check_fits, load_adapter, save_adapter
from cluster.blobs import BlobStore
from cluster.checkpoints import open_checkpoint
from cluster.config import Fleet
from cluster.errors import ConflictError, InvalidAdapterError, InvalidDataError, NotFoundError
from cluster.names import check_name
from cluster.registry import Registry, Status, Version
from readapt.continual.directions import Decoupled, fold
from readapt.continual.learn import Method, learn_stage, remember
from readapt.continual.lineage import STAGES, STATE_KEY, Learned, Stage, open_learned, store_learned
from readapt.continual.recall import KINDS, Top, recall, recall_stage
from readapt.continual.writer import LabelWriter, encode_labels, exact_points
from readapt.fusion.fuse import Fusion
from readapt.fusion.points import Point
from readapt.training.data import Encoded, Encoder, Row, encoder_for, load_rows
from readapt.training.evaluate import golden
from readapt.training.lora import attached, load_base


@dataclass(frozen=True)
class NextStage:
    """What to learn: the stage's name and rows, on top of which version (None: the live one), folded to which rank.

    `rank` None keeps all that was learned, as far as the fleet's engines take that rank (`serving.max_rank`).
    """

    adapter: str
    name: str
    data: Path
    parent: int | None = None
    rank: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class _Plan:
    """A stage that can be learned: the parent, as it is served and as it was learned, and the rows.

    `valid` are the validation rows of every stage, the new one's last.
    """

    wanted: NextStage
    parent: Version
    served: Adapter
    before: Learned
    stage: Stage
    train: Sequence[Row]
    valid: Mapping[str, Sequence[Row]]


def add_stage(fleet: Fleet, registry: Registry, blobs: BlobStore, wanted: NextStage, method: Method) -> Version:
    """Trains the stage and registers the folded adapter, whose parent is the version it started from.

    It is a CANDIDATE, or REJECTED and without files (see `setback`). Trains on the rows of this stage alone; training
    rows of earlier ones are read where the parent brings no labels and statistics of its own: it was made elsewhere, or
    by another method. ConflictError when the adapter has a stage of that name, InvalidDataError when the rows bring no
    new label, those of an earlier stage are gone, or the metric is not that of labels, InvalidAdapterError for a parent
    or a rank with which nothing can be done, NotFoundError for an unknown parent.
    """
    plan = _plan(fleet, registry, blobs, wanted, method)
    base = fleet.base(plan.parent.base).path
    model, encoder = load_base(base), encoder_for(base, fleet.readapt.train.max_tokens)
    after = Learned(_learn(model, encoder, plan, method), (*plan.before.stages, plan.stage))
    adapter, lost = _fold(after.state, wanted.rank or fleet.serving.max_rank)
    old, new = (_accuracies(model, encoder, version, plan.valid) for version in (plan.served, adapter))
    details = {
        "rung": "continual",
        "stage": wanted.name,
        STAGES: after.as_details,
        "accuracy_by_stage": new,
        "parent_accuracy_by_stage": old,
        "magnitudes": list(after.state.magnitudes),
        "rank": adapter.max_rank,
        "lost_energy": lost,
    }
    add = partial(registry.add_version, wanted.adapter, plan.parent.base, parent_id=plan.parent.id)
    quality = sum(new.values()) / len(new)
    rejected = setback(old, new, wanted.name, fleet.readapt.gate.max_drop_points)
    if rejected is not None:
        return add(Status.REJECTED, quality=quality, details={**details, "rejected": rejected})
    details |= {"golden": _golden(model, encoder, adapter, plan, fleet), STATE_KEY: store_learned(blobs, after)}
    key = _store(blobs, replace(adapter, base_model=str(base)))
    return add(Status.CANDIDATE, blob_key=key, content_hash=key, quality=quality, details=details)


def setback(old: Mapping[str, float], new: Mapping[str, float], stage: str, max_drop_points: float) -> str | None:
    """Why a version may not go live, from its parent's and its own points by stage; None if it may.

    It may not when an earlier stage has lost more than `max_drop_points`, or its own has gained nothing.
    """
    faults = [
        f"stage {name!r} fell from {old[name]:.1f} to {new[name]:.1f} points, more than {max_drop_points:g}"
        for name in new
        if name != stage and old[name] - new[name] > max_drop_points
    ]
    if new[stage] <= old[stage]:
        faults.append(f"stage {stage!r} gained nothing: {new[stage]:.1f} points, its parent has {old[stage]:.1f}")
    return "; ".join(faults) or None


# What can be refused at once


def _plan(fleet: Fleet, registry: Registry, blobs: BlobStore, wanted: NextStage, method: Method) -> _Plan:
    limit = fleet.serving.max_rank
    if wanted.rank is not None and wanted.rank > limit:
        raise InvalidAdapterError(
            f"Rank {wanted.rank} is above serving.max_rank = {limit}, beyond which no engine takes it."
        )
    parent, key = _parent(registry, wanted)
    record = registry.adapter(wanted.adapter)
    if record.metric != "exact_match":
        raise InvalidDataError(f"{wanted.adapter} writes free text (chrF), not labels: it has no classes to add to.")
    train = load_rows(wanted.data / "train.jsonl")
    served = load_adapter(blobs.fetch_folder(key))
    before = open_learned(blobs, record, parent, served)
    shapes = open_checkpoint(fleet.base(parent.base).path).linear_shapes()
    check_fits(served, shapes)
    _check_rank(before, method, shapes)
    stage = _stage(before, wanted, train)
    valid = {stage.name: load_rows(stage.data / "valid.jsonl") for stage in (*before.stages, stage)}
    return _Plan(wanted, parent, served, before, stage, train, valid)


def _parent(registry: Registry, wanted: NextStage) -> tuple[Version, str]:
    """The version to go on from, and the key of its files."""
    check_name(wanted.name)
    if wanted.parent is not None:
        version = registry.find(wanted.adapter, wanted.parent)
    else:
        route = registry.routes().get(wanted.adapter)
        if route is None:
            raise NotFoundError(f"Adapter {wanted.adapter!r} has no live version to go on from.")
        version = route.live
    if version.blob_key is None:
        raise NotFoundError(f"{version.label} is {version.status} and has no files to go on from.")
    return version, version.blob_key


def _check_rank(before: Learned, method: Method, shapes: Mapping[str, tuple[int, int]]) -> None:
    """InvalidAdapterError for a direction that is wider than a module."""
    if method.recall is None:
        rank, modules = method.rank_of(len(before.stages)), list(before.state.directions[0].factors)
    else:
        rank, modules = method.recall.rank, [name for name in shapes if name.endswith(KINDS)]
    for module in modules:
        if rank > min(shapes[module]):
            raise InvalidAdapterError(
                f"A direction of rank {rank} does not fit {module!r}, (out, in) {shapes[module]}."
            )


def _stage(before: Learned, wanted: NextStage, train: Sequence[Row]) -> Stage:
    if wanted.name in [stage.name for stage in before.stages]:
        raise ConflictError(f"{wanted.adapter} has been through a stage {wanted.name!r} already.")
    new = sorted({row.completion for row in train} - set(before.labels))
    if not new:
        raise InvalidDataError(f"{wanted.data}: no label is new to {wanted.adapter}.")
    return Stage(wanted.name, tuple(new), wanted.data)


# Learning


def _learn(model: Any, encoder: Encoder, plan: _Plan, method: Method) -> Decoupled:
    before, state = plan.before, plan.before.state
    shapes = {name: factors.shape for name, factors in state.directions[0].factors.items()}
    if method.contrasts and not state.inputs:
        for rows in _earlier_rows(encoder, before):
            state = remember(model, state, LabelWriter(model, [], [], "all"), rows, list(shapes))
    if method.recall and not state.classes:
        state = recall(Top(model), state, [row for rows in _earlier_rows(encoder, before) for row in rows])
    new = encode_labels(encoder, sorted({row.completion for row in plan.train}))
    learner = LabelWriter(model, encode_labels(encoder, before.labels), new)
    rows, stage = encoder.encode_all(plan.train), len(before.stages)
    learn = recall_stage if method.recall else learn_stage
    return learn(model, state, learner, rows, method, shapes=shapes, stage=stage, seed=plan.wanted.seed)


def _earlier_rows(encoder: Encoder, before: Learned) -> list[list[Encoded]]:
    """By stage, for statistics that the parent does not bring; nothing is trained on them."""
    return [encoder.encode_all(load_rows(stage.data / "train.jsonl")) for stage in before.stages]


def _fold(state: Decoupled, most: int) -> tuple[Adapter, float]:
    """The adapter to serve, of rank `most`, and the largest share of a module's squared norm that the cut has cost."""
    whole = fold(state)
    if whole.max_rank <= most:
        return whole, 0.0
    fusion = Fusion(whole, Adapter({}))
    return fusion.at(Point(1.0, 0.0), most), max(fusion.lost_energy(Point(1.0, 0.0), most).values())


# Judging and storing


def _accuracies(model: Any, encoder: Encoder, adapter: Adapter, valid: Mapping[str, Sequence[Row]]) -> dict[str, float]:
    """The share of rows, in points, that it answers exactly, by stage."""
    with attached(model, adapter):
        return {name: exact_points(model, encoder.encode_all(rows)) for name, rows in valid.items()}


def _golden(model: Any, encoder: Encoder, adapter: Adapter, plan: _Plan, fleet: Fleet) -> list[dict[str, str]]:
    """What an engine is asked before the version goes live: some of the new stage's prompts."""
    rows = plan.valid[plan.stage.name]
    prompts = [row.prompt for row in rows[: fleet.rollout.golden_prompts]]
    with attached(model, adapter):
        return golden(model, encoder, prompts, max_tokens=max(len(row.completion) for row in rows))


def _store(blobs: BlobStore, adapter: Adapter) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "adapter"
        save_adapter(adapter, folder)
        return blobs.put_folder(folder)
