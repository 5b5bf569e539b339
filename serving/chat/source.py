"""Text that comes in pieces, and the steps that parse it.

A parser is a generator over a `Source`: it takes text from the source and yields what it found. It yields None when it
needs more text. So the result depends on the text alone, never on where the pieces begin and end.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

Result = TypeVar("Result")


class Content(NamedTuple):
    """Text for the reader of the answer."""

    text: str


class Reasoning(NamedTuple):
    """Text that the model wrote while it was thinking."""

    text: str


class CallStart(NamedTuple):
    """A tool call begins. Without an `id` of the model's own, the format makes one."""

    name: str
    id: str | None = None


class CallArguments(NamedTuple):
    """A piece of the JSON of the last call's arguments."""

    text: str


Event = Content | Reasoning | CallStart | CallArguments
Steps = Generator[Event | None, None, Result]  # the events of a parser; None: it needs more text


@dataclass
class Source:
    """The text that has arrived and is not parsed yet. With `is_complete` no more will come."""

    text: str = ""
    is_complete: bool = False

    def take(self, num_characters: int) -> str:
        """Remove the first characters and return them."""
        taken, self.text = self.text[:num_characters], self.text[num_characters:]
        return taken


def text_until(source: Source, markers: Sequence[str]) -> Steps[str | None]:
    """Yield the text before the first marker as content, take the marker and return it, or None if there is none.

    Spaces directly before the marker are dropped. Text that may be the beginning of a marker is held back.
    """
    while True:
        marker = first_marker(source.text, markers)
        if marker is not None:
            if text := source.take(source.text.index(marker)).rstrip():
                yield Content(text)
            source.take(len(marker))
            return marker
        num_held = 0 if source.is_complete else num_pending(source.text, markers)
        if text := source.take(len(source.text) - num_held):
            yield Content(text)
        if source.is_complete:
            return None
        yield None


def take_before(source: Source, markers: Sequence[str]) -> Steps[str]:
    """Take the text before the first marker, or all text if there is none, and return it."""
    while (marker := first_marker(source.text, markers)) is None and not source.is_complete:
        yield None
    return source.take(len(source.text) if marker is None else source.text.index(marker))


def peek(source: Source) -> Steps[str]:
    """Return the next character that is not a space, without taking it, or "" at the end of the text."""
    while not source.text.lstrip() and not source.is_complete:
        yield None
    return source.text.lstrip()[:1]


def take_space(source: Source) -> Steps[str]:
    """Take the spaces before the next character, and return them."""
    yield from peek(source)
    return source.take(len(source.text) - len(source.text.lstrip()))


def skip_optional(source: Source, marker: str) -> Steps[bool]:
    """Drop the marker, and spaces before it, if the text goes on with it. Return whether it does."""
    while marker.startswith(source.text.lstrip()) and len(source.text.lstrip()) < len(marker):
        if source.is_complete:
            return False
        yield None
    if not source.text.lstrip().startswith(marker):
        return False
    source.text = source.text.lstrip()[len(marker) :]
    return True


def first_marker(text: str, markers: Sequence[str]) -> str | None:
    """Return the marker that starts first in the text, if there is one."""
    found = [(start, marker) for marker in markers if (start := text.find(marker)) >= 0]
    return min(found)[1] if found else None


def num_pending(text: str, markers: Sequence[str]) -> int:
    """Return the length of the text's end that may be the beginning of a marker, with the spaces before it."""
    if not markers:
        return 0
    firsts = {marker[0] for marker in markers}
    starts = range(max(0, len(text) - max(map(len, markers)) + 1), len(text))
    matching = (i for i in starts if text[i] in firsts and any(marker.startswith(text[i:]) for marker in markers))
    return len(text) - len(text[: next(matching, len(text))].rstrip())
