"""The next stage of an adapter of the fleet: from a version in the registry to a candidate that knows more classes.

A version's blob holds the ordinary adapter that is served, and beside it the directions that it was folded from and the
stages that it has been through, so that the next stage goes on exactly where the last one ended.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cluster.adapter_files import Adapter, load_adapter, save_adapter
from cluster.blobs import BlobStore
from cluster.config import Fleet
from cluster.errors import ConflictError, InvalidAdapterError, InvalidDataError, NotFoundError
from cluster.names import check_name
from cluster.registry import Registry, Status, Version
from readapt.continual.direction_files import has_directions, load_directions, save_directions
from readapt.continual.directions import Decoupled, decouple, fold
from readapt.continual.learn import Method, learn_stage, remember
from readapt.continual.recall import Top, recall, recall_stage
from readapt.continual.writer import LabelWriter, encode_labels, exact_points
from readapt.data import Encoded, Encoder, Row, encoder_for, load_rows
from readapt.evaluate import golden
from readapt.fuse import Fusion
from readapt.lora import attached, load_base
from readapt.points import Point

_STAGES = "stages.json"


@dataclass(frozen=True)
class Stage:
    """One stage that an adapter has been through: the labels that were new in it, and where its rows lie."""

    name: str
    labels: tuple[str, ...]
    data: str


@dataclass(frozen=True)
class _Learned:
    """A version's state: what its blob holds."""

    state: Decoupled
    stages: tuple[Stage, ...]

    @property
    def labels(self) -> list[str]:
        return list(dict.fromkeys(label for stage in self.stages for label in stage.labels))


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


def add_stage(fleet: Fleet, registry: Registry, blobs: BlobStore, wanted: NextStage, method: Method) -> Version:
    """Trains the stage and registers the folded adapter as a CANDIDATE whose parent is the version it started from.

    Trains on the rows of this stage alone; those of an ordinary parent are read once for their labels and, where the
    method contrasts, for the moments of their inputs. ConflictError when the adapter has a stage of that name,
    InvalidDataError when the rows bring no new label or the adapter's metric is not that of labels, NotFoundError for
    an unknown parent.
    """
    parent = _parent(registry, wanted)
    if registry.adapter(wanted.adapter).metric != "exact_match":
        raise InvalidDataError(f"{wanted.adapter} writes free text (chrF), not labels: it has no classes to add to.")
    train, valid = (load_rows(wanted.data / f"{split}.jsonl") for split in ("train", "valid"))
    assert parent.blob_key is not None, "a version that serves has files"
    before = _open(blobs.fetch_folder(parent.blob_key), registry.adapter(wanted.adapter).data)
    stage = _stage(before, wanted, train)
    base = fleet.base(parent.base).path
    model, encoder = load_base(base), encoder_for(base, fleet.readapt.train.max_tokens)
    state = _learn(model, encoder, before, train, method, wanted.seed)
    after = _Learned(state, (*before.stages, stage))
    adapter, lost = _fold(state, fleet, wanted.rank)
    details = _describe(model, encoder, adapter, after, valid, fleet)
    key = _store(blobs, replace(adapter, base_model=str(base)), after)
    return registry.add_version(
        wanted.adapter,
        parent.base,
        Status.CANDIDATE,
        blob_key=key,
        content_hash=key,
        parent_id=parent.id,
        quality=details["accuracy_by_stage"][stage.name],
        details={"rung": "continual", "stage": stage.name, "lost_energy": lost, **details},
    )


def _parent(registry: Registry, wanted: NextStage) -> Version:
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
    return version


def _open(folder: Path, data: str) -> _Learned:
    """A version's directions and stages; of an ordinary adapter, itself as its one direction, its task as its stage."""
    if has_directions(folder):
        stages = json.loads((folder / _STAGES).read_text())
        return _Learned(load_directions(folder), tuple(Stage(s["name"], tuple(s["labels"]), s["data"]) for s in stages))
    rows = load_rows(Path(data) / "train.jsonl")
    labels = sorted({row.completion for row in rows})
    return _Learned(decouple(load_adapter(folder)), (Stage("start", tuple(labels), data),))


