"""The stages that an adapter has learned, and the state from which the next stage continues.

The blob of a version holds only the ordinary adapter that engines fetch. Directions and statistics are several times
its size. They are a separate blob, whose key is `details["state_key"]` of the version. `details["stages"]` lists the
name and data folder of each stage.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.adapters.files import Adapter
from cluster.errors import InvalidAdapterError, InvalidDataError
from cluster.registry.records import AdapterRecord, Version
from cluster.storage.blobs import BlobStore
from readapt.continual.direction_files import load_directions, save_directions
from readapt.continual.directions import Decoupled, decouple
from readapt.training.data import load_rows

STATE_KEY = "state_key"
STAGES = "stages"
FIRST_STAGE = "start"
_FILE = "stages.json"


@dataclass(frozen=True)
class Stage:
    """One learned stage: its name, the labels that it added, and the folder of its rows."""

    name: str
    labels: tuple[str, ...]
    data: Path


@dataclass(frozen=True)
class Learned:
    """Everything that one stage hands to the next."""

    state: Decoupled
    stages: tuple[Stage, ...]

    @property
    def labels(self) -> list[str]:
        """All labels, in the order of the stages."""
        return [label for stage in self.stages for label in stage.labels]

    @property
    def as_details(self) -> list[dict[str, str]]:
        """The stages in the form of a version's `details["stages"]`."""
        return [{"name": stage.name, "data": str(stage.data)} for stage in self.stages]


def open_learned(blobs: BlobStore, record: AdapterRecord, version: Version, served: Adapter) -> Learned:
    """Return a version's state and stages.

    A version that was registered or carried over to a new base has no state. Its adapter `served` becomes the only
    direction, and the labels come from its training rows. Raises InvalidAdapterError if that adapter is zero.
    """
    if STATE_KEY in version.details:
        folder = blobs.fetch_folder(version.details[STATE_KEY])
        return Learned(load_directions(folder), _load_stages(folder))
    state = decouple(served)
    if not state.directions:
        raise InvalidAdapterError(f"{version.label} adds nothing to its base, so it cannot be the parent of a stage.")
    return Learned(state, _stages_of(record, version))


def _stages_of(record: AdapterRecord, version: Version) -> tuple[Stage, ...]:
    """Return the stages that the registry lists, or else the adapter's own task as the first stage."""
    if not record.data:
        raise InvalidDataError(f"{record.name} has no rows to read its labels from. Set its `data` in the fleet file.")
    named: list[Mapping[str, str]] = version.details.get(STAGES) or [{"name": FIRST_STAGE, "data": record.data}]
    stages: list[Stage] = []
    for entry in named:
        known = {label for stage in stages for label in stage.labels}
        stages.append(Stage(entry["name"], _new_labels(Path(entry["data"]), known), Path(entry["data"])))
    return tuple(stages)


def _new_labels(data: Path, known: set[str]) -> tuple[str, ...]:
    """Return the labels of a folder's training rows that are not known yet."""
    return tuple(sorted({row.completion for row in load_rows(data / "train.jsonl")} - known))


def store_learned(blobs: BlobStore, learned: Learned) -> str:
    """Store what `open_learned` reads, and return its blob key."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_directions(learned.state, folder)
        entries: list[dict[str, Any]] = [asdict(stage) | {"data": str(stage.data)} for stage in learned.stages]
        (folder / _FILE).write_text(json.dumps(entries, indent=2) + "\n")
        return blobs.put_folder(folder)


def _load_stages(folder: Path) -> tuple[Stage, ...]:
    entries = json.loads((folder / _FILE).read_text())
    return tuple(Stage(entry["name"], tuple(entry["labels"]), Path(entry["data"])) for entry in entries)
