"""The routes for those who run the service: health, load, version and metrics."""

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from cluster.errors import ReloraError
from serving.gateway.gateway import Gateway
from serving.http.app_state import gateway_of, metrics_of

router = APIRouter()


@router.get("/health")
async def health(request: HttpRequest) -> Response:
    """Return 200 if the registry and the engines that live versions need answer; otherwise 503 with the cause."""
    await gateway_of(request).check_health()
    return JSONResponse({"status": "ok"})


@router.get("/ping")
@router.post("/ping")
async def ping(request: HttpRequest) -> Response:
    """Answer as /health does, under the path that SageMaker asks."""
    return await health(request)


@router.get("/version")
async def show_version() -> Response:
    """Return the version of this server."""
    return JSONResponse({"version": relora_version()})


@router.get("/load")
async def load(request: HttpRequest) -> Response:
    """Return how many sequences run or wait on the engines of all bases. A choice of a request is one sequence."""
    stats = await _stats(gateway_of(request))
    return JSONResponse({"server_load": int(sum(one["running"] + one["waiting"] for one in stats.values()))})


@router.get("/metrics")
async def metrics(request: HttpRequest) -> Response:
    """Return the metrics in Prometheus' text format."""
    stats = await _stats(gateway_of(request))
    return Response(metrics_of(request).text(stats), media_type="text/plain; version=0.0.4; charset=utf-8")


def relora_version() -> str:
    """Return the version of the installed package, or "unknown" if this is a checkout that is not installed."""
    with suppress(PackageNotFoundError):
        return version("relora")
    return "unknown"


async def _stats(gateway: Gateway) -> dict[str, dict[str, float]]:
    """Return the gauges of the engines that answer, by base."""
    stats = {}
    for base in sorted(gateway.snapshot.backends):
        with suppress(ReloraError):
            stats[base] = await gateway.stats(base)
    return stats
