"""Runs serving on Ray Serve: one application for the engine of each base model, and one for the gateway.

This is a thin shell: deployments, resources and the translation of Ray's errors. An engine's application has no HTTP
route. The gateway finds it by name, so bases can be added and removed while the gateway runs.
"""

import asyncio
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import aclosing, contextmanager
from pathlib import Path

from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus
from sqlalchemy import make_url

from cluster.config.settings import Fleet
from cluster.errors import ConflictError, NotFoundError, OverloadedError, ReloraError
from cluster.fleet import open_blobs, open_registry
from cluster.names import flat_name
from cluster.registry.registry import Version
from serving.adapters.residency import Residency
from serving.engine.engine import Engine
from serving.engine.heap import settle_heap
from serving.engine.loop import EngineLoop
from serving.engine.request import FinishReason, Request, TokenEvent, TokenStream
from serving.errors import BackendDiedError, BackendFailedError
from serving.gateway.gateway import Gateway
from serving.gateway.golden import probe_golden, probe_remotely
from serving.gateway.local_backend import LocalBackend
from serving.gateway.on_ray import ENGINE_PREFIX, HandleBackend, ServeBackends, our_errors
from serving.http.api import create_app
from serving.remote.pool import RECHECK_S, RemoteEngines, check_answering

GATEWAY = "gateway"
# Longer than any generation, so that a replica finishes its streams before it shuts down (Serve's default is 20 s).
GRACE_S = 600.0
# Requests that a gateway replica holds open at once. It is this high because the engines limit their own queues.
MAX_GATEWAY_REQUESTS = 10_000


class EngineDeployment:
    """One replica of a base's engine. The engine has its own thread, so the replica always answers health checks."""

    def __init__(self, fleet: Fleet, base: str):
        engine = Engine.open(fleet.base(base).path, fleet.serving)
        # Each machine has its own folder: on a shared disk, one machine could delete what another has mapped.
        self._loop = EngineLoop(engine, packed_dir=Path(fleet.packed) / platform.node())
        settle_heap()
        self._loop.start()
        self._backend = LocalBackend(self._loop, open_blobs(fleet))

    async def generate(self, request: Request) -> TokenStream:
        """See `Backend.generate`. Errors become events, so that Ray does not wrap them."""
        try:
            async with aclosing(self._backend.generate(request)) as events:
                async for event in events:
                    yield event
        except ReloraError as error:
            yield TokenEvent(request.id, finish_reason=FinishReason.ABORT, error=error)

    async def stats(self) -> dict[str, float]:
        """Return this replica's gauges."""
        return await self._backend.stats()

    async def residencies(self) -> list[Residency]:
        """Return where adapters are on this replica."""
        return await self._backend.residencies()

    async def release(self, adapter_key: str) -> None:
        """Free an adapter's memory on this replica, once its requests in progress have ended."""
        await self._backend.release(adapter_key)

    def check_health(self) -> None:
        """Raise BackendDiedError if the engine is down. Serve then replaces the replica."""
        self._backend.check_health()

    def __del__(self) -> None:
        if hasattr(self, "_loop"):
            self._loop.stop()


@serve.ingress()
class GatewayDeployment:
    """A replica of the gateway, which answers HTTP requests."""

    def __init__(self, fleet: Fleet):
        self._fleet = fleet

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application. Serve calls this on the replica, because a gateway cannot be pickled."""
        fleet, blobs = self._fleet, open_blobs(self._fleet)
        ours, others = ServeBackends(), RemoteEngines(fleet, blobs)
        backends = lambda: {**ours.running(), **others.running()}  # noqa: E731
        registry = open_registry(fleet)
        self._gateway = Gateway(registry, blobs, backends, fleet.serving, fleet.rollout, fleet.specs())
        return create_app(self._gateway, fleet.serving.cors_origins)

    async def refresh(self) -> None:
        """See `Gateway.refresh`."""
        await self._gateway.refresh()

    async def has_engine(self, base: str) -> bool:
        """Whether this gateway knows a running engine of the base."""
        await self._gateway.refresh()
        return base in self._gateway.snapshot.backends

    async def serves(self) -> tuple[str, str]:
        """Return the registry and the address of the fleet that this gateway serves."""
        return _registry_and_address(self._fleet)


def deploy(fleet: Fleet, bases: Sequence[str]) -> None:
    """Start the gateway and one engine per base on the connected Ray cluster. Return when all of them answer.

    The address comes from `fleet.serving` and cannot change while Serve runs. Raises ConflictError if the cluster
    already serves another fleet, which this call would replace, or this fleet at another address.
    """
    if _is_running(GATEWAY):
        registry, address = _served()
        if (registry, address) != _registry_and_address(fleet):
            raise ConflictError(
                f"This Ray cluster already serves the fleet of {registry} at {address}. A cluster serves one fleet: "
                "stop that one first, or set RAY_ADDRESS to another cluster."
            )
    gateway = serve.deployment(GatewayDeployment).options(
        max_ongoing_requests=MAX_GATEWAY_REQUESTS,
        graceful_shutdown_timeout_s=GRACE_S,
        ray_actor_options={"num_cpus": 0.1},
    )
    remote = [base for base in bases if fleet.engines_of(base)]
    for base in remote:
        check_answering(fleet, base)
    with _deploying("the gateway"):
        serve.start(http_options={"host": fleet.serving.host, "port": fleet.serving.port})
        front = serve.RunTarget(gateway.bind(fleet), name=GATEWAY, route_prefix="/")
        serve.run_many([front, *(_engine_target(fleet, base) for base in bases if base not in remote)])
        _refresh_gateway()


def deploy_base(fleet: Fleet, base: str) -> None:
    """Start the engine of one more base. Return when it answers.

    An engine that is not ours must be running. Raises BackendDiedError if it does not answer, and ConflictError if the
    gateway was started before the fleet file named it.
    """
    if fleet.engines_of(base):
        check_answering(fleet, base)
        _await_remote(base)
        return
    with _deploying(f"the engine of {base}"):
        serve.run_many([_engine_target(fleet, base)])
        _refresh_gateway()


def check_gateway(fleet: Fleet) -> None:
    """Raise NotFoundError if the connected cluster has no gateway, ConflictError if it is another fleet's."""
    if not _is_running(GATEWAY):
        raise NotFoundError("No gateway runs on this Ray cluster. Run `relora serve` first.")
    registry, address = _served()
    if registry != _registry_and_address(fleet)[0]:
        raise ConflictError(f"This Ray cluster serves another fleet: that of {registry} at {address}.")


