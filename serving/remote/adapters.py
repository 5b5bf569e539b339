"""The adapters of one server: their files where it can read them, and which of them it has loaded.

A name on the server always means the same files, because it ends with their hash. So the server's own list of models
says what is loaded, however many gateways use the server, and a restart of either side is harmless.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from cluster.adapters.files import Adapter, LoraFactors, load_adapter, save_adapter
from cluster.config.engines import EngineSpec
from cluster.errors import InvalidAdapterError, NotFoundError, ReloraError, StorageError
from cluster.names import flat_name
from cluster.storage.blobs import BlobStore
from serving.adapters.residency import Residency, Tier
from serving.engine.request import AdapterRef
from serving.errors import BackendFailedError
from serving.remote.server import RemoteServer

log = logging.getLogger(__name__)

_HASH_CHARS = 16


class RemoteAdapters:
    """Loads adapters into a server, once each, and unloads them."""

    def __init__(self, server: RemoteServer, blobs: BlobStore, load_timeout_s: float):
        self._server = server
        self._blobs = blobs
        self._load_timeout_s = load_timeout_s
        self._loads: dict[str, asyncio.Task[Residency]] = {}  # by name: under way, or done
        self._unloads: set[asyncio.Task[None]] = set()  # the event loop alone would not keep them
        self._num_hits: Counter[str] = Counter()
        self._num_running: Counter[str] = Counter()

    async def ensure(self, adapter: AdapterRef) -> str:
        """Return the adapter's name on the server, after it is loaded there. Concurrent calls share one load.

        Raises BackendFailedError if its files cannot be used, StorageError if they cannot be fetched or written, and
        what `RemoteServer` raises.
        """
        name = name_on_server(adapter)
        if name not in self._loads:
            self._loads[name] = asyncio.create_task(self._load(name, adapter))
        else:
            self._num_hits[name] += 1
        try:
            await asyncio.shield(self._loads[name])  # the load goes on for the others if one request is cancelled
        except Exception:
            self.forget(name)
            raise
        return name

    def forget(self, name: str) -> None:
        """Load the adapter again the next time: the server does not have it."""
        self._loads.pop(name, None)

    @contextmanager
    def running(self, adapter: AdapterRef | None) -> Iterator[None]:
        """Count a request that runs with an adapter."""
        name = name_on_server(adapter) if adapter else ""
        self._num_running[name] += 1
        try:
            yield
        finally:
            self._num_running[name] -= 1

    def release(self, key: str) -> None:
        """Unload the adapter with this content hash under every name, soon: no caller waits for a slow server."""
        if self._server.kind.unload_route is not None:
            task = asyncio.create_task(self._unload(key))
            self._unloads.add(task)
            task.add_done_callback(self._unloads.discard)

    async def _unload(self, key: str) -> None:
        try:
            listed = [str(model.get("id")) for model in await self._server.models()]
            for name in listed:
                if name.rpartition(".")[2] == key[:_HASH_CHARS]:
                    self.forget(name)
                    await self._server.unload(name)
        except ReloraError as error:  # the server evicts it when it needs the memory
            log.warning("could not unload adapter %s: %s", key[:_HASH_CHARS], error)

    async def aclose(self) -> None:
        """Wait for the unloads under way."""
        await asyncio.gather(*self._unloads)

    def residencies(self) -> list[Residency]:
        """Return the adapters that this process has loaded. Where the server keeps their weights is not known."""
        done = {name: load.result() for name, load in self._loads.items() if load.done() and not load.exception()}
        return [
            replace(report, num_hits=self._num_hits[name], num_running=self._num_running[name])
            for name, report in done.items()
        ]

    async def _load(self, name: str, adapter: AdapterRef) -> Residency:
        started_at = time.monotonic()
        spec = self._server.spec
        await asyncio.to_thread(write_for_server, self._blobs, adapter, spec)
        if self._server.kind.load_route is not None:
            await self._server.load(name, path_on_server(spec, name), self._load_timeout_s)
        return Residency(adapter.key, Tier.HOST, load_s=time.monotonic() - started_at)


def name_on_server(adapter: AdapterRef) -> str:
    """Return `name.version.hash`: readable in the server's log, and a valid file name."""
    return f"{flat_name(adapter.name)[:96]}.{adapter.version}.{adapter.key[:_HASH_CHARS]}"


def path_on_server(spec: EngineSpec, name: str) -> str:
    """Return the path of an adapter's files as the server sees it."""
    return f"{spec.adapters_on_server or spec.adapters}/{name}"


def write_for_server(blobs: BlobStore, adapter: AdapterRef, spec: EngineSpec) -> None:
    """Write an adapter's files for a server, unless they are there.

    Raises BackendFailedError if no such server can run the adapter, and StorageError.
    """
    folder = Path(spec.adapters) / name_on_server(adapter)
    if folder.exists():  # it was written as a whole or not at all
        return
    try:
        stored = load_adapter(blobs.fetch_folder(adapter.blob_key))
        save_adapter(uniform(stored), folder)
    except InvalidAdapterError as error:
        raise BackendFailedError(f"Adapter {adapter.label} cannot be used on a {spec.kind} server: {error}") from error
    except NotFoundError as error:
        raise StorageError(f"Adapter {adapter.label} is missing from the blob store: {error}") from error


def uniform(adapter: Adapter) -> Adapter:
    """Return the same adapter as plain LoRA with one rank and one scaling.

    Some servers ignore `rank_pattern`, `alpha_pattern` or `use_rslora`, and then compute something else in silence.
    Ranks are padded with zeros. Raises InvalidAdapterError for DoRA, which is not low-rank.
    """
    if adapter.is_dora:
        raise InvalidAdapterError("it is a DoRA, which only our own engines run.")
    scaling = next(iter(adapter.factors.values())).scaling
    factors = {module: _padded(f, adapter.max_rank, scaling) for module, f in adapter.factors.items()}
    return replace(adapter, factors=factors, is_rslora=False)


def _padded(factors: LoraFactors, rank: int, scaling: float) -> LoraFactors:
    num_missing = rank - factors.rank
    b_FR = factors.b_FR if factors.scaling == scaling else factors.b_FR * (factors.scaling / scaling)
    pad = torch.nn.functional.pad
    return replace(
        factors, a_RD=pad(factors.a_RD, (0, 0, 0, num_missing)), b_FR=pad(b_FR, (0, num_missing)), scaling=scaling
    )
