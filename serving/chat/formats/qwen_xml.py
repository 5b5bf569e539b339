"""Qwen 3 Coder: `<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>`.

Values are plain text between line breaks. The tool's schema says which of them are not strings.
"""

import ast
import json
from collections.abc import Mapping
from typing import Any, ClassVar

from serving.chat.formats.tool_format import Tools, new_call_id
from serving.chat.source import (
    CallArguments,
    CallStart,
    Content,
    Source,
    Steps,
    num_pending,
    skip_optional,
    take_before,
    take_space,
    text_until,
)

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"


class QwenXml:
    """See the module."""

    tokens: ClassVar[tuple[str, ...]] = (OPEN, CLOSE)

    def suits(self, template: str) -> bool:
        """See `ToolFormat`."""
        return FUNCTION in template and PARAMETER in template

    def parse(self, source: Source, tools: Tools) -> Steps[None]:
        """See `ToolFormat`. Models sometimes leave out the outer tags."""
        while marker := (yield from text_until(source, (OPEN, FUNCTION))):
            if marker == OPEN and not (yield from skip_optional(source, FUNCTION)):
                yield Content(OPEN)
                continue
            name = yield from take_before(source, (">",))
            if not source.text:
                yield Content(FUNCTION + name)
                continue
            source.take(1)
            yield CallStart(name.strip())
            yield from _arguments(source, tools.get(name.strip(), {}))
            yield from skip_optional(source, CLOSE)
            yield from take_space(source)

    def new_id(self) -> str:
        """See `ToolFormat`."""
        return new_call_id()


def _arguments(source: Source, schema: Mapping[str, Any]) -> Steps[None]:
    """Yield the parameters as a JSON object. It stays open if the text ends before the function does."""
    opening = "{"
    while (yield from skip_optional(source, PARAMETER)):
        key = yield from take_before(source, (">",))
        if not source.text:
            return
        source.take(1)
        yield CallArguments(f"{opening}{json.dumps(key.strip(), ensure_ascii=False)}: ")
        opening = ", "
        kinds = kinds_of(schema.get("properties", {}).get(key.strip()), schema)
        yield from (_text(source) if kinds <= {"string"} else _value(source, kinds))
        if not (yield from skip_optional(source, END_PARAMETER)):
            return
    if (yield from skip_optional(source, END_FUNCTION)) or source.text.strip():
        yield CallArguments("{}" if opening == "{" else "}")


def _text(source: Source) -> Steps[None]:
    """Yield a string in pieces, without the line breaks beside the tags."""
    while not source.text and not source.is_complete:
        yield None
    source.text = source.text.removeprefix("\n")
    yield CallArguments('"')
    while END_PARAMETER not in source.text and not source.is_complete:
        num_held = num_pending(source.text, (END_PARAMETER,))
        if piece := source.take(len(source.text) - num_held):
            yield CallArguments(_escaped(piece))
        yield None
    is_closed = END_PARAMETER in source.text
    piece = yield from take_before(source, (END_PARAMETER,))
    yield CallArguments(_escaped(piece.removesuffix("\n")) + '"' if is_closed else _escaped(piece))


def _value(source: Source, kinds: frozenset[str]) -> Steps[None]:
    """Yield a value that is not a string, when it is complete."""
    text = yield from take_before(source, (END_PARAMETER,))
    if source.text:
        yield CallArguments(converted(text.removeprefix("\n").removesuffix("\n"), kinds))


def _escaped(piece: str) -> str:
    return json.dumps(piece, ensure_ascii=False)[1:-1]


def kinds_of(schema: Any, root: Mapping[str, Any]) -> frozenset[str]:
    """Return the JSON types that a schema allows; none if it does not say."""
    if not isinstance(schema, Mapping):
        return frozenset()
    reference = schema.get("$ref")
    if isinstance(reference, str):
        definitions = {**root.get("definitions", {}), **root.get("$defs", {})}
        schema = definitions.pop(reference.rsplit("/", 1)[-1], {})
        return kinds_of(schema, {"$defs": definitions})
    kind = schema.get("type", ())
    kinds = {kind} if isinstance(kind, str) else {one for one in kind if isinstance(one, str)}
    for key in ("anyOf", "oneOf", "allOf"):
        for one in schema.get(key, ()):
            kinds |= kinds_of(one, root)
    return frozenset(kinds)


def converted(text: str, kinds: frozenset[str]) -> str:
    """Return a value as JSON: as one of the kinds if the text spells one, else as a string."""
    word = text.strip()
    if "null" in kinds and word in ("null", "None"):
        return "null"
    if "string" in kinds:
        return json.dumps(text, ensure_ascii=False)
    if "boolean" in kinds and word.lower() in ("true", "false"):
        return word.lower()
    for read in (json.loads, ast.literal_eval):
        try:
            return json.dumps(read(word), ensure_ascii=False, allow_nan=False)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
    return json.dumps(text, ensure_ascii=False)
