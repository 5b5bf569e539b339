"""Hermes, Qwen 2.5 and Qwen 3: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, a pair of tags per call."""

from typing import ClassVar

from serving.chat.formats.tool_format import Tools, new_call_id
from serving.chat.json_call import json_call
from serving.chat.source import Content, Source, Steps, peek, skip_optional, take_space, text_until

OPEN = "<tool_call>"
CLOSE = "</tool_call>"


class Hermes:
    """See the module."""

    tokens: ClassVar[tuple[str, ...]] = (OPEN, CLOSE)

    def suits(self, template: str) -> bool:
        """See `ToolFormat`."""
        return OPEN in template

    def parse(self, source: Source, tools: Tools) -> Steps[None]:
        """See `ToolFormat`. Several objects between one pair of tags are several calls."""
        while (yield from text_until(source, (OPEN,))):
            no_call = yield from json_call(source)
            if no_call is not None:
                yield Content(OPEN + no_call)
                continue
            while (yield from peek(source)) == "{" and (yield from json_call(source)) is None:
                pass
            yield from skip_optional(source, CLOSE)
            yield from take_space(source)

    def new_id(self) -> str:
        """See `ToolFormat`."""
        return new_call_id()
