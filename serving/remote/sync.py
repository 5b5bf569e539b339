"""Rollouts without our gateway: the servers of `[[engines]]` have the live adapters, under their plain names.

Clients reach the servers by themselves or through a router of their own. Loading and unloading is all that happens
here. What a server has is read from its own list of models, so a run of `EngineSync` mends whatever a restarted server
or a killed rollout left.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager

from cluster.config.engines import EngineSpec
from cluster.config.settings import Fleet
from cluster.errors import ConfigError, ReloraError
from cluster.names import flat_name
from cluster.registry.records import Route, Status, Version
from cluster.registry.registry import Registry
from cluster.storage.blobs import BlobStore
from serving.engine.request import AdapterRef
from serving.remote.adapters import name_on_server, path_on_server, write_for_server
from serving.remote.kinds import KINDS
from serving.remote.server import RemoteServer

_ON_THEIR_WAY = (Status.CANDIDATE, Status.READY, Status.CANARY)


class EngineSync:
    """Brings the servers of a fleet to what the registry says is live. `say` gets a line for each change.

    Raises ConfigError if a server has no routes that load adapters.
    """

    def __init__(
        self,
        fleet: Fleet,
        registry: Registry,
        blobs: BlobStore,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.time,
    ):
        for spec in fleet.engines:
            if KINDS[spec.kind].load_route is None:
                raise ConfigError(
                    f"rollout.traffic: the server at {spec.url}, of kind {spec.kind!r}, has no route that loads "
                    'adapters. Use "gateway".'
                )
        self._fleet = fleet
        self._registry = registry
        self._blobs = blobs
        self._say = say
        self._clock = clock

    def run(self) -> bool:
        """Load what is missing, then unload what is left over. Return whether nothing is left to do.

        A server that fails is reported, and left for the next run. While one fails, nothing is unloaded.
        """
        return asyncio.run(self._run())

    async def _run(self) -> bool:
        routes = self._registry.routes()
        try:
            for spec in self._fleet.engines:
                await self._load(spec, routes)
            done = [await self._unload(spec, routes) for spec in self._fleet.engines]
        except ReloraError as error:
            self._say(f"not done yet: {error}")
            return False
        return all(done)

    async def _load(self, spec: EngineSpec, routes: Mapping[str, Route]) -> None:
        """Load the live adapters of a server's base. Other files under a name are replaced.

        They are unloaded first: replaced in place, a request under way would go on with other weights.
        """
        async with _opened(spec) as (server, listed):
            for name, route in routes.items():
                version = route.live
                path = path_on_server(spec, name_on_server(_ref(version)))
                if version.base != spec.base or listed.get(flat_name(name)) == path:
                    continue
                await asyncio.to_thread(write_for_server, self._blobs, _ref(version), spec)
                if flat_name(name) in listed:
                    await server.unload(flat_name(name))
                await server.load(flat_name(name), path, self._fleet.serving.adapter_load_timeout_s)
                self._say(f"{version.label}: loaded at {spec.url} as {flat_name(name)}")

    async def _unload(self, spec: EngineSpec, routes: Mapping[str, Route]) -> bool:
        """Unload adapters that are live elsewhere or nowhere. Return False if one still drains."""
        is_done = True
        async with _opened(spec) as (server, listed):
            for name in self._leftovers(spec, routes, listed):
                live = routes[name].live if name in routes else None
                if live is not None and self._clock() - live.updated_at < self._fleet.rollout.drain_s:
                    is_done = False
                    continue
                await server.unload(flat_name(name))
                self._say(f"{name}: unloaded at {spec.url}")
        return is_done

    def _leftovers(self, spec: EngineSpec, routes: Mapping[str, Route], listed: Collection[str]) -> list[str]:
        """Return our names on a server that it need not have: of adapters, and of versions that were probed."""
        live_here = {name for name, route in routes.items() if route.live.base == spec.base}
        adapters = [record.name for record in self._registry.adapters() if record.name not in live_here]
        probed = [
            name_on_server(_ref(version))
            for version in self._registry.versions(base=spec.base)
            if version.blob_key is not None and version.status not in _ON_THEIR_WAY
        ]
        return [name for name in (*adapters, *probed) if flat_name(name) in listed]


@asynccontextmanager
async def _opened(spec: EngineSpec) -> AsyncIterator[tuple[RemoteServer, dict[str, str]]]:
    """Yield a server, and the paths of the adapters that it lists by name."""
    server = RemoteServer(spec)
    try:
        yield (
            server,
            {str(model["id"]): str(model.get("root")) for model in await server.models() if model.get("parent")},
        )
    finally:
        await server.aclose()


def _ref(version: Version) -> AdapterRef:
    assert version.blob_key is not None, "a live version has files"
    return AdapterRef(version.content_hash or version.blob_key, version.adapter, version.number, version.blob_key)
