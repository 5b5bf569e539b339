"""From a model's name to who answers: the routes at one moment, and the draw between a live version and its canary."""

import asyncio
import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from cluster.errors import NotFoundError, ReloraError
from cluster.registry import BaseModel, Route, Status, Version
from serving.adapters.residency import Residency, Tier, summed
from serving.engine.request import AdapterRef
from serving.errors import BackendDiedError
from serving.gateway.backend import Backend

HEALTH_TIMEOUT_S = 5.0
SERVABLE = frozenset((Status.CANDIDATE, Status.READY, Status.CANARY, Status.LIVE, Status.RETIRED))


@dataclass(frozen=True)
class Target:
    """Who answers: an adapter's version on its base, or the bare base."""

    base: str
    version: Version | None = None

    @property
    def label(self) -> str:
        """What a client can ask for to get the same again: `name@version`, or the base's name."""
        return self.base if self.version is None else self.version.label

    @property
    def adapter(self) -> AdapterRef | None:
        """The version as engines know it."""
        version = self.version
        if version is None:
            return None
        assert version.blob_key is not None, "a servable version has files"
        assert version.content_hash is not None, "a servable version has files"
        return AdapterRef(version.content_hash, version.adapter, version.number, blob_key=version.blob_key)


@dataclass(frozen=True)
class Snapshot:
    """What could be served at one moment: live routes by adapter, base models, and the engines that ran, by base."""

    routes: Mapping[str, Route] = field(default_factory=dict)
    bases: Mapping[str, BaseModel] = field(default_factory=dict)
    backends: Mapping[str, Backend] = field(default_factory=dict)
    taken_at: float = float("-inf")

    def named(self, name: str, call_id: str, canary_share: float) -> list[Target]:
        """Whom to try in order for a name without version; NotFoundError if there is none.

        A base is itself. An adapter is its live version, or, for `canary_share` of the calls, its canary first.
        """
        if name in self.bases:
            return [self.served(Target(name))]
        if name not in self.routes:
            raise NotFoundError(f"The model {name!r} does not exist.")
        route = self.routes[name]
        live = Target(route.live.base, route.live)
        if route.canary is None or _lot(call_id) >= canary_share:
            return [live]
        return [Target(route.canary.base, route.canary), live]

    def pinned(self, version: Version) -> Target:
        """The target of a version asked for by number; NotFoundError if it cannot be served."""
        if version.status not in SERVABLE:
            raise NotFoundError(f"The model {version.label!r} cannot be served: it is {version.status}.")
        return self.served(Target(version.base, version))

    def served(self, target: Target) -> Target:
        """The same target, or NotFoundError if its base has no engine."""
        if target.base not in self.backends:
            raise NotFoundError(f"The model {target.label!r} is not served: no engine of {target.base} runs.")
        return target

    def backend(self, base: str) -> Backend:
        """The engine of a base; BackendDiedError if there is none, because a live route counts on it."""
        if base not in self.backends:
            raise BackendDiedError(f"No engine of {base} runs.")
        return self.backends[base]

    def models(self) -> list[Target]:
        """The bases that have an engine, and the live version of each adapter."""
        bases = [Target(name) for name in sorted(self.bases) if name in self.backends]
        return bases + [Target(route.live.base, route.live) for _, route in sorted(self.routes.items())]

    def adapters(self) -> dict[tuple[str, str], Target]:
        """The live versions and canaries, by base and content hash; one of those with the same files."""
        versions = [v for route in self.routes.values() for v in (route.canary, route.live) if v is not None]
        targets = [Target(version.base, version) for version in versions]
        return {(target.base, target.adapter.key): target for target in targets if target.adapter is not None}

    def needed_bases(self) -> set[str]:
        """The bases whose engines must be alive for all to be well."""
        return {route.live.base for route in self.routes.values()} | self.backends.keys()


async def residencies(snapshot: Snapshot) -> list[tuple[Target, Residency]]:
    """Every live version and canary, and where its weights are."""
    reports = await asyncio.gather(*map(_reports, snapshot.backends.values()))
    known = dict(zip(snapshot.backends, map(summed, reports), strict=True))
    targets = [target for _, target in sorted(snapshot.adapters().items())]
    return [(target, _residency(target, known.get(target.base, {}))) for target in targets]


async def release_gone(before: Snapshot, now: Snapshot) -> None:
    """Tell the engines of adapters that no name leads to any more, so that they free what these take."""
    gone = before.adapters().keys() - now.adapters().keys()
    await asyncio.gather(*(release(now.backends[base], key) for base, key in gone if base in now.backends))


async def release(backend: Backend, adapter_key: str) -> None:
    """Tell a base's engines of one; those that do not answer free their memory in their own way."""
    with suppress(ReloraError, TimeoutError):
        await asyncio.wait_for(backend.release(adapter_key), HEALTH_TIMEOUT_S)


async def _reports(backend: Backend) -> list[Residency]:
    with suppress(ReloraError, TimeoutError):  # an engine that is starting anew has no adapters
        return await asyncio.wait_for(backend.residencies(), HEALTH_TIMEOUT_S)
    return []


def _residency(target: Target, known: Mapping[str, Residency]) -> Residency:
    assert target.adapter is not None, "a base is no adapter"
    return known.get(target.adapter.key, Residency(target.adapter.key, Tier.STORE))


def _lot(call_id: str) -> float:
    """A number in [0, 1) that is the call's own: the same call always draws the same lot."""
    return int.from_bytes(hashlib.blake2b(call_id.encode(), digest_size=4).digest()) / 2**32
