"""The HTTP routes over a gateway: OpenAI's, and vLLM's two for loading and unloading adapters.

Handlers only translate. When a client disconnects, at any time, its requests are aborted in the engine at once.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from hashlib import blake2b
from typing import Any, TypeVar
from uuid import uuid4

from fastapi import APIRouter, FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from cluster.errors import InvalidRequestError, ReloraError
from serving.adapters.residency import Residency
from serving.errors import HTTP_ERRORS, HttpError, error_body, error_headers, http_error
from serving.gateway.gateway import Answer, Gateway
from serving.gateway.routing import Target, residencies
from serving.http.metrics import Metrics, MetricsMiddleware
from serving.http.replies import ChatShape, CompletionShape, Reply, Shape, sse
from serving.http.schemas import ChatBody, CompletionBody, LoadAdapterBody, UnloadAdapterBody

Result = TypeVar("Result")

CLIENT_GONE = 499  # nginx's status for a client that disconnected; nobody receives it, but metrics count it
router = APIRouter()


def create_app(gateway: Gateway) -> FastAPI:
    """Return the application over a gateway. It starts and stops the gateway with itself."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await gateway.start()
        yield
        await gateway.stop()

    app = FastAPI(title="ReLoRA", lifespan=lifespan)
    app.state.gateway = gateway
    app.state.metrics = Metrics()
    app.add_middleware(MetricsMiddleware, metrics=app.state.metrics)
    app.add_exception_handler(ReloraError, _on_relora_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_body)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_bug)
    app.include_router(router)
    return app


@router.post("/v1/completions")
async def completions(body: CompletionBody, request: HttpRequest) -> Response:
    """Answer OpenAI's completions."""
    return await _generate(body, request, CompletionShape())


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatBody, request: HttpRequest) -> Response:
    """Answer OpenAI's chat completions, if the base model's tokenizer has a chat template."""
    return await _generate(body, request, ChatShape())


@router.get("/v1/models")
async def models(request: HttpRequest) -> Response:
    """List the served base models, and the adapters with their live versions."""
    gateway = _gateway(request)
    return JSONResponse({"object": "list", "data": [_model(gateway, target) for target in gateway.snapshot.models()]})


@router.get("/v1/models/{name}")
async def model(name: str, request: HttpRequest) -> Response:
    """Return one entry of the list of models."""
    gateway = _gateway(request)
    for target in gateway.snapshot.models():
        if name in (_id(target), target.label):
            return JSONResponse(_model(gateway, target))
    raise HTTPException(404, f"The model {name!r} does not exist.")


@router.get("/v1/adapters")
async def adapters(request: HttpRequest) -> Response:
    """List live versions and canaries: where their weights are, their size, and how often they are used."""
    known = await residencies(_gateway(request).snapshot)
    return JSONResponse({"object": "list", "data": [_adapter(target, where) for target, where in known]})


@router.post("/v1/load_lora_adapter")
async def load_lora_adapter(body: LoadAdapterBody, request: HttpRequest) -> Response:
    """Make an adapter's files the live version of its name."""
    version = await _gateway(request).load_adapter(body.lora_name, body.lora_path, body.base_model_name)
    return JSONResponse({"status": "loaded", "model": version.label, "base": version.base})


@router.post("/v1/unload_lora_adapter")
async def unload_lora_adapter(body: UnloadAdapterBody, request: HttpRequest) -> Response:
    """Stop serving an adapter; requests in progress finish."""
    version = await _gateway(request).unload_adapter(body.lora_name)
    return JSONResponse({"status": "unloaded", "model": version.label, "base": version.base})


@router.get("/health")
async def health(request: HttpRequest) -> Response:
    """Return 200 if the registry and the engines that live versions need answer; otherwise 503 with the cause."""
    await _gateway(request).check_health()
    return JSONResponse({"status": "ok"})


@router.get("/metrics")
async def metrics(request: HttpRequest) -> Response:
    """Return the metrics in Prometheus' text format."""
    gateway = _gateway(request)
    stats: dict[str, dict[str, float]] = {}
    for base in sorted(gateway.snapshot.backends):
        with suppress(ReloraError):
            stats[base] = await gateway.stats(base)
    return Response(request.app.state.metrics.text(stats), media_type="text/plain; version=0.0.4; charset=utf-8")


