"""Reads answers as the tokenizer declares: by its `response_template`, with transformers' own parser."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serving.chat.source import CallArguments, CallStart, Content, Event, Reasoning, Source, Steps, text_until

_REASONING = ("reasoning_content", "reasoning", "thinking")
# Errors of the parser for a region that the model did not write as declared.
_BAD_REGION = (ValueError, LookupError, TypeError)


@dataclass(frozen=True)
class DeclaredFormat:
    """A tokenizer's `response_template`, and the prompt and the tools that its parser must know."""

    template: Mapping[str, Any]
    prompt: str
    tools: Sequence[Mapping[str, Any]] = ()

    def parse(self, source: Source) -> Steps[None]:
        """Yield the events of the answer. A call comes when it is complete.

        The parser gets one character at a time, so that the events do not depend on the pieces. From a region that is
        not as declared on, the text is content.
        """
        from transformers.utils.chat_parsing import ResponseParser

        parser = ResponseParser(dict(self.template), prefix=self.prompt, tools=list(self.tools))
        regions = _Regions()
        try:
            while source.text or not source.is_complete:
                if not source.text:
                    yield None
                    continue
                yield from regions.read(parser.feed(source.take(1)))
            yield from regions.read(parser.finalize()[1])
        except _BAD_REGION:
            yield Content(regions.unread)
            yield from text_until(source, ())


class _Regions:
    """Turns the parser's events into ours. Spaces around the text of a region are dropped, as the parser does."""

    def __init__(self) -> None:
        self.unread = ""  # the text of a call that is not complete, or spaces that may end a region
        self._has_text = False

    def read(self, found: Sequence[Mapping[str, Any]]) -> Iterator[Event]:
        """Yield our events for the parser's."""
        for event in found:
            if event["type"] == "region_chunk":
                yield from self._text(event["field"], event["text"])
            else:
                self.unread = ""
                self._has_text = False
                if event["type"] == "region_close" and event["field"] == "tool_calls":
                    yield from _calls(event["value"])

    def _text(self, field: str, text: str) -> Iterator[Event]:
        self.unread += text
        if field != "content" and field not in _REASONING:
            return
        kept = self.unread.rstrip() if self._has_text else self.unread.strip()
        if kept:
            self._has_text = True
            self.unread = self.unread[len(self.unread.rstrip()) :]
            yield Content(kept) if field == "content" else Reasoning(kept)


def _calls(value: Any) -> Iterator[Event]:
    for call in value if isinstance(value, list) else [value]:
        function = call["function"]
        arguments = function.get("arguments", {})
        yield CallStart(function["name"], call.get("id"))
        yield CallArguments(arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))
