"""Turns an answer's text into content, reasoning and tool calls, while it comes."""

from collections.abc import Collection, Generator
from dataclasses import dataclass, field, replace

from serving.chat.declared import DeclaredFormat
from serving.chat.formats.tool_format import ToolFormat, Tools, new_call_id
from serving.chat.source import (
    CallArguments,
    CallStart,
    Content,
    Event,
    Reasoning,
    Source,
    Steps,
    first_marker,
    num_pending,
    text_until,
)
from serving.chat.thinking import Thinking


@dataclass(frozen=True)
class CallPiece:
    """A tool call, or a piece of one. The first piece of a call has its id and its name."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True)
class Delta:
    """What a piece of text adds to an answer, with at most one piece of each call."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[CallPiece, ...] = ()


@dataclass(frozen=True)
class AnswerFormat:
    """How to read the answers to one chat.

    `format` is None if the answer can have no calls, and `thinking` None if the model does not think. `declared`
    replaces both. `hidden` are the special tokens that clients should not see.
    """

    format: ToolFormat | None = None
    thinking: Thinking | None = None
    is_thinking_open: bool = False
    tools: Tools = field(default_factory=dict)
    max_calls: int | None = None
    hidden: Collection[str] = ()
    declared: DeclaredFormat | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the text is the content."""
        return self.format is None and self.thinking is None and self.declared is None and not self.hidden

    @property
    def needs_special_tokens(self) -> bool:
        """Whether special tokens must be part of the text."""
        return bool(self.hidden) or self.declared is not None

    def parse(self, source: Source) -> Steps[None]:
        """Yield the events of the answer."""
        if self.declared is not None:
            yield from self.declared.parse(source)
            return
        if self.thinking is not None:
            yield from self.thinking.parse(source, is_open=self.is_thinking_open)
        if self.format is None:
            yield from text_until(source, ())
        else:
            yield from self.format.parse(source, self.tools)

    def new_id(self) -> str:
        """Return an id for a call."""
        return new_call_id() if self.format is None else self.format.new_id()


class AnswerReader:
    """Reads one answer. All deltas together are the same, wherever the borders between pieces of text fall."""

    def __init__(self, format: AnswerFormat):
        self._format = format
        self._source = Source()
        self._steps: Generator[Event | None, None, None] = format.parse(self._source)
        self._hidden = tuple(format.hidden)
        self._unfiltered = ""
        self._num_started = 0

    @property
    def num_calls(self) -> int:
        """The number of calls so far."""
        limit = self._format.max_calls
        return self._num_started if limit is None else min(self._num_started, limit)

    def push(self, text: str, *, is_last: bool = False) -> Delta:
        """Take a piece of the text and return what it adds. The last piece brings all that was held back."""
        if self._format.is_plain:
            return Delta(content=text)
        self._source.text += self._filtered(text) if self._hidden else text
        if is_last:
            self._source.text += self._unfiltered
            self._source.is_complete = True
        return self._read()

    def _read(self) -> Delta:
        content: list[str] = []
        reasoning: list[str] = []
        calls: dict[int, CallPiece] = {}
        for event in self._steps:
            match event:
                case None:
                    break
                case Content(text):
                    content.append(text)
                case Reasoning(text):
                    reasoning.append(text)
                case CallStart(name, id):
                    self._num_started += 1
                    calls[self._num_started - 1] = CallPiece(self._num_started - 1, id or self._format.new_id(), name)
                case CallArguments(text):
                    piece = calls.get(self._num_started - 1, CallPiece(self._num_started - 1))
                    calls[piece.index] = replace(piece, arguments=piece.arguments + text)
        shown = tuple(piece for piece in calls.values() if piece.index < self.num_calls)
        return Delta("".join(content), "".join(reasoning), shown)

    def _filtered(self, text: str) -> str:
        """Return the text without hidden tokens. The beginning of one is held back."""
        text, shown = self._unfiltered + text, ""
        while (token := first_marker(text, self._hidden)) is not None:
            before, _, text = text.partition(token)
            shown += before
        num_held = num_pending(text, self._hidden)
        self._unfiltered = text[len(text) - num_held :]
        return shown + text[: len(text) - num_held]
