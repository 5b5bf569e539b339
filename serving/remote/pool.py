"""The servers of a fleet's `[[engines]]`: which answer, and several of them as one backend."""

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import httpx

from cluster.config.engines import EngineSpec
from cluster.config.settings import Fleet
from cluster.errors import ConfigError, ReloraError
from cluster.storage.blobs import BlobStore
from serving.adapters.residency import Residency
from serving.engine.request import Request, TokenStream
from serving.errors import BackendDiedError
from serving.remote.backend import RemoteBackend
from serving.remote.kinds import KINDS
from serving.remote.server import LostAdapterError

CHECK_TIMEOUT_S = 1.0
RECHECK_S = 2.0
AVOID_S = 5.0


class RemotePool:
    """Several servers of one base. A request goes to the one with the fewest open requests.

    A server that was gone gets no request for AVOID_S, unless all are gone. Adapters are loaded into a server when the
    first request for them reaches it.
    """

    def __init__(self, servers: Sequence[RemoteBackend]):
        self._servers = servers
        self._num_open: Counter[str] = Counter()
        self._num_sent: Counter[str] = Counter()
        self._gone_at: dict[str, float] = {}

    async def generate(self, request: Request) -> TokenStream:
        """See `Backend.generate`."""
        server = min(self._servers, key=self._order)
        self._num_open[server.url] += 1
        self._num_sent[server.url] += 1
        try:
            async with aclosing(server.generate(request)) as events:
                async for event in events:
                    yield event
        except BackendDiedError as error:
            if not isinstance(error, LostAdapterError):
                self._gone_at[server.url] = time.monotonic()
            raise
        finally:
            self._num_open[server.url] -= 1

    async def stats(self) -> dict[str, float]:
        """See `Backend.stats`."""
        sums: Counter[str] = Counter()
        for stats in await self._ask_all("stats"):
            sums.update(stats)
        return dict(sums)

    async def residencies(self) -> list[Residency]:
        """See `Backend.residencies`."""
        return [report for server in self._servers for report in await server.residencies()]

    async def release(self, adapter_key: str) -> None:
        """See `Backend.release`."""
        await self._ask_all("release", adapter_key)

    async def _ask_all(self, method: str, *arguments: str) -> list[Any]:
        """Return the answers of the servers that answer. Raises BackendDiedError if none does."""
        calls = (getattr(server, method)(*arguments) for server in self._servers)
        answers = await asyncio.gather(*calls, return_exceptions=True)
        errors = [answer for answer in answers if isinstance(answer, BaseException)]
        bugs = [error for error in errors if not isinstance(error, ReloraError)]
        if bugs or len(errors) == len(answers):
            raise (bugs or errors)[0]
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    def _order(self, server: RemoteBackend) -> tuple[bool, int, int]:
        url = server.url
        is_avoided = time.monotonic() - self._gone_at.get(url, float("-inf")) < AVOID_S
        return is_avoided, self._num_open[url], self._num_sent[url]


class RemoteEngines:
    """Finds the bases whose servers answer. Keeps their backends, which hold connections."""

    def __init__(self, fleet: Fleet, blobs: BlobStore):
        self._fleet = fleet
        self._blobs = blobs
        self._known: dict[str, RemoteBackend | RemotePool] = {}
        self._check_at: dict[str, float] = {}

    def running(self) -> Mapping[str, RemoteBackend | RemotePool]:
        """Return the backends by base. A base whose server answered once stays, so that requests wait for a restart.

        A server that has never answered delays the call by up to CHECK_TIMEOUT_S, once in RECHECK_S.
        """
        for base in {spec.base for spec in self._fleet.engines} - self._known.keys():
            if time.monotonic() >= self._check_at.get(base, 0.0):
                if any(map(is_answering, self._fleet.engines_of(base))):
                    self._known[base] = open_backend(self._fleet, base, self._blobs)
                self._check_at[base] = time.monotonic() + RECHECK_S
        return self._known


def open_backend(fleet: Fleet, base: str, blobs: BlobStore) -> RemoteBackend | RemotePool:
    """Return the backend of a base that other servers run."""
    specs = fleet.engines_of(base)
    if len(specs) > 1:  # if one server is gone, another answers sooner than it comes back
        specs = tuple(replace(spec, connect_retries=min(spec.connect_retries, 1)) for spec in specs)
    servers = [RemoteBackend(spec, fleet.base(base).path, blobs, fleet.serving) for spec in specs]
    return servers[0] if len(servers) == 1 else RemotePool(servers)


def check_answering(fleet: Fleet, base: str) -> None:
    """Raise BackendDiedError if no server of a base answers, and ConfigError if there is none."""
    specs = fleet.engines_of(base)
    if not specs:
        raise ConfigError(f"No `[[engines]]` table names a server for {base}, which `rollout.traffic` asks for.")
    if not any(map(is_answering, specs)):
        urls = ", ".join(spec.url for spec in specs)
        raise BackendDiedError(f"No engine of {base} answers at {urls}. Start it, or correct `[[engines]]`.")


def is_answering(spec: EngineSpec) -> bool:
    """Whether a server answers and is healthy."""
    try:
        route = f"{spec.url}{KINDS[spec.kind].health_route}"
        return httpx.get(route, timeout=CHECK_TIMEOUT_S, trust_env=False).status_code in (200, 401)
    except httpx.TransportError:
        return False
