"""Llama 4, LFM 2 and others: the answer is a list of Python calls, `[get_weather(city="Paris"), get_time()]`.

Without marks around it, a list is one of calls only if it names known tools.
"""

import ast
import json
import re
from typing import ClassVar

from serving.chat.formats.tool_format import Tools, new_call_id
from serving.chat.source import (
    CallArguments,
    CallStart,
    Content,
    Source,
    Steps,
    peek,
    skip_optional,
    take_space,
    text_until,
)

STARTS = ("<|python_start|>", "<|tool_call_start|>")
ENDS = ("<|python_end|>", "<|tool_call_end|>")
CONSTANTS = {"true": True, "false": False, "null": None}

_NAME = re.compile(r"\s*[\w.]*\s*")
_MARK = re.compile("[()\\[\\]{}]|'''|\"\"\"|'|\"")


class Pythonic:
    """See the module."""

    tokens: ClassVar[tuple[str, ...]] = (*STARTS, *ENDS)

    def suits(self, template: str) -> bool:
        """See `ToolFormat`."""
        return any(start in template for start in STARTS) or "[func_name1(" in template

    def parse(self, source: Source, tools: Tools) -> Steps[None]:
        """See `ToolFormat`."""
        if (yield from peek(source)) != "[" and not (yield from text_until(source, STARTS)):
            return
        if (yield from peek(source)) == "[":
            no_call = yield from _calls(source, tools)
            if no_call:
                yield Content(no_call)
            else:
                for end in ENDS:
                    yield from skip_optional(source, end)
                yield from take_space(source)
        yield from text_until(source, ())

    def new_id(self) -> str:
        """See `ToolFormat`."""
        return new_call_id()


def _calls(source: Source, tools: Tools) -> Steps[str]:
    """Parse a list of calls. Return the text of what is no call."""
    taken = (yield from take_space(source)) + source.take(1)
    while True:
        name = yield from _name(source)
        if not source.text.startswith("(") or name.strip() not in tools:
            return taken + name
        text = yield from _parentheses(source)
        arguments = _arguments(text)
        if arguments is None:
            return taken + name + text
        yield CallStart(name.strip())
        yield CallArguments(arguments)
        taken = ""
        if not (yield from skip_optional(source, ",")):
            yield from skip_optional(source, "]")
            return ""


def _name(source: Source) -> Steps[str]:
    """Take a name, with the spaces around it, and return it."""
    while (found := _NAME.match(source.text)) and found.end() == len(source.text) and not source.is_complete:
        yield None
    assert found is not None, "the pattern matches the empty text"
    return source.take(found.end())


def _parentheses(source: Source) -> Steps[str]:
    """Take the text up to the parenthesis that closes the first one, and return it."""
    while (end := _end_of_parentheses(source.text)) is None and not source.is_complete:
        yield None
    return source.take(len(source.text) if end is None else end)


def _end_of_parentheses(text: str) -> int | None:
    at = depth = 0
    while found := _MARK.search(text, at):
        at = found.end()
        mark = found.group()
        if mark in "()[]{}":
            depth += 1 if mark in "([{" else -1
            if depth == 0:
                return at
        else:
            string = re.compile(rf"(?:\\.|(?!{mark}).)*{mark}", re.DOTALL).match(text, at)
            if string is None:
                return None
            at = string.end()
    return None


def _arguments(parentheses: str) -> str | None:
    """Return the JSON of the arguments of a call, or None if they are not all named literals."""
    try:
        call = ast.parse(f"f{parentheses}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            return None
        values = {keyword.arg: ast.literal_eval(_JsonConstants().visit(keyword.value)) for keyword in call.keywords}
        return None if None in values else json.dumps(values, ensure_ascii=False, allow_nan=False)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


class _JsonConstants(ast.NodeTransformer):
    """Turns the names of JSON's constants, which models write too, into values."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """See `ast.NodeTransformer`."""
        return ast.Constant(CONSTANTS[node.id]) if node.id in CONSTANTS else node
