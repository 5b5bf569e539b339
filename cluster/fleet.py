"""Opening a fleet: its registry and its blob store, and registering the base models and adapters of the fleet file."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cluster.adapters.folder import identity
from cluster.adapters.intake import check_adapter, store_checked
from cluster.config.settings import AdapterSpec, Fleet
from cluster.config.types import SQLITE
from cluster.errors import ConfigError, ConflictError, NotFoundError
from cluster.progress import Counted, Say
from cluster.registry.registry import BaseModel, Registry, Status, Version
from cluster.storage.blobs import BlobStore
from cluster.storage.checkpoints import open_checkpoint

PROGRESS_S = 5.0  # between progress lines; work that is done sooner says nothing


@dataclass(frozen=True)
class OpenFleet:
    """A fleet file with its registry and its blob store open and its adapters registered.

    `new_versions` are the versions that `open_fleet` has registered just now.
    """

    config: Fleet
    registry: Registry
    blobs: BlobStore
    new_versions: tuple[Version, ...]


def open_fleet(fleet: Fleet, say: Say = lambda line: None) -> OpenFleet:
    """Open the fleet's registry and blob store, and register its adapters (see `register_adapters`)."""
    registry, blobs = open_registry(fleet), open_blobs(fleet)
    return OpenFleet(fleet, registry, blobs, tuple(register_adapters(fleet, registry, blobs, say)))


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


def register_adapters(
    fleet: Fleet, registry: Registry, blobs: BlobStore, say: Say = lambda line: None
) -> list[Version]:
    """Register every adapter of the fleet file; return the new ones, each as version 1, LIVE.

    A second call changes nothing. All files are checked before anything is written: an unusable adapter raises
    InvalidAdapterError. For a registered adapter the registry says where it is now: its `base` in the file is the one
    that it started on, and the file need not have that base any more. ConflictError if the file names other files or
    another base than the registered ones, ConfigError if it lacks the base of a new adapter.
    """
    listed = {base.name for base in fleet.bases}
    bases = sorted(listed & {spec.base for spec in fleet.adapters})
    counted = Counted("checked base", say, every_s=PROGRESS_S)
    for num_done, base in enumerate(bases, start=1):
        register_base(fleet, registry, base)
        counted.update(num_done, len(bases), base)
    counted = Counted("checked adapter", say, every_s=PROGRESS_S)
    new = []
    for index, spec in enumerate(fleet.adapters):
        versions = registry.versions(adapter=spec.name)
        if versions:
            _check_unchanged(fleet, spec, versions, blobs)
        elif spec.base in listed:
            folder, base_model = fleet.local(spec.path), registry.base(spec.base)
            new.append((spec, check_adapter(folder, base_model, registry.bases(), fleet.serving.max_rank)))
        else:
            names = ", ".join(sorted(listed)) or "none"
            raise ConfigError(f"adapters[{index}].base: no base {spec.base!r} among: {names}")
        counted.update(index + 1, len(fleet.adapters), spec.name)
    for spec in fleet.adapters:
        registry.add_adapter(spec.name, data=str(spec.data), metric=spec.metric, traffic=spec.traffic)
    added = []
    for spec, checked in new:
        key, details = store_checked(blobs, checked)
        with suppress(ConflictError):  # another process has just registered it
            added.append(registry.add_version(spec.name, spec.base, Status.LIVE, key, key, details=details))
    return added


def _check_unchanged(fleet: Fleet, spec: AdapterSpec, versions: Sequence[Version], blobs: BlobStore) -> None:
    """Raise ConflictError if the fleet file names another base or other files than the registered ones.

    Those of the live version are as good as those of the first one. If the live version is a later one, the first one's
    folder may be gone. An older release stored and hashed all files of the folder, so unequal hashes are not enough:
    the stored files decide.
    """
    first = versions[0]
    live = next((version for version in versions if version.status is Status.LIVE), first)
    if spec.base not in (first.base, live.base):
        raise ConflictError(
            f"Adapter {spec.name!r}: the fleet file says base {spec.base!r}, but {live.label} is registered on "
            f"{live.base!r}. Change the file back to {live.base!r}, and carry the adapter over with "
            f"`relora upgrade --to {spec.base}`. An adapter that was trained for {spec.base!r} needs another name."
        )
    try:
        found = identity(fleet.local(spec.path))
    except NotFoundError:
        if live is first:
            raise
        return
    stored = [version.blob_key for version in (first, live) if version.blob_key is not None]
    is_registered = found in (first.content_hash, live.content_hash)
    if not is_registered and all(found != identity(blobs.fetch_folder(key)) for key in stored):
        raise ConflictError(
            f"Adapter {spec.name!r}: the files in {spec.path} are not those that {first.label} is registered with. "
            "Restore the old files. Give the new files another name in the fleet file, or load them into the running "
            "service as the next version (POST /v1/load_lora_adapter)."
        )
