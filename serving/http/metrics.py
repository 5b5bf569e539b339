"""The metrics for Prometheus.

Labels are base, route, status, token kind and gauge name, so their number is bounded. Adapters and clients never become
labels.
"""

import time
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The counters of one gateway process, in their own collector registry."""

    def __init__(self) -> None:
        self._collectors = CollectorRegistry()
        self.requests = self._counter("requests", "Requests answered.", ("base", "route", "status"))
        self.tokens = self._counter("tokens", "Tokens of prompts and answers.", ("base", "kind"))
        self.latency_s = self._histogram("request_seconds", "From the request to the end of its answer.")
        self.first_token_s = self._histogram("first_token_seconds", "From the request to its first token, of streams.")
        self._engines = Gauge("relora_engine", "Gauges of the engines.", ("base", "gauge"), registry=self._collectors)

    def count_tokens(self, base: str, num_prompt_tokens: int, num_answer_tokens: int) -> None:
        """Count the tokens of one answer."""
        self.tokens.labels(base, "prompt").inc(num_prompt_tokens)
        self.tokens.labels(base, "completion").inc(num_answer_tokens)

    def text(self, stats: Mapping[str, Mapping[str, float]]) -> bytes:
        """Return all metrics in Prometheus' text format. `stats` are the engines' current gauges by base."""
        self._engines.clear()
        for base, gauges in stats.items():
            for gauge, value in gauges.items():
                self._engines.labels(base, gauge).set(value)
        return generate_latest(self._collectors)

    def _counter(self, name: str, help: str, labels: Iterable[str]) -> Counter:
        return Counter(f"relora_{name}", help, tuple(labels), registry=self._collectors)

    def _histogram(self, name: str, help: str) -> Histogram:
        labels = ("base", "route")
        return Histogram(f"relora_{name}", help, labels, registry=self._collectors, buckets=LATENCY_BUCKETS_S)


class MetricsMiddleware:
    """Counts and times every HTTP request, a stream until its end. Handlers may set `request.state.base`."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on and count it. Without a status it counts as 499 (client gone) or, if it raised, as 500."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_at = time.monotonic()
        status = 499

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except Exception:
            status = 500 if status == 499 else status
            raise
        finally:
            self._count(scope, status, time.monotonic() - started_at)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        base = scope.get("state", {}).get("base", "")
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.requests.labels(base, route, status).inc()
        self._metrics.latency_s.labels(base, route).observe(seconds)
