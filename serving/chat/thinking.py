"""Reasoning that a model writes between two marks before it answers."""

from collections.abc import Mapping
from dataclasses import dataclass

from serving.chat.source import Reasoning, Source, Steps, num_pending, skip_optional, take_space


@dataclass(frozen=True)
class Thinking:
    """The marks around a model's reasoning."""

    start: str
    end: str

    def parse(self, source: Source, *, is_open: bool) -> Steps[None]:
        """Yield the reasoning at the start of the text, without spaces around it.

        With `is_open` the prompt ends with the start mark. Some models write it once more.
        """
        if not (yield from skip_optional(source, self.start)) and not is_open:
            return
        yield from take_space(source)
        while self.end not in source.text and not source.is_complete:
            if text := source.take(len(source.text) - num_pending(source.text, (self.end,))):
                yield Reasoning(text)
            yield None
        if text := source.take(source.text.find(self.end) if self.end in source.text else len(source.text)).rstrip():
            yield Reasoning(text)
        source.take(len(self.end))
        yield from take_space(source)


# By name, as `reasoning_parser` in a fleet file spells it.
THINKING: Mapping[str, Thinking] = {
    "think": Thinking("<think>", "</think>"),
    "mistral": Thinking("[THINK]", "[/THINK]"),
    "seed": Thinking("<seed:think>", "</seed:think>"),
}


def find_thinking(template: str, name: str = "auto") -> Thinking | None:
    """Return the marks of that name, or else those that a chat template has. None: its model does not think."""
    if name != "auto":
        return THINKING.get(name)
    return next((thinking for thinking in THINKING.values() if thinking.end in template), None)
