"""Mistral: `[TOOL_CALLS][{"name": ..., "arguments": {...}}]`, or `[TOOL_CALLS]name[ARGS]{...}` for each call."""

import secrets
import string
from typing import ClassVar

from serving.chat.formats.tool_format import Tools
from serving.chat.json_call import json_calls, json_pieces
from serving.chat.source import (
    CallArguments,
    CallStart,
    Content,
    Source,
    Steps,
    peek,
    skip_optional,
    take_before,
    take_space,
    text_until,
)

OPEN = "[TOOL_CALLS]"
CALL_ID = "[CALL_ID]"
ARGUMENTS = "[ARGS]"
ID_CHARACTERS = string.ascii_letters + string.digits


class Mistral:
    """See the module."""

    tokens: ClassVar[tuple[str, ...]] = (OPEN, CALL_ID, ARGUMENTS)

    def suits(self, template: str) -> bool:
        """See `ToolFormat`."""
        return OPEN in template

    def parse(self, source: Source, tools: Tools) -> Steps[None]:
        """See `ToolFormat`."""
        while (yield from text_until(source, (OPEN,))):
            is_list = (yield from peek(source)) in ("[", "{")
            no_call = yield from (json_calls(source) if is_list else _named_call(source))
            if no_call:
                yield Content(OPEN + no_call)
            else:
                yield from take_space(source)

    def new_id(self) -> str:
        """Return nine letters and digits: Mistral's templates refuse other ids."""
        return "".join(secrets.choice(ID_CHARACTERS) for _ in range(9))


def _named_call(source: Source) -> Steps[str]:
    """Parse one call that begins with its name. Return the text that was taken if it is none."""
    name = yield from take_before(source, (CALL_ID, ARGUMENTS, "{"))
    if not source.text:
        return name
    id = None
    if (yield from skip_optional(source, CALL_ID)):
        id = yield from take_before(source, (ARGUMENTS, "{"))
    yield from skip_optional(source, ARGUMENTS)
    yield CallStart(name.strip(), id and id.strip())
    yield from take_space(source)
    for piece in json_pieces(source):
        yield None if piece is None else CallArguments(piece)
    return ""
