"""Calls that a request forces: a grammar makes the answer `[{"name": ..., "arguments": {...}}, ...]`, for any model."""

from dataclasses import dataclass
from typing import ClassVar

from serving.chat.formats.tool_format import ToolFormat, Tools, new_call_id
from serving.chat.json_call import json_calls
from serving.chat.source import Content, Source, Steps
from serving.engine.grammar import Grammar, function_calls


@dataclass(frozen=True)
class JsonList:
    """See the module. `own` is the model's own format, whose ids its template knows."""

    own: ToolFormat | None = None
    tokens: ClassVar[tuple[str, ...]] = ()

    def suits(self, template: str) -> bool:
        """Return False: no model writes this by itself."""
        return False

    def parse(self, source: Source, tools: Tools) -> Steps[None]:
        """See `ToolFormat`."""
        no_call = yield from json_calls(source)
        if no_call:  # the answer ended before the first call had a name
            yield Content(no_call)

    def new_id(self) -> str:
        """See `ToolFormat`."""
        return new_call_id() if self.own is None else self.own.new_id()


def forced_calls(tools: Tools, *, is_single: bool) -> Grammar:
    """Return the grammar of one call of the tools, or of one or more."""
    return function_calls(tools, around=("[", "]"), separator=None if is_single else ", ")