class EventStream(StreamingResponse):
    """Sends an answer as server-sent events, and closes the answer whenever and however the response ends."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, events: AsyncGenerator[bytes, None], headers: dict[str, str]):
        super().__init__(events, headers=headers)
        self._answer = answer
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the client disconnects."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            await self._answer.rest.aclose()


async def _generate(body: CompletionBody | ChatBody, request: HttpRequest, shape: Shape) -> Response:
    started_at = time.monotonic()
    call = body.call(f"{shape.id_prefix}-{uuid4().hex}", _tenant(request))
    answer = await _unless_gone(request, _gateway(request).answer(call, whole=not body.stream))
    if answer is None:
        return Response(status_code=CLIENT_GONE)
    base = request.state.base = answer.target.base
    headers = {"x-relora-version": answer.target.label, "x-relora-base": base}
    reply = Reply(call.id, answer, shape, include_usage=body.stream_options.include_usage)
    if body.stream:
        first_token_s = request.app.state.metrics.first_token_s.labels(base, request.scope["route"].path)
        first_token_s.observe(time.monotonic() - started_at)
        return EventStream(answer, _events(request, answer, reply), headers)
    content = reply.whole()
    _count_tokens(request, base, reply)
    return JSONResponse(content, headers=headers)


async def _events(request: HttpRequest, answer: Answer, reply: Reply) -> AsyncGenerator[bytes, None]:
    try:
        for part in answer.head:
            for chunk in reply.chunks(part):
                yield sse(chunk)
        async for part in answer.rest:
            for chunk in reply.chunks(part):
                yield sse(chunk)
        for chunk in reply.last_chunks():
            yield sse(chunk)
    except ReloraError as error:  # the status is sent already, so the client gets the error as an event
        yield sse(error_body(str(error), http_error(error)))
    finally:
        _count_tokens(request, answer.target.base, reply)
    yield sse("[DONE]")


async def _unless_gone(request: HttpRequest, work: Coroutine[Any, Any, Result]) -> Result | None:
    """Return the work's result. If the client disconnects first, cancel the work and return None."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_client_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _client_gone(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _count_tokens(request: HttpRequest, base: str, reply: Reply) -> None:
    usage = reply.usage()
    tokens = request.app.state.metrics.tokens
    tokens.labels(base, "prompt").inc(usage["prompt_tokens"])
    tokens.labels(base, "completion").inc(usage["completion_tokens"])


def _tenant(request: HttpRequest) -> str:
    """Return a hash of the API key, or "" without one. OpenAI's rate limits are per key too."""
    key = request.headers.get("authorization", "")
    return blake2b(key.encode(), digest_size=8).hexdigest() if key else ""


def _gateway(request: HttpRequest) -> Gateway:
    return request.app.state.gateway


def _id(target: Target) -> str:
    return target.version.adapter if target.version else target.base


def _model(gateway: Gateway, target: Target) -> dict[str, Any]:
    created_at = target.version.created_at if target.version else gateway.snapshot.bases[target.base].created_at
    return {
        "id": _id(target),
        "object": "model",
        "created": int(created_at),
        "owned_by": "relora",
        "root": target.base,
        "parent": target.base if target.version else None,
        "version": target.label if target.version else None,
    }


def _adapter(target: Target, where: Residency) -> dict[str, Any]:
    assert target.version is not None, "only adapters have residencies"
    return {
        "id": target.version.adapter,
        "object": "adapter",
        "version": target.label,
        "status": target.version.status.value,
        "base": target.base,
        "tier": where.tier.value,
        "bytes": where.num_bytes,
        "hits": where.num_hits,
        "running": where.num_running,
        "load_s": round(where.load_s, 6),
    }


async def _on_relora_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ReloraError)
    http = http_error(error)
    return JSONResponse(error_body(str(error), http), http.status, headers=error_headers(error, http))


async def _on_invalid_body(request: HttpRequest, error: Exception) -> Response:
    """Name the first invalid field, as OpenAI does. A field that this server does not support is invalid."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] in ("json_invalid", "model_attributes_type"):  # there is no field to name
        message = "The body must be a JSON object, sent with content-type: application/json."
        return JSONResponse(error_body(message, HTTP_ERRORS[InvalidRequestError]), 400)
    param = ".".join(str(step) for step in first["loc"] if step != "body")
    reason = "this server does not support it" if first["type"] == "extra_forbidden" else first["msg"]
    reason = reason.removeprefix("Value error, ")
    message = f"{param}: {reason}" if param else reason
    return JSONResponse(error_body(message, HTTP_ERRORS[InvalidRequestError], param or None), 400)


async def _on_http_exception(request: HttpRequest, error: Exception) -> Response:
    """Handle Starlette's own errors, such as an unknown path or a wrong method."""
    assert isinstance(error, HTTPException)
    http = HttpError(error.status_code, "invalid_request_error", "not_found" if error.status_code == 404 else "http")
    return JSONResponse(error_body(str(error.detail), http), http.status, headers=error.headers)


async def _on_bug(request: HttpRequest, error: Exception) -> Response:
    """Handle an untyped error, which is our bug. Its text stays in the server's log."""
    return JSONResponse(error_body("Internal server error.", HTTP_ERRORS[ReloraError]), 500)
