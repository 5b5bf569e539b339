"""The routes for those who run the service: health and metrics."""

from contextlib import suppress

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from cluster.errors import ReloraError
from serving.http.app_state import gateway_of, metrics_of

router = APIRouter()


@router.get("/health")
async def health(request: HttpRequest) -> Response:
    """Return 200 if the registry and the engines that live versions need answer; otherwise 503 with the cause."""
    await gateway_of(request).check_health()
    return JSONResponse({"status": "ok"})


@router.get("/metrics")
async def metrics(request: HttpRequest) -> Response:
    """Return the metrics in Prometheus' text format."""
    gateway = gateway_of(request)
    stats: dict[str, dict[str, float]] = {}
    for base in sorted(gateway.snapshot.backends):
        with suppress(ReloraError):
            stats[base] = await gateway.stats(base)
    return Response(metrics_of(request).text(stats), media_type="text/plain; version=0.0.4; charset=utf-8")
