"""Turns model names into versions and engines, and draws between a live version and its canary.

A `Snapshot` holds the routes at one moment. The functions below it ask its engines where adapters are, and tell them
which adapters they may free.
"""

import asyncio
import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from cluster.adapters.dialect import DIALECT
from cluster.errors import NotFoundError, ReloraError
from cluster.registry.registry import BaseModel, Route, Status, Version
from cluster.storage.checkpoints import open_checkpoint
from serving.adapters.residency import Residency, Tier, summed
from serving.engine.request import AdapterRef
from serving.errors import BackendDiedError
from serving.gateway.backend import Backend
from serving.model.config import read_model_config

HEALTH_TIMEOUT_S = 5.0
SERVABLE = frozenset((Status.CANDIDATE, Status.READY, Status.CANARY, Status.LIVE, Status.RETIRED))


@dataclass(frozen=True)
class Target:
    """What answers a call: an adapter's version on its base, or the bare base."""

    base: str
    version: Version | None = None

    @property
    def label(self) -> str:
        """Return the model name that pins this target: `name@version`, or the base's name."""
        return self.base if self.version is None else self.version.label

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the adapter, if there is one, and of the base."""
        return (self.base,) if self.version is None else (self.version.adapter, self.base)

    @property
    def adapter(self) -> AdapterRef | None:
        """Return the version as engines know it, or None for a bare base."""
        version = self.version
        if version is None:
            return None
        assert version.blob_key is not None, "a servable version has files"
        assert version.content_hash is not None, "a servable version has files"
        return AdapterRef(version.content_hash, version.adapter, version.number, version.blob_key, dialect_of(version))


def dialect_of(version: Version | None) -> str:
    """Return the blob of a version's text files, or "" if it reads and writes text as its base does."""
    return "" if version is None else str(version.details.get(DIALECT, ""))


@dataclass(frozen=True)
class Snapshot:
    """What can be served at one moment: routes by adapter name, and base models and engines by base name."""

    routes: Mapping[str, Route] = field(default_factory=dict)
    bases: Mapping[str, BaseModel] = field(default_factory=dict)
    backends: Mapping[str, Backend] = field(default_factory=dict)
    taken_at: float = float("-inf")

    def named(self, name: str, call_id: str, canary_share: float) -> list[Target]:
        """Return the targets to try for a name without a version. Raises NotFoundError if nothing has this name.

        A base's name means the base. An adapter's name means its live version; for `canary_share` of the calls, its
        canary comes first.
        """
        if name in self.bases:
            return [self.served(Target(name))]
        if name not in self.routes:
            raise NotFoundError(f"The model {name!r} does not exist.")
        route = self.routes[name]
        live = Target(route.live.base, route.live)
        if route.canary is None or _draw(call_id) >= canary_share:
            return [live]
        return [Target(route.canary.base, route.canary), live]

    def pinned(self, version: Version) -> Target:
        """Return the target of a version asked for by number. Raises NotFoundError if it cannot be served."""
        if version.status not in SERVABLE:
            raise NotFoundError(f"The model {version.label!r} cannot be served: its status is {version.status}.")
        return self.served(Target(version.base, version))

    def served(self, target: Target) -> Target:
        """Return the target. Raises NotFoundError if its base has no engine."""
        if target.base not in self.backends:
            raise NotFoundError(f"The model {target.label!r} is not served: no engine of {target.base} is running.")
        return target

    def backend(self, base: str) -> Backend:
        """Return a base's engine. Raises BackendDiedError if there is none: a route needs it, so it must be down."""
        if base not in self.backends:
            raise BackendDiedError(f"No engine of {base} is running.")
        return self.backends[base]

    def models(self) -> list[Target]:
        """Return the bases that have an engine, then each adapter's live version."""
        bases = [Target(name) for name in sorted(self.bases) if name in self.backends]
        return bases + [Target(route.live.base, route.live) for _, route in sorted(self.routes.items())]

    def adapters(self) -> dict[tuple[str, str], Target]:
        """Return the live versions and canaries by base and content hash. Of equal files one version is kept."""
        versions = [v for route in self.routes.values() for v in (route.canary, route.live) if v is not None]
        targets = [Target(version.base, version) for version in versions]
        return {(target.base, target.adapter.key): target for target in targets if target.adapter is not None}

    def needed_bases(self) -> set[str]:
        """Return the bases whose engines must be alive: those with a live version, and those with an engine."""
        return {route.live.base for route in self.routes.values()} | self.backends.keys()


@lru_cache(maxsize=256)
def max_position(folder: str) -> int:
    """Return the longest sequence of a base model. Raises InvalidCheckpointError if its config.json is unusable."""
    return read_model_config(open_checkpoint(Path(folder)).config).max_position


async def residencies(snapshot: Snapshot) -> list[tuple[Target, Residency]]:
    """Return every live version and canary with where its weights are."""
    reports = await asyncio.gather(*map(_residencies_of, snapshot.backends.values()))
    known = dict(zip(snapshot.backends, map(summed, reports), strict=True))
    return [
        (target, known.get(base, {}).get(key, Residency(key, Tier.STORE)))
        for (base, key), target in sorted(snapshot.adapters().items())
    ]


async def release_gone(before: Snapshot, now: Snapshot) -> None:
    """Let the engines free adapters that no name leads to any more."""
    gone = before.adapters().keys() - now.adapters().keys()
    await asyncio.gather(*(release(now.backends[base], key) for base, key in gone if base in now.backends))


async def release(backend: Backend, adapter_key: str) -> None:
    """Let a base's engines free an adapter. Engines that do not answer evict it when they need the memory."""
    with suppress(ReloraError, TimeoutError):
        await asyncio.wait_for(backend.release(adapter_key), HEALTH_TIMEOUT_S)


async def _residencies_of(backend: Backend) -> list[Residency]:
    with suppress(ReloraError, TimeoutError):  # an engine that does not answer may be starting, without adapters
        return await asyncio.wait_for(backend.residencies(), HEALTH_TIMEOUT_S)
    return []


def _draw(call_id: str) -> float:
    """Return a number in [0, 1) that depends only on the call's id."""
    return int.from_bytes(hashlib.blake2b(call_id.encode(), digest_size=4).digest()) / 2**32
