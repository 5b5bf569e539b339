"""What an adapter has been through: its stages, and the unfolded state that the next stage goes on from.

A version's blob holds the ordinary adapter that is served, and nothing else, for engines fetch it. Directions and
statistics, which are several times its size, are a blob of their own, named by the version's `details["state_key"]`;
`details["stages"]` lists name and data folder of each stage.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.adapter_files import Adapter
from cluster.blobs import BlobStore
from cluster.errors import InvalidAdapterError, InvalidDataError
from cluster.records import AdapterRecord, Version
from readapt.continual.direction_files import load_directions, save_directions
from readapt.continual.directions import Decoupled, decouple
from readapt.training.data import load_rows

STATE_KEY = "state_key"
STAGES = "stages"
FIRST_STAGE = "start"
_FILE = "stages.json"


@dataclass(frozen=True)
class Stage:
    """One stage that an adapter has been through: the labels that were new in it, and where its rows lie."""

    name: str
    labels: tuple[str, ...]
    data: Path


@dataclass(frozen=True)
class Learned:
    """All that goes on from stage to stage."""

    state: Decoupled
    stages: tuple[Stage, ...]

    @property
    def labels(self) -> list[str]:
        """Every label, in the order of the stages."""
        return [label for stage in self.stages for label in stage.labels]

    @property
    def as_details(self) -> list[dict[str, str]]:
        """The stages as a version's `details["stages"]` has them."""
        return [{"name": stage.name, "data": str(stage.data)} for stage in self.stages]


def open_learned(blobs: BlobStore, record: AdapterRecord, version: Version, served: Adapter) -> Learned:
    """A version's state and stages.

    Of a version that no stage has made (registered, or carried over to a new base), the adapter `served` is the one
    direction, and labels are read from the training rows. InvalidAdapterError where that direction would be zero.
    """
    if STATE_KEY in version.details:
        folder = blobs.fetch_folder(version.details[STATE_KEY])
        return Learned(load_directions(folder), _load_stages(folder))
    state = decouple(served)
    if not state.directions:
        raise InvalidAdapterError(f"{version.label} adds nothing to its base: there is nothing to go on from.")
    return Learned(state, _stages_of(record, version))


def _stages_of(record: AdapterRecord, version: Version) -> tuple[Stage, ...]:
    """The stages that the registry names; of a version without, the adapter's own task."""
    if not record.data:
        raise InvalidDataError(f"{record.name} has no rows to tell its labels from: give it `data` in the fleet file.")
    named: list[Mapping[str, str]] = version.details.get(STAGES) or [{"name": FIRST_STAGE, "data": record.data}]
    stages: list[Stage] = []
    for entry in named:
        known = {label for stage in stages for label in stage.labels}
        stages.append(Stage(entry["name"], _new_labels(Path(entry["data"]), known), Path(entry["data"])))
    return tuple(stages)


def _new_labels(data: Path, known: set[str]) -> tuple[str, ...]:
    """The labels of a folder's training rows that are not known yet."""
    return tuple(sorted({row.completion for row in load_rows(data / "train.jsonl")} - known))


def store_learned(blobs: BlobStore, learned: Learned) -> str:
    """Stores what `open_learned` reads, and returns its key in the blob store."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_directions(learned.state, folder)
        entries: list[dict[str, Any]] = [asdict(stage) | {"data": str(stage.data)} for stage in learned.stages]
        (folder / _FILE).write_text(json.dumps(entries, indent=2) + "\n")
        return blobs.put_folder(folder)


def _load_stages(folder: Path) -> tuple[Stage, ...]:
    entries = json.loads((folder / _FILE).read_text())
    return tuple(Stage(entry["name"], tuple(entry["labels"]), Path(entry["data"])) for entry in entries)
