"""Tool calls written as JSON objects: `{"name": ..., "arguments": {...}}`, read while they are written."""

import json
import re
from collections.abc import Collection, Generator

from serving.chat.source import CallArguments, CallStart, Source, Steps, peek, skip_optional, take_space

NAMES = ("name", "function")
ARGUMENTS = ("arguments", "parameters")
KEYS = frozenset((*NAMES, *ARGUMENTS, "id", "type"))

_STRUCTURE = re.compile(r'[{}\[\]"]')
_STRING_END = re.compile(r'["\\]')
_SCALAR_END = re.compile(r"[\s,}\]]")


class JsonScanner:
    """Finds where a JSON value ends. It does not check that the value is valid."""

    def __init__(self) -> None:
        self.is_done = False
        self._kind = ""  # the value's first character
        self._depth = 0
        self._is_in_string = False
        self._is_escaped = False

    def scan(self, text: str) -> int:
        """Return how many characters of the text belong to the value. The first text starts with the value."""
        self._kind = self._kind or text[:1]
        if self._kind not in '{["':
            end = _SCALAR_END.search(text)
            self.is_done = end is not None
            return len(text) if end is None else end.start()
        at = 0
        while at < len(text) and not self.is_done:
            at = self._scan_string(text, at) if self._is_in_string else self._scan_structure(text, at)
        return at

    def _scan_string(self, text: str, at: int) -> int:
        if self._is_escaped:
            self._is_escaped = False
            return at + 1
        found = _STRING_END.search(text, at)
        if found is None:
            return len(text)
        self._is_escaped = found.group() == "\\"
        self._is_in_string = self._is_escaped
        self.is_done = not self._is_in_string and self._depth == 0
        return found.end()

    def _scan_structure(self, text: str, at: int) -> int:
        found = _STRUCTURE.search(text, at)
        if found is None:
            return len(text)
        mark = found.group()
        self._is_in_string = mark == '"'
        self._depth += (mark in "{[") - (mark in "}]")
        self.is_done = not self._is_in_string and self._depth == 0
        return found.end()


class _Reader:
    """Takes JSON from a source and remembers what it took, in case it is no call after all."""

    def __init__(self, source: Source):
        self.taken = ""
        self._source = source

    def pieces(self) -> Generator[str | None, None, None]:
        """Yield the next value in pieces, as they come; None: it needs more text."""
        scanner = JsonScanner()
        while not scanner.is_done and (self._source.text or not self._source.is_complete):
            piece = self._source.take(scanner.scan(self._source.text)) if self._source.text else ""
            self.taken += piece
            if piece or not (scanner.is_done or self._source.is_complete):
                yield piece or None

    def value(self) -> Steps[str]:
        """Return the next value whole."""
        parts = []
        for piece in self.pieces():
            if piece is None:
                yield None
            else:
                parts.append(piece)
        return "".join(parts)

    def mark(self, marks: str) -> Steps[str]:
        """Take one of the marks, after spaces, and return it. Return "" if the text goes on with something else."""
        character = yield from self.next()
        if not character or character not in marks:
            return ""
        self.taken += self._source.take(1)
        return character

    def next(self) -> Steps[str]:
        """Take spaces and return the next character, without taking it."""
        self.taken += yield from take_space(self._source)
        return self._source.text[:1]


def json_call(source: Source, names: Collection[str] | None = None) -> Steps[str | None]:
    """Parse one call. The source goes on with `{`. Return None, or the text that was taken if it is not a call.

    With `names`, only an object that names one of them and has no keys that calls lack is a call. The arguments are
    passed on as the model writes them, valid or not. An id counts only before the arguments: it goes out with the name.
    """
    reader = _Reader(source)
    name: str | None = None
    id = None
    early_arguments = ""  # arguments that come before the name
    is_started = False
    mark = yield from reader.mark("{")
    while mark in ("{", ","):
        if (yield from reader.next()) != '"':
            break
        key = _string((yield from reader.value()))
        if (names is not None and key not in KEYS) or not (yield from reader.mark(":")):
            break
        first = yield from reader.next()
        if key in ARGUMENTS and name is not None and not is_started:
            is_started = True
            yield CallStart(name, id)
            yield from _arguments(reader, first)
        else:
            value = yield from reader.value()
            if key in NAMES and name is None:
                name = _string(value)
                if not name or (names is not None and name not in names):
                    return reader.taken
            elif key == "id":
                id = _string(value)
            elif key in ARGUMENTS:
                early_arguments = value
        mark = yield from reader.mark(",}")
    if not is_started:
        if name is None or mark != "}":
            return reader.taken
        yield CallStart(name, id)
        yield CallArguments(_unwrapped(early_arguments or "{}"))
    return None


def json_calls(source: Source) -> Steps[str]:
    """Parse a list of calls, or one call. Return the text that was taken if it is neither."""
    taken = yield from take_space(source)
    taken += source.take(1) if source.text.startswith("[") else ""
    while (yield from peek(source)) == "{":
        no_call = yield from json_call(source)
        if no_call is not None:
            return taken + no_call
        taken = ""
        yield from skip_optional(source, ",")
    is_closed = yield from skip_optional(source, "]")
    return "" if is_closed else taken


def json_pieces(source: Source) -> Generator[str | None, None, None]:
    """Take the next JSON value and yield it in pieces, as they come; None: it needs more text."""
    yield from _Reader(source).pieces()


def _arguments(reader: _Reader, first: str) -> Steps[None]:
    """Yield the arguments: an object in pieces, anything else when it is complete."""
    if first != "{":
        yield CallArguments(_unwrapped((yield from reader.value())))
        return
    for piece in reader.pieces():
        yield None if piece is None else CallArguments(piece)


def _unwrapped(value: str) -> str:
    """Return arguments that were written as a string as the JSON in the string; nothing becomes an empty object."""
    text = _string(value)
    return "{}" if value == "null" or text == "" else text or value


def _string(value: str) -> str | None:
    """Return the string that a JSON text spells, or None if it spells something else."""
    try:
        found = json.loads(value)
    except ValueError:
        return None
    return found if isinstance(found, str) else None
