"""Loads adapters from clients' folders as LIVE versions, and takes them out of service."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from cluster.adapters.dialect import DIALECT
from cluster.adapters.intake import check_adapter, store_checked
from cluster.errors import ConflictError, InvalidRequestError, NotFoundError
from cluster.names import check_name
from cluster.registry.registry import Registry, Status, Version
from cluster.storage.blobs import BlobStore
from cluster.storage.sources import local_folder
from serving.engine.request import AdapterRef


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter's checked files in the blob store: its base, their key, and the details of a version made of them."""

    base: str
    key: str
    details: dict[str, Any] = field(default_factory=dict)

    def ref(self, name: str) -> AdapterRef:
        """Return the adapter as engines know it, before it has a version."""
        return AdapterRef(self.key, name, 0, self.key, self.details.get(DIALECT, ""))


def store(
    registry: Registry,
    blobs: BlobStore,
    name: str,
    folder: str,
    base: str | None,
    *,
    served_bases: Collection[str],
    max_rank: int,
) -> StoredAdapter:
    """Check an adapter's files against its base and store them.

    `folder` is a folder on the server, a bucket's URL or a hub id (see `cluster.storage.sources`). Nothing is
    stored before all checks have passed. Raises InvalidRequestError (bad name or folder, or no base given where
    several are served), InvalidAdapterError (bad files), NotFoundError (the base is not served), ConflictError (a
    base has this name) and StorageError.
    """
    check_name(name)
    if any(known.name == name for known in registry.bases()):
        raise ConflictError(f"{name!r} is the name of a base model. Choose another name for the adapter.")
    base = base or _only_base(registry, name, served_bases)
    if base not in served_bases:
        raise NotFoundError(f"Base model {base!r} is not served. Served are: {', '.join(sorted(served_bases))}.")
    try:
        path = local_folder(folder, blobs.cache_dir.parent / "sources")
    except NotFoundError as error:  # not 404, which clients read as an unknown model
        raise InvalidRequestError(f"lora_path: {error}") from error
    checked = check_adapter(path, registry.base(base), registry.bases(), max_rank)
    return StoredAdapter(base, *store_checked(blobs, checked))


def publish(registry: Registry, name: str, stored: StoredAdapter) -> Version:
    """Make stored files the name's LIVE version. The same transaction retires the old one."""
    if all(known.name != name for known in registry.adapters()):
        registry.add_adapter(name)
    # It starts as RETIRED, so neither traffic nor a rollout can use it before the promotion.
    version = registry.add_version(
        name, stored.base, Status.RETIRED, blob_key=stored.key, content_hash=stored.key, details=stored.details
    )
    return registry.promote(version.id)


def withdraw(registry: Registry, name: str) -> Version:
    """Retire the name's LIVE version and roll back its canary. Raises NotFoundError if there is no LIVE version."""
    route = registry.routes().get(check_name(name))
    if route is None:
        raise NotFoundError(f"No adapter {name!r} is loaded.")
    if route.canary is not None:
        reason = {"rolled_back": f"{name} was taken out of service"}
        registry.move(route.canary.id, Status.CANARY, Status.ROLLED_BACK, details=reason)
    return registry.move(route.live.id, Status.LIVE, Status.RETIRED)


def _only_base(registry: Registry, name: str, served_bases: Collection[str]) -> str:
    """Return the base for a load without `base_model_name`: the LIVE version's, or the only one that is served."""
    route = registry.routes().get(name)
    if route is not None:
        return route.live.base
    if len(served_bases) != 1:
        listed = ", ".join(sorted(served_bases))
        raise InvalidRequestError(f"base_model_name: name the adapter's base. Served are: {listed}.")
    return next(iter(served_bases))