def _stage(before: _Learned, wanted: NextStage, train: Sequence[Row]) -> Stage:
    if wanted.name in [stage.name for stage in before.stages]:
        raise ConflictError(f"{wanted.adapter} has been through a stage {wanted.name!r} already.")
    new = sorted({row.completion for row in train} - set(before.labels))
    if not new:
        raise InvalidDataError(f"{wanted.data}: no label is new to {wanted.adapter}.")
    return Stage(wanted.name, tuple(new), str(wanted.data))


def _learn(
    model: Any, encoder: Encoder, before: _Learned, train: Sequence[Row], method: Method, seed: int
) -> Decoupled:
    modules = before.state.directions[0].factors
    shapes = {name: factors.shape for name, factors in modules.items()}
    state, rows = before.state, encoder.encode_all(train)
    if method.contrasts and not state.inputs:
        state = _look_back(model, encoder, before, list(shapes))
    if method.recall and not state.classes:
        state = recall(Top(model), state, _earlier_rows(encoder, before))
    new = encode_labels(encoder, sorted({row.completion for row in train}))
    learner = LabelWriter(model, encode_labels(encoder, before.labels), new)
    stage = len(before.stages)
    learn = recall_stage if method.recall else learn_stage
    return learn(model, state, learner, rows, method, shapes=shapes, stage=stage, seed=seed)


def _earlier_rows(encoder: Encoder, before: _Learned) -> list[Encoded]:
    folders = [Path(stage.data) for stage in before.stages]
    return [row for folder in folders for row in encoder.encode_all(load_rows(folder / "train.jsonl"))]


def _look_back(model: Any, encoder: Encoder, before: _Learned, modules: Sequence[str]) -> Decoupled:
    """The state of an adapter made without moments, with those of its earlier rows' inputs; nothing is trained."""
    state, forward = before.state, LabelWriter(model, [], [], "all")
    for stage in before.stages:
        rows = encoder.encode_all(load_rows(Path(stage.data) / "train.jsonl"))
        state = remember(model, state, forward, rows, modules)
    return state


def _fold(state: Decoupled, fleet: Fleet, rank: int | None) -> tuple[Adapter, float]:
    """The adapter to serve, and the largest share of a module's squared norm that the cut to its rank has cost."""
    whole = fold(state)
    limit = fleet.serving.max_rank
    if rank is not None and rank > limit:
        raise InvalidAdapterError(f"Rank {rank} is above serving.max_rank = {limit}, beyond which no engine takes it.")
    wanted = rank or (limit if whole.max_rank > limit else None)
    if wanted is None:
        return whole, 0.0
    fusion = Fusion(whole, Adapter({}))
    return fusion.at(Point(1.0, 0.0), wanted), max(fusion.lost_energy(Point(1.0, 0.0), wanted).values())


def _describe(
    model: Any, encoder: Encoder, adapter: Adapter, after: _Learned, valid: Sequence[Row], fleet: Fleet
) -> dict[str, Any]:
    """The folded adapter's accuracy on each stage's validation rows that can still be read, and golden answers."""
    with attached(model, adapter):
        accuracies = {
            stage.name: exact_points(model, rows) for stage in after.stages if (rows := _valid(encoder, stage))
        }
        prompts = [row.prompt for row in valid[: fleet.rollout.golden_prompts]]
        answers = golden(model, encoder, prompts, max_tokens=max(len(r.completion) for r in valid))
    return {
        "accuracy_by_stage": accuracies,
        "magnitudes": list(after.state.magnitudes),
        "rank": adapter.max_rank,
        "golden": answers,
    }


def _valid(encoder: Encoder, stage: Stage) -> list[Encoded]:
    """For the report alone: rows of earlier stages are never trained on. Their folders may be gone by now."""
    file = Path(stage.data) / "valid.jsonl"
    return encoder.encode_all(load_rows(file)) if file.is_file() else []


def _store(blobs: BlobStore, adapter: Adapter, learned: _Learned) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "adapter"
        save_adapter(adapter, folder)
        save_directions(learned.state, folder)
        (folder / _STAGES).write_text(json.dumps([asdict(stage) for stage in learned.stages], indent=2) + "\n")
        return blobs.put_folder(folder)
