"""Serving on Ray Serve: one application per base model that holds its engine, and one that holds the gateway.

A thin shell: decorators, resources and the translation of Ray's errors. An engine's application has no HTTP route; the
gateway finds it by name, so bases come and go while the gateway runs.
"""

import asyncio
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayError, RayTaskError, WorkerCrashedError
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus
from sqlalchemy import make_url

from cluster.config import Fleet
from cluster.errors import ConflictError, NotFoundError, OverloadedError, ReloraError
from cluster.fleet import open_blobs, open_registry
from cluster.registry import Version
from serving.adapters.residency import Residency
from serving.engine.engine import Engine
from serving.engine.heap import settle_heap
from serving.engine.loop import EngineLoop
from serving.engine.request import FinishReason, Request, TokenEvent, TokenStream
from serving.errors import BackendDiedError, BackendFailedError
from serving.gateway.backend import Backend
from serving.gateway.gateway import Gateway
from serving.gateway.golden import check_golden
from serving.gateway.local_backend import LocalBackend
from serving.gateway.prompts import Prompter
from serving.http.api import create_app

GATEWAY = "gateway"
ENGINE_PREFIX = "engine-"
# Longer than any generation: a replica that shuts down lets its streams finish (Serve's default cuts them at 20 s).
GRACE_S = 600.0
# What a gateway replica holds open at once; the engines' own queues say when it is too much.
MAX_GATEWAY_REQUESTS = 10_000
_GONE = (RayActorError, WorkerCrashedError, ObjectLostError, DeploymentUnavailableError, GetTimeoutError)


class EngineDeployment:
    """One replica of a base's engine, which runs in a thread of its own, so that health checks always answer."""

    def __init__(self, fleet: Fleet, base: str):
        engine = Engine.open(fleet.base(base).path, fleet.serving)
        # Each machine has a folder of its own: where they share the disk, one could delete what another has mapped.
        self._loop = EngineLoop(engine, packed_dir=Path(fleet.packed) / platform.node())
        settle_heap()
        self._loop.start()
        self._backend = LocalBackend(self._loop, open_blobs(fleet))

    async def generate(self, request: Request) -> TokenStream:
        """See `Backend.generate`; errors travel as events, so that Ray does not wrap them."""
        try:
            async with aclosing(self._backend.generate(request)) as events:
                async for event in events:
                    yield event
        except ReloraError as error:
            yield TokenEvent(request.id, finish_reason=FinishReason.ABORT, error=error)

    async def stats(self) -> dict[str, float]:
        """This replica's gauges."""
        return await self._backend.stats()

    async def residencies(self) -> list[Residency]:
        """Where adapters are on this replica."""
        return await self._backend.residencies()

    async def release(self, adapter_key: str) -> None:
        """Let this replica's memory of an adapter go."""
        await self._backend.release(adapter_key)

    def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        self._backend.check_health()

    def __del__(self) -> None:
        if hasattr(self, "_loop"):
            self._loop.stop()


@serve.ingress()
class GatewayDeployment:
    """The HTTP door."""

    def __init__(self, fleet: Fleet):
        self._fleet = fleet

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve on the replica, because registries and gateways do not travel between processes."""
        fleet, backends = self._fleet, ServeBackends()
        self._gateway = Gateway(open_registry(fleet), open_blobs(fleet), backends.running, fleet.serving, fleet.rollout)
        return create_app(self._gateway)

    async def refresh(self) -> None:
        """See `Gateway.refresh`."""
        await self._gateway.refresh()

    async def serves(self) -> tuple[str, str]:
        """Whose gateway this is: the fleet's registry and address."""
        return _registry(self._fleet), _address(self._fleet)


