"""The engines of a Ray Serve instance as backends of the gateway, and the translation of Ray's errors."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ray import serve
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayError, RayTaskError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from cluster.errors import OverloadedError, ReloraError
from cluster.names import flat_name, unflat_name
from serving.adapters.residency import Residency
from serving.engine.request import Request, TokenStream
from serving.errors import BackendDiedError, BackendFailedError
from serving.gateway.backend import Backend

ENGINE_PREFIX = "engine-"
_GONE = (RayActorError, WorkerCrashedError, ObjectLostError, DeploymentUnavailableError, GetTimeoutError)


class HandleBackend:
    """An engine behind a Serve handle. Serve picks the replica: of two, the one with the shorter queue.

    Serve's multiplexing could prefer replicas that hold the adapter. It is not used, because it loads one adapter at a
    time per replica and makes each adapter's name a metric label.
    """

    def __init__(self, handle: DeploymentHandle):
        self._handle = handle
        self._streaming: DeploymentHandle | None = None

    async def generate(self, request: Request) -> TokenStream:
        """See `Backend.generate`."""
        with our_errors():
            if self._streaming is None:  # not in __init__: Serve may bind a handle to the event loop that uses it first
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
        with our_errors():
            replicas = await self._handle.broadcast(method, *arguments).results_async()
        if not replicas:
            raise BackendDiedError("No replica of the engine is running.")
        return replicas


class ServeBackends:
    """Finds the engine applications of this Serve instance. Keeps their handles, which are slow to make."""

    def __init__(self) -> None:
        self._known: dict[str, HandleBackend] = {}

    def running(self) -> Mapping[str, Backend]:
        """Return the engines by base. An engine that was running and now restarts is included."""
        gone = (ApplicationStatus.DELETING, ApplicationStatus.DEPLOY_FAILED)
        with our_errors():
            apps = serve.status().applications
            alive = {
                unflat_name(name.removeprefix(ENGINE_PREFIX)): app
                for name, app in apps.items()
                if name.startswith(ENGINE_PREFIX) and app.status not in gone
            }
            for base, app in alive.items():
                if app.status is ApplicationStatus.RUNNING and base not in self._known:
                    self._known[base] = HandleBackend(serve.get_app_handle(ENGINE_PREFIX + flat_name(base)))
        self._known = {base: backend for base, backend in self._known.items() if base in alive}
        return self._known


@contextmanager
def our_errors() -> Iterator[None]:
    """Turn Ray's errors into ours."""
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
