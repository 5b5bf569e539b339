"""Opening a fleet: its registry and its blob store, and registering the base models and adapters of the fleet file."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cluster.adapter_files import check_base, load_adapter
from cluster.adapter_folder import identity, store_adapter
from cluster.adapter_size import size_details
from cluster.blobs import BlobStore
from cluster.checkpoints import open_checkpoint
from cluster.config import AdapterSpec, Fleet
from cluster.config_types import SQLITE
from cluster.dialect import adapter_dialect, base_dialect, store_dialect
from cluster.errors import ConfigError, ConflictError, NotFoundError
from cluster.registry import BaseModel, Registry, Status, Version


@dataclass(frozen=True)
class OpenFleet:
    """A fleet file with its registry and its blob store open and its adapters registered.

    `new_versions` are the versions that `open_fleet` has registered just now.
    """

    config: Fleet
    registry: Registry
    blobs: BlobStore
    new_versions: tuple[Version, ...]


def open_fleet(fleet: Fleet) -> OpenFleet:
    """Open the fleet's registry and blob store, and register its adapters (see `register_adapters`)."""
    registry, blobs = open_registry(fleet), open_blobs(fleet)
    return OpenFleet(fleet, registry, blobs, tuple(register_adapters(fleet, registry, blobs)))


def open_registry(fleet: Fleet) -> Registry:
    """Open the fleet's registry; a new database gets its schema."""
    return Registry(fleet.registry)


def has_registry(fleet: Fleet) -> bool:
    """Return whether the fleet's SQLite registry exists, without creating it; True for a database server."""
    return not fleet.registry.startswith(SQLITE) or Path(fleet.registry.removeprefix(SQLITE)).exists()


def open_blobs(fleet: Fleet) -> BlobStore:
    """Open the fleet's blob store; its cache lies next to the fleet file."""
    return BlobStore(fleet.blobs, fleet.folder / ".cache" / "blobs")


def register_base(fleet: Fleet, registry: Registry, name: str) -> BaseModel:
    """Register a base model by its content; ConflictError if the name is registered with other weights.

    The content is read only if the names, sizes or modification times of the files have changed since the last time.
    """
    path = fleet.base(name).path
    checkpoint = open_checkpoint(path)
    stamp = checkpoint.stamp()
    with suppress(NotFoundError):
        known = registry.base(name)
        if (known.path, known.stamp) == (str(path), stamp):
            return known
    return registry.add_base(name, str(path), checkpoint.fingerprint(), stamp)


def bases_to_serve(opened: OpenFleet, wanted: Sequence[str] = ()) -> list[str]:
    """Register and return the base models that need an engine: `wanted`, or else those with live adapters.

    If the fleet file names no adapters, or if none is live, all bases of the file are served: clients can load adapters
    into them. Raises ConfigError if the file has no base.
    """
    fleet = opened.config
    if not fleet.bases:
        raise ConfigError(f"Fleet {fleet.name!r} has no base model. Add a [[bases]] table with `name` and `path`.")
    live = sorted({route.live.base for route in opened.registry.routes().values()}) if fleet.adapters else []
    bases = list(wanted) or live or [spec.name for spec in fleet.bases]
    for name in bases:
        register_base(fleet, opened.registry, name)
    return bases


def register_adapters(fleet: Fleet, registry: Registry, blobs: BlobStore) -> list[Version]:
    """Register every adapter of the fleet file; return the new ones, each as version 1, LIVE.

    A second call changes nothing. All files are checked before anything is written: an unusable adapter raises
    InvalidAdapterError. Version 1 is never replaced: another base or other files than the registered ones raise
    ConflictError.
    """
    bases = {spec.base for spec in fleet.adapters}
    for base in sorted(bases):
        register_base(fleet, registry, base)
    checkpoints = {base: open_checkpoint(fleet.base(base).path) for base in bases}
    for spec in fleet.adapters:
        folder = fleet.local(spec.path)
        check_base(load_adapter(folder, max_rank=fleet.serving.max_rank), checkpoints[spec.base])
        adapter_dialect(folder, base_dialect(checkpoints[spec.base].folder))
        _check_unchanged(spec, folder, registry, blobs)
    new = []
    for spec in fleet.adapters:
        registry.add_adapter(spec.name, data=str(spec.data), metric=spec.metric, traffic=spec.traffic)
        if not registry.versions(adapter=spec.name):
            with suppress(ConflictError):  # another process has just registered it
                base_folder = checkpoints[spec.base].folder
                new.append(_add_first_version(spec, fleet.local(spec.path), base_folder, registry, blobs))
    return new


def _check_unchanged(spec: AdapterSpec, folder: Path, registry: Registry, blobs: BlobStore) -> None:
    """Raise ConflictError if version 1 is registered with another base or another adapter than the fleet file names.

    An older release stored and hashed all files of the folder. If the hashes differ, the stored files therefore decide.
    """
    first = next(iter(registry.versions(adapter=spec.name)), None)
    if first is None:
        return
    if first.base != spec.base:
        raise ConflictError(
            f"Adapter {spec.name!r}: the fleet file says base {spec.base!r}, but {first.label} is registered on "
            f"{first.base!r}. Change the file back to {first.base!r}, and carry the adapter over with "
            f"`relora upgrade --to {spec.base}`. An adapter that was trained for {spec.base!r} needs another name."
        )
    found = identity(folder)
    if found != first.content_hash and (
        first.blob_key is None or found != identity(blobs.fetch_folder(first.blob_key))
    ):
        raise ConflictError(
            f"Adapter {spec.name!r}: the files in {spec.path} are not those that {first.label} is registered with. "
            "Restore the old files. Give the new files another name in the fleet file, or load them into the running "
            "service as the next version (POST /v1/load_lora_adapter)."
        )


def _add_first_version(spec: AdapterSpec, folder: Path, base: Path, registry: Registry, blobs: BlobStore) -> Version:
    key = store_adapter(blobs, folder)
    size = size_details(load_adapter(folder), blobs.fetch_folder(key))
    details = store_dialect(blobs, folder, base) | size
    return registry.add_version(spec.name, spec.base, Status.LIVE, blob_key=key, content_hash=key, details=details)