class HandleBackend:
    """An engine behind a Serve handle. Which replica answers is Serve's choice: the one with the shorter queue.

    Serve's multiplexing could prefer replicas that hold the adapter, but it loads one adapter at a time per replica and
    makes a metric label of each adapter's name; residency-aware routing belongs elsewhere.
    """

    def __init__(self, handle: DeploymentHandle):
        self._handle = handle
        self._streaming: DeploymentHandle | None = None

    async def generate(self, request: Request) -> TokenStream:
        """See `Backend.generate`."""
        with _our_errors():
            if self._streaming is None:  # made here: in one of Serve's modes that needs the caller's event loop
                self._streaming = self._handle.options(stream=True)
            stream = self._streaming.generate.remote(request)
            try:
                async for event in stream:
                    yield event
            finally:
                stream.cancel()

    async def stats(self) -> dict[str, float]:
        """See `Backend.stats`."""
        replicas = await self._ask_all("stats")
        return {key: sum(stats[key] for stats in replicas) for key in replicas[0]}

    async def residencies(self) -> list[Residency]:
        """See `Backend.residencies`."""
        return [report for reports in await self._ask_all("residencies") for report in reports]

    async def release(self, adapter_key: str) -> None:
        """See `Backend.release`."""
        await self._ask_all("release", adapter_key)

    async def _ask_all(self, method: str, *arguments: str) -> list[Any]:
        with _our_errors():
            replicas = await self._handle.broadcast(method, *arguments).results_async()
        if not replicas:
            raise BackendDiedError("No replica of the engine runs.")
        return replicas


class ServeBackends:
    """The engine applications of this Serve instance. Keeps their handles, which are costly to make."""

    def __init__(self) -> None:
        self._known: dict[str, HandleBackend] = {}

    def running(self) -> Mapping[str, Backend]:
        """The engines that run, by base; one that was running and is restarting counts."""
        gone = (ApplicationStatus.DELETING, ApplicationStatus.DEPLOY_FAILED)
        with _our_errors():
            apps = serve.status().applications
            alive = {
                name.removeprefix(ENGINE_PREFIX): app
                for name, app in apps.items()
                if name.startswith(ENGINE_PREFIX) and app.status not in gone
            }
            for base, app in alive.items():
                if app.status is ApplicationStatus.RUNNING and base not in self._known:
                    self._known[base] = HandleBackend(serve.get_app_handle(ENGINE_PREFIX + base))
        self._known = {base: backend for base, backend in self._known.items() if base in alive}
        return self._known


def deploy(fleet: Fleet, bases: Sequence[str]) -> None:
    """Starts the gateway and one engine per base on the Ray cluster that this process is connected to.

    Returns when all of them answer. The address is `fleet.serving`'s; it cannot change while Serve runs. ConflictError
    where the cluster serves another fleet, which would be gone, or this one elsewhere.
    """
    if _is_running(GATEWAY):
        registry, address = _served()
        if (registry, address) != (_registry(fleet), _address(fleet)):
            raise ConflictError(
                f"This Ray cluster serves the fleet of {registry} at {address} already, and a cluster serves one: stop "
                "that first, or name another cluster in RAY_ADDRESS."
            )
    gateway = serve.deployment(GatewayDeployment).options(
        max_ongoing_requests=MAX_GATEWAY_REQUESTS,
        graceful_shutdown_timeout_s=GRACE_S,
        ray_actor_options={"num_cpus": 0.1},
    )
    with _deploying("the gateway"):
        serve.start(http_options={"host": fleet.serving.host, "port": fleet.serving.port})
        serve.run_many(
            [serve.RunTarget(gateway.bind(fleet), name=GATEWAY, route_prefix="/")]
            + [_engine_target(fleet, base) for base in bases]
        )
        _refresh_gateway()


def deploy_base(fleet: Fleet, base: str) -> None:
    """Adds the engine of one base to what runs, and returns when it answers."""
    with _deploying(f"the engine of {base}"):
        serve.run_many([_engine_target(fleet, base)])
        _refresh_gateway()


def check_gateway(fleet: Fleet) -> None:
    """NotFoundError where no gateway runs on the connected cluster, ConflictError where it is another fleet's."""
    if not _is_running(GATEWAY):
        raise NotFoundError("Nothing is served on this Ray cluster: `relora serve` comes first.")
    registry, address = _served()
    if registry != _registry(fleet):
        raise ConflictError(f"This Ray cluster serves another fleet, that of {registry} at {address}.")