def has_engine(base: str) -> bool:
    """Whether an engine of ours runs the base on the connected cluster."""
    return _is_running(ENGINE_PREFIX + flat_name(base))


def _await_remote(base: str) -> None:
    """Wait until the gateway has seen that a remote engine answers. It looks every few seconds."""
    deadline = time.monotonic() + 4 * RECHECK_S
    with our_errors():
        while not _outside_handle(GATEWAY).has_engine.remote(base).result(timeout_s=30):
            if time.monotonic() > deadline:
                raise ConflictError(
                    f"The gateway does not know the engine of {base}: it was started before `[[engines]]` named it. "
                    "Run `relora serve --detach` again, which updates it."
                )
            time.sleep(0.5)


def _served() -> tuple[str, str]:
    with our_errors():
        found: tuple[str, str] = _outside_handle(GATEWAY).serves.remote().result(timeout_s=30)
    return found


def _registry_and_address(fleet: Fleet) -> tuple[str, str]:
    """Return the registry's URL, without its password, and the gateway's address."""
    registry = make_url(fleet.registry).render_as_string(hide_password=True)
    return registry, f"{fleet.serving.host}:{fleet.serving.port}"


def _is_running(name: str) -> bool:
    with our_errors():
        app = serve.status().applications.get(name)
    return app is not None and app.status is ApplicationStatus.RUNNING


def probe(fleet: Fleet, version: Version) -> None:
    """Check the version's golden answers on an engine of its base, without the gateway. For `cluster.registry.rollout`.

    Raises ReloraError that names the first difference, and OverloadedError if a later call may succeed.
    """
    try:
        if fleet.engines_of(version.base):
            asyncio.run(probe_remotely(version, fleet))
            return
        with our_errors():
            backend = HandleBackend(_outside_handle(ENGINE_PREFIX + flat_name(version.base)))
        asyncio.run(probe_golden(version, open_blobs(fleet), fleet.base(version.base).path, backend))
    except BackendDiedError as error:
        raise OverloadedError(f"{version.label} cannot be probed yet: {error}") from error


def _outside_handle(app: str) -> DeploymentHandle:
    """Return a handle that works without an event loop, or in one that `asyncio.run` closes again.

    With RAY_SERVE_THROUGHPUT_OPTIMIZED=1 (as in `ray_cluster.yaml`) a handle's router runs on the event loop of its
    first caller. Ray 2.60 lets one handle choose otherwise only through `_init`. The public setting,
    RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP, holds for the whole process and for the replicas that it starts.
    """
    handle = serve.get_app_handle(app)
    if not handle.is_initialized:  # Serve returns the same handle each time, and it can be initialised only once
        handle._init(_run_router_in_separate_loop=True)
    return handle


def _refresh_gateway() -> None:
    """Make the gateway see changes at once."""
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
        # A little more than the engine can hold, so that the engine itself refuses requests when its queue is full.
        max_ongoing_requests=config.max_sequences + config.max_queue + 100,
        graceful_shutdown_timeout_s=GRACE_S,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2.0,
        health_check_timeout_s=30.0,
        ray_actor_options={"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica},
    )
    return serve.RunTarget(deployment.bind(fleet, base), name=ENGINE_PREFIX + flat_name(base), route_prefix=None)


@contextmanager
def _deploying(what: str) -> Iterator[None]:
    """Turn Serve's errors at a failed start (a port in use, a broken checkpoint) into ours."""
    try:
        with our_errors():
            yield
    except (RuntimeError, TimeoutError) as error:
        raise BackendFailedError(f"Ray Serve could not start {what}: {error}") from error
