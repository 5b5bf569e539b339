"""The checks of `relora doctor`: each says in one line what it found, and never raises."""

import importlib.metadata
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from cluster.config.fleet_file import load_fleet
from cluster.config.settings import BaseSpec, Fleet
from cluster.errors import ReloraError
from cluster.extras import EXTRAS
from cluster.fleet import has_registry, open_blobs, open_registry
from cluster.storage.checkpoints import open_checkpoint

PACKAGES = ("relora", "ray", "torch", "transformers", "safetensors", "sqlalchemy")
LOW_DISK_BYTES = 2_000_000_000


class Level(StrEnum):
    """How bad a finding is."""

    GOOD = "ok"
    NOTE = "note"  # fine for some uses
    BAD = "bad"  # something will fail


@dataclass(frozen=True)
class Check:
    """What one check found."""

    name: str
    level: Level
    text: str


def all_checks(file: Path | None) -> list[Check]:
    """Check the machine and, if a fleet file is given, the fleet."""
    checks = [_versions(), *_extras(), _cluster()]
    fleet = None
    if file is not None:
        try:
            fleet = load_fleet(file)
            counts = f"{len(fleet.bases)} bases, {len(fleet.adapters)} adapters"
            checks.append(Check("fleet file", Level.GOOD, f"{file}: {counts}"))
        except ReloraError as error:
            checks.append(Check("fleet file", Level.BAD, str(error)))
    checks.append(_gpu(fleet))
    return checks if fleet is None else [*checks, *_fleet_checks(fleet)]


def _versions() -> Check:
    found = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES if find_spec(name) is not None]
    return Check("versions", Level.GOOD, f"Python {platform.python_version()}, {', '.join(found)}")


def _extras() -> Iterator[Check]:
    missing = [f"{package} (extra {extra!r})" for package, extra in EXTRAS.items() if find_spec(package) is None]
    if missing:
        yield Check("optional packages", Level.NOTE, f"not installed: {', '.join(missing)}")


def _gpu(fleet: Fleet | None) -> Check:
    import torch

    wants_gpu = fleet is not None and (fleet.serving.device == "cuda" or fleet.readapt.workers.gpus_per_worker > 0)
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return Check("GPU", Level.GOOD, ", ".join(names))
    return Check("GPU", Level.BAD if wants_gpu else Level.NOTE, "torch sees no CUDA device")


def _cluster() -> Check:
    from cluster.on_ray import describe

    try:
        return Check("Ray cluster", Level.GOOD, describe())
    except ReloraError:
        return Check("Ray cluster", Level.NOTE, "none runs on this machine; `relora serve` starts one")


def _fleet_checks(fleet: Fleet) -> Iterator[Check]:
    for base in fleet.bases:
        yield _try(f"base {base.name}", partial(_checkpoint, fleet, base))
    for adapter in fleet.adapters:
        missing = [str(path) for path in (adapter.path, adapter.data) if not _is_there(fleet, path)]
        level = Level.NOTE if missing else Level.GOOD  # a registered adapter's files are in the blob store too
        found = f"missing: {', '.join(missing)}" if missing else str(adapter.path)
        yield Check(f"adapter {adapter.name}", level, found)
    yield _try("registry", lambda: _registry(fleet))
    yield _try("blob store", lambda: _blobs(fleet))
    for name, path in (("fleet folder", fleet.folder), ("packed adapters", Path(fleet.packed))):
        yield _disk(name, path)


def _is_there(fleet: Fleet, source: Path | str) -> bool:
    """Return whether a folder or hub id is on this machine. A bucket is not asked."""
    if isinstance(source, str):
        return True
    try:
        return fleet.local(source).exists()
    except ReloraError:
        return False


def _checkpoint(fleet: Fleet, base: BaseSpec) -> str:
    path = fleet.local(base.path)
    return f"{path}: {len(open_checkpoint(path).names())} tensors"


def _registry(fleet: Fleet) -> str:
    if not has_registry(fleet):
        return "not created yet"
    registry = open_registry(fleet)
    try:
        return f"{len(registry.adapters())} adapters, {len(registry.versions())} versions"
    finally:
        registry.close()


def _blobs(fleet: Fleet) -> str:
    stored = open_blobs(fleet).stored()
    return f"{len(stored)} files, {sum(blob.num_bytes for blob in stored) / 1e6:.1f} MB"


def _disk(name: str, path: Path) -> Check:
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    level = Level.GOOD if free > LOW_DISK_BYTES else Level.BAD
    return Check(f"disk of {name}", level, f"{free / 1e9:.1f} GB free at {existing}")


def _try(name: str, find: Callable[[], str]) -> Check:
    try:
        return Check(name, Level.GOOD, find())
    except ReloraError as error:
        return Check(name, Level.BAD, str(error))
