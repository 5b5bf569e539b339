"""The routes that generate text: completions and chat completions, whole or streamed.

When a client disconnects, at any time, its requests are aborted in the engine at once.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine
from hashlib import blake2b
from typing import Any, TypeVar
from uuid import uuid4

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from cluster.errors import ReloraError
from serving.errors import error_body, http_error
from serving.gateway.calls import Answer
from serving.http.app_state import gateway_of, metrics_of
from serving.http.bodies.chat import ChatBody
from serving.http.bodies.completions import CompletionBody
from serving.http.chat_shape import ChatShape
from serving.http.replies import CompletionShape, Reply, Shape, sse

Result = TypeVar("Result")

CLIENT_GONE = 499  # nginx's status for a client that disconnected; nobody receives it, but metrics count it
router = APIRouter()


@router.post("/v1/completions")
async def completions(body: CompletionBody, request: HttpRequest) -> Response:
    """Answer OpenAI's completions."""
    return await _generate(body, request, CompletionShape())


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatBody, request: HttpRequest) -> Response:
    """Answer OpenAI's chat completions, if the base model's tokenizer has a chat template."""
    return await _generate(body, request, ChatShape(include_reasoning=body.include_reasoning))


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
    call = body.call(f"{shape.id_prefix}-{uuid4().hex}", tenant_of(request))
    answer = await unless_gone(request, gateway_of(request).answer(call, whole=not body.stream))
    if answer is None:
        return Response(status_code=CLIENT_GONE)
    base = request.state.base = answer.target.base
    headers = {"x-relora-version": answer.target.label, "x-relora-base": base}
    reply = Reply(call.id, answer, shape, body.stream_options)
    if body.stream:
        first_token_s = metrics_of(request).first_token_s.labels(base, request.scope["route"].path)
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


async def unless_gone(request: HttpRequest, work: Coroutine[Any, Any, Result]) -> Result | None:
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
    metrics_of(request).count_tokens(base, usage["prompt_tokens"], usage["completion_tokens"])


def tenant_of(request: HttpRequest) -> str:
    """Return a hash of the API key, or "" without one. OpenAI's rate limits are per key too."""
    key = request.headers.get("authorization", "")
    return blake2b(key.encode(), digest_size=8).hexdigest() if key else ""
