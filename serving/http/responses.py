"""The route for responses: the chat path in OpenAI's newer form, whole or as a stream of typed events."""

import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any
from uuid import uuid4

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.responses import JSONResponse, Response

from cluster.errors import ReloraError
from serving.chat.answer import AnswerReader
from serving.engine.request import FinishReason
from serving.gateway.calls import Answer, Part
from serving.http.app_state import gateway_of, metrics_of
from serving.http.bodies.chat import ChatBody
from serving.http.bodies.responses import ResponseBody
from serving.http.generation import CLIENT_GONE, EventStream, tenant_of, unless_gone
from serving.http.output_items import Event, OutputWriter
from serving.http.replies import sse

# The fields of chats that have another name here.
FIELD_NAMES: dict[int | str, int | str] = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
router = APIRouter()


@router.post("/v1/responses")
async def create_response(body: ResponseBody, request: HttpRequest) -> Response:
    """Answer OpenAI's responses: text, reasoning and function calls."""
    started_at = time.monotonic()
    call = _chat(body).call(f"resp_{uuid4().hex}", tenant_of(request))
    answer = await unless_gone(request, gateway_of(request).answer(call, whole=not body.stream))
    if answer is None:
        return Response(status_code=CLIENT_GONE)
    base = request.state.base = answer.target.base
    headers = {"x-relora-version": answer.target.label, "x-relora-base": base}
    reply = ResponseReply(call.id, body, answer)
    if body.stream:
        first_token_s = metrics_of(request).first_token_s.labels(base, request.scope["route"].path)
        first_token_s.observe(time.monotonic() - started_at)
        return EventStream(answer, _stream(request, answer, reply), headers)
    return JSONResponse(_whole(request, answer, reply), headers=headers)


class ResponseReply:
    """Writes one answer as a response, and the events of its stream."""

    def __init__(self, id: str, body: ResponseBody, answer: Answer):
        self._id = id
        self._body = body
        self._answer = answer
        self._created_at = time.time()
        self._reader = AnswerReader(answer.format)
        self._output = OutputWriter()
        self._finish_reason: FinishReason | None = None
        self.num_output_tokens = 0

    def push(self, part: Part) -> Iterator[Event]:
        """Add a part of the answer."""
        _, event = part
        self.num_output_tokens += len(event.tokens)
        self._finish_reason = event.finish_reason
        is_last = event.finish_reason is not None
        yield from self._output.push(self._reader.push(event.text, is_last=is_last))
        if is_last:
            yield from self._output.close(is_cut=event.finish_reason is FinishReason.LENGTH)

    def response(self, error: ReloraError | None = None) -> dict[str, Any]:
        """Return the response object as it is now."""
        body = self._body
        is_cut = self._finish_reason is FinishReason.LENGTH
        is_done = self._finish_reason is not None
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created_at,
            "status": "failed" if error else "incomplete" if is_cut else "completed" if is_done else "in_progress",
            "error": {"code": "server_error", "message": str(error)} if error else None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata,
            "model": self._answer.target.label,
            "output": self._output.items if is_done or error else [],
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort, "summary": None},
            "store": body.store,
            "temperature": body.temperature,
            "text": body.text.model_dump(exclude_none=True),
            "tool_choice": body.tool_choice,
            "tools": [{"strict": None, "parameters": None, **tool.model_dump()} for tool in body.tools],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": self._usage() if is_done else None,
        }

    def _usage(self) -> dict[str, Any]:
        """Return the token counts. This server does not say how many input tokens came from its prefix cache."""
        num_input, num_output = self._answer.num_prompt_tokens, self.num_output_tokens
        num_reasoning = self._answer.prompter.num_text_tokens(self._output.reasoning)
        return {
            "input_tokens": num_input,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": num_output,
            "output_tokens_details": {"reasoning_tokens": num_reasoning},
            "total_tokens": num_input + num_output,
        }


def _whole(request: HttpRequest, answer: Answer, reply: ResponseReply) -> dict[str, Any]:
    for part in answer.head:
        for _ in reply.push(part):
            pass  # nobody wants the events
    metrics_of(request).count_tokens(answer.target.base, answer.num_prompt_tokens, reply.num_output_tokens)
    return reply.response()


async def _stream(request: HttpRequest, answer: Answer, reply: ResponseReply) -> AsyncGenerator[bytes, None]:
    number = 0

    def numbered(event: Event) -> bytes:
        nonlocal number
        number += 1
        return f"event: {event['type']}\n".encode() + sse({**event, "sequence_number": number - 1})

    try:
        for kind in ("created", "in_progress"):
            yield numbered({"type": f"response.{kind}", "response": reply.response()})
        for part in answer.head:
            for event in reply.push(part):
                yield numbered(event)
        async for part in answer.rest:
            for event in reply.push(part):
                yield numbered(event)
        response = reply.response()
    except ReloraError as error:  # the status is sent already, so the client gets the error as an event
        response = reply.response(error)
    finally:
        metrics_of(request).count_tokens(answer.target.base, answer.num_prompt_tokens, reply.num_output_tokens)
    yield numbered({"type": f"response.{response['status']}", "response": response})


def _chat(body: ResponseBody) -> ChatBody:
    """Return the chat that a response asks for. Errors name the fields of the response."""
    try:
        return ChatBody.model_validate(body.chat_fields())
    except ValidationError as error:
        faults = [{**fault, "loc": _renamed(fault["loc"])} for fault in error.errors()]
        raise RequestValidationError(faults) from error


def _renamed(path: tuple[int | str, ...]) -> tuple[int | str, ...]:
    return (*map(FIELD_NAMES.get, path[:1], path[:1]), *path[1:])
