"""The output of a response: reasoning, messages and function calls, and the events that tell how they grow."""

from collections.abc import Iterator
from typing import Any
from uuid import uuid4

from serving.chat.answer import CallPiece, Delta

Event = dict[str, Any]


class OutputWriter:
    """Turns an answer's deltas into output items. Only the last of `items` grows.

    Each method yields events of OpenAI's streams, without their sequence numbers.
    """

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._is_open = False

    def push(self, delta: Delta) -> Iterator[Event]:
        """Add what a delta brings."""
        if delta.reasoning:
            yield from self._grow("reasoning", delta.reasoning)
        if delta.content:
            yield from self._grow("message", delta.content)
        for piece in delta.calls:
            yield from self._call(piece)

    def close(self, *, is_cut: bool) -> Iterator[Event]:
        """End the last item. `is_cut` says that the answer reached its token limit."""
        if self._is_open:
            yield from self._end("incomplete" if is_cut else "completed")

    @property
    def reasoning(self) -> str:
        """The text of all reasoning."""
        return "".join(item["content"][0]["text"] for item in self.items if item["type"] == "reasoning")

    def _grow(self, kind: str, text: str) -> Iterator[Event]:
        if not self._is_open or self.items[-1]["type"] != kind:
            yield from self._start(kind)
        self.items[-1]["content"][0]["text"] += text
        if kind == "reasoning":
            yield self._event("reasoning_text.delta", content_index=0, delta=text)
        else:
            yield self._event("output_text.delta", content_index=0, delta=text, logprobs=[])

    def _start(self, kind: str) -> Iterator[Event]:
        """Open a reasoning item or a message, with its one part of text."""
        part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
        item: dict[str, Any] = {"id": f"rs_{uuid4().hex}", "type": "reasoning", "summary": [], "content": []}
        if kind == "message":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item = {"id": f"msg_{uuid4().hex}", "type": "message", "role": "assistant", "content": []}
        yield from self._open(item)
        yield self._event("content_part.added", content_index=0, part=dict(part))
        self.items[-1]["content"].append(part)

    def _call(self, piece: CallPiece) -> Iterator[Event]:
        if piece.id is not None:
            call = {"call_id": piece.id, "name": piece.name, "arguments": ""}
            yield from self._open({"id": f"fc_{uuid4().hex}", "type": "function_call", **call})
        if piece.arguments:
            self.items[-1]["arguments"] += piece.arguments
            yield self._event("function_call_arguments.delta", delta=piece.arguments)

    def _open(self, item: dict[str, Any]) -> Iterator[Event]:
        yield from self.close(is_cut=False)
        self.items.append({**item, "status": "in_progress"})
        self._is_open = True
        yield {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": _copy(self.items[-1])}

    def _end(self, status: str) -> Iterator[Event]:
        item = self.items[-1]
        item["status"] = status
        if item["type"] == "function_call":
            yield self._event("function_call_arguments.done", name=item["name"], arguments=item["arguments"])
        else:
            part = item["content"][0]
            more: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
            yield self._event(f"{part['type']}.done", content_index=0, text=part["text"], **more)
            yield self._event("content_part.done", content_index=0, part=dict(part))
        self._is_open = False
        yield {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": _copy(item)}

    def _event(self, kind: str, **fields: Any) -> Event:
        """Return an event about the last item."""
        index = len(self.items) - 1
        return {"type": f"response.{kind}", "item_id": self.items[index]["id"], "output_index": index, **fields}


def _copy(item: dict[str, Any]) -> dict[str, Any]:
    """Return an item as it is now: its content grows later."""
    return {key: [dict(part) for part in value] if isinstance(value, list) else value for key, value in item.items()}
