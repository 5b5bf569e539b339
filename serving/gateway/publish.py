"""Adapters that clients bring themselves: from a folder to a LIVE version, and out of service again."""

import os
from collections.abc import Collection
from pathlib import Path

from cluster.adapter_files import check_fits, load_adapter
from cluster.blobs import BlobStore
from cluster.checkpoints import open_checkpoint
from cluster.errors import ConflictError, InvalidRequestError, NotFoundError
from cluster.names import check_name
from cluster.registry import Registry, Status, Version


def store(
    registry: Registry,
    blobs: BlobStore,
    name: str,
    folder: str,
    base: str | None,
    *,
    served_bases: Collection[str],
    max_rank: int,
) -> tuple[str, str]:
    """Checks an adapter's files against the base and stores them; returns the base's name and the files' key.

    Nothing is written before all checks have passed. Raises InvalidRequestError (name, URL, unclear base),
    InvalidAdapterError (files), NotFoundError (base), ConflictError (the name is a base's), StorageError.
    """
    check_name(name)
    if any(known.name == name for known in registry.bases()):
        raise ConflictError(f"{name!r} is the name of a base model; choose another one for the adapter.")
    base = base or _only_base(registry, name, served_bases)
    if base not in served_bases:
        raise NotFoundError(f"No base model {base!r} is served; there are {', '.join(sorted(served_bases))}.")
    path = _local_folder(folder)
    shapes = open_checkpoint(Path(registry.base(base).path)).adaptable_shapes()
    check_fits(load_adapter(path, max_rank=max_rank), shapes)
    return base, blobs.put_folder(path)


def publish(registry: Registry, name: str, base: str, key: str) -> Version:
    """Makes stored files the name's LIVE version; the one that was LIVE is RETIRED in the same transaction."""
    if all(known.name != name for known in registry.adapters()):
        registry.add_adapter(name)
    # Enters as RETIRED: out of the way of traffic and of rollouts until the one step that makes it LIVE.
    version = registry.add_version(name, base, Status.RETIRED, blob_key=key, content_hash=key)
    return registry.promote(version.id)


def withdraw(registry: Registry, name: str) -> Version:
    """Retires the name's LIVE version and rolls its canary back; NotFoundError if it has no LIVE version."""
    route = registry.routes().get(check_name(name))
    if route is None:
        raise NotFoundError(f"No adapter {name!r} is loaded.")
    if route.canary is not None:
        why = {"rolled_back": f"{name} was taken out of service"}
        registry.move(route.canary.id, Status.CANARY, Status.ROLLED_BACK, details=why)
    return registry.move(route.live.id, Status.LIVE, Status.RETIRED)


def _only_base(registry: Registry, name: str, served_bases: Collection[str]) -> str:
    """The base that a load without `base_model_name` means: that of the version now LIVE, or the only one there is."""
    route = registry.routes().get(name)
    if route is not None:
        return route.live.base
    if len(served_bases) != 1:
        listed = ", ".join(sorted(served_bases))
        raise InvalidRequestError(f"base_model_name: say which base the adapter is for; there are {listed}.")
    return next(iter(served_bases))


def _local_folder(folder: str) -> Path:
    if "://" in folder:
        raise InvalidRequestError(f"lora_path: {folder!r} is a URL; adapters are loaded from folders on the server.")
    if not os.path.isdir(folder):  # Path.is_dir would raise where a name is too long
        raise InvalidRequestError(f"lora_path: {folder[:160]!r} is not a folder on the server.")
    return Path(folder)