def has_engine(base: str) -> bool:
    """Whether the engine of a base runs on the connected cluster."""
    return _is_running(ENGINE_PREFIX + base)


def _served() -> tuple[str, str]:
    with _our_errors():
        found: tuple[str, str] = _outside_handle(GATEWAY).serves.remote().result(timeout_s=30)
    return found


def _registry(fleet: Fleet) -> str:
    """To be shown: without a password."""
    return make_url(fleet.registry).render_as_string(hide_password=True)


def _address(fleet: Fleet) -> str:
    return f"{fleet.serving.host}:{fleet.serving.port}"


def _is_running(name: str) -> bool:
    with _our_errors():
        app = serve.status().applications.get(name)
    return app is not None and app.status is ApplicationStatus.RUNNING


def probe(fleet: Fleet, version: Version) -> None:
    """Asks an engine of the version's base for the version's golden answers, past the gateway. For `cluster.rollout`.

    Raises ReloraError that names the first difference, and OverloadedError where asking later may help.
    """
    try:
        with _our_errors():
            backend = HandleBackend(_outside_handle(ENGINE_PREFIX + version.base))
        asyncio.run(check_golden(version, Prompter(fleet.base(version.base).path), backend))
    except BackendDiedError as error:
        raise OverloadedError(f"{version.label} could not be probed yet: {error}") from error


def _outside_handle(app: str) -> DeploymentHandle:
    """Return a handle that works without an event loop, or in one that `asyncio.run` closes again.

    With RAY_SERVE_THROUGHPUT_OPTIMIZED=1 (as in `ray_cluster.yaml`) a handle's router runs on the event loop of its
    first caller, unless the handle is initialised otherwise. Ray 2.60 has no public way to say so for one handle:
    `DeploymentHandle._init` is the only one. The variable RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP holds for the whole
    process and is inherited by the replicas that it starts.
    """
    handle = serve.get_app_handle(app)
    if not handle.is_initialized:  # Serve returns the same handle each time, and it can be initialised only once
        handle._init(_run_router_in_separate_loop=True)
    return handle


def _refresh_gateway() -> None:
    """Makes the gateway see at once what has changed."""
    _outside_handle(GATEWAY).refresh.remote().result(timeout_s=30)


def _engine_target(fleet: Fleet, base: str) -> serve.RunTarget:
    config = fleet.serving
    deployment = serve.deployment(EngineDeployment).options(
        autoscaling_config=AutoscalingConfig(
            min_replicas=config.min_replicas,
            initial_replicas=config.min_replicas,
            max_replicas=max(config.min_replicas, config.max_replicas),
            target_ongoing_requests=config.target_ongoing_requests,
        ),
        # All that the engine can hold and a little more, so that it is the engine that says when its queue is full.
        max_ongoing_requests=config.max_sequences + config.max_queue + 100,
        graceful_shutdown_timeout_s=GRACE_S,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2.0,
        health_check_timeout_s=30.0,
        ray_actor_options={"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica},
    )
    return serve.RunTarget(deployment.bind(fleet, base), name=ENGINE_PREFIX + base, route_prefix=None)


@contextmanager
def _deploying(what: str) -> Iterator[None]:
    """Serve's words for a start that failed (a port in use, an engine that cannot be made), as one of our errors."""
    try:
        with _our_errors():
            yield
    except (RuntimeError, TimeoutError) as error:
        raise BackendFailedError(f"Ray Serve could not start {what}: {error}") from error


@contextmanager
def _our_errors() -> Iterator[None]:
    """Ray's errors as ours."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, ReloraError):
            raise error.cause from None
        raise BackendFailedError(f"The engine failed: {error.cause}") from error
    except BackPressureError as error:
        raise OverloadedError("The engine's queue is full.") from error
    except _GONE as error:
        raise BackendDiedError(f"The engine's replica is gone: {type(error).__name__}.") from error
    except (RayError, RayServeException) as error:
        raise BackendDiedError(f"Ray Serve failed: {error}") from error
