"""What the routes of one application share: its gateway and its metrics."""

from fastapi import Request as HttpRequest

from serving.gateway.gateway import Gateway
from serving.http.metrics import Metrics


def gateway_of(request: HttpRequest) -> Gateway:
    """Return the application's gateway."""
    return request.app.state.gateway


def metrics_of(request: HttpRequest) -> Metrics:
    """Return the application's metrics."""
    return request.app.state.metrics
