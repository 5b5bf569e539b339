"""The fields of chat completions: content, reasoning and tool calls."""

from typing import Any, ClassVar

from serving.chat.answer import AnswerReader, CallPiece, Delta
from serving.engine.request import FinishReason
from serving.gateway.calls import Answer
from serving.http.choice import Choice
from serving.http.logprobs import chat_logprobs


class ChatShape:
    """The fields of /v1/chat/completions. A shape serves one answer: it reads each choice of a stream as it comes."""

    id_prefix: ClassVar[str] = "chatcmpl"
    whole_object: ClassVar[str] = "chat.completion"
    chunk_object: ClassVar[str] = "chat.completion.chunk"
    has_one_prompt: ClassVar[bool] = True

    def __init__(self, *, include_reasoning: bool):
        self._include_reasoning = include_reasoning
        self._readers: dict[int, AnswerReader] = {}

    def whole(self, choice: Choice, answer: Answer) -> dict[str, Any]:
        """See `Shape.whole`."""
        reader = AnswerReader(answer.format)
        delta = reader.push(choice.text, is_last=True)
        content = None if delta.calls and not delta.content else delta.content
        message = {"role": "assistant", "content": content, "refusal": None, **self._extras(delta)}
        for call in message.get("tool_calls", ()):
            del call["index"]
        logprobs = chat_logprobs(choice.logprobs, answer.prompter)
        return {"message": message, "logprobs": logprobs, "finish_reason": _reason(choice, reader)}

    def opening(self) -> dict[str, Any]:
        """Return the role, with which every chat starts."""
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def chunk(self, index: int, piece: Choice, answer: Answer) -> dict[str, Any] | None:
        """See `Shape.chunk`."""
        if index not in self._readers:
            self._readers[index] = AnswerReader(answer.format)
        reader = self._readers[index]
        read = reader.push(piece.text, is_last=piece.finish_reason is not None)
        delta = {**({"content": read.content} if read.content else {}), **self._extras(read)}
        if not delta and not piece.logprobs and piece.finish_reason is None:
            return None
        logprobs = chat_logprobs(piece.logprobs, answer.prompter)
        return {"delta": delta, "logprobs": logprobs, "finish_reason": _reason(piece, reader)}

    def _extras(self, delta: Delta) -> dict[str, Any]:
        extras: dict[str, Any] = {}
        if delta.reasoning and self._include_reasoning:
            extras["reasoning_content"] = delta.reasoning
        if delta.calls:
            extras["tool_calls"] = [_call(piece) for piece in delta.calls]
        return extras


def _call(piece: CallPiece) -> dict[str, Any]:
    """Return a piece of a call. Only the first piece has the call's id, type and name."""
    if piece.id is None:
        return {"index": piece.index, "function": {"arguments": piece.arguments}}
    function = {"name": piece.name, "arguments": piece.arguments}
    return {"index": piece.index, "id": piece.id, "type": "function", "function": function}


def _reason(choice: Choice, reader: AnswerReader) -> str | None:
    has_called = choice.finish_reason is FinishReason.STOP and reader.num_calls
    return "tool_calls" if has_called else choice.finish_reason
