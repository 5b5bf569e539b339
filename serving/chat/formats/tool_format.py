"""What every format of tool calls offers."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol
from uuid import uuid4

from serving.chat.source import Source, Steps

Tools = Mapping[str, Mapping[str, Any]]  # the JSON schema of each tool's parameters, by the tool's name


class ToolFormat(Protocol):
    """A format in which models write tool calls."""

    tokens: ClassVar[tuple[str, ...]]  # its marks that may be special tokens, which answers leave out otherwise

    def suits(self, template: str) -> bool:
        """Return whether a chat template shows that its model writes this format."""
        ...

    def parse(self, source: Source, tools: Tools) -> Steps[None]:
        """Yield the content and the calls in the text."""
        ...

    def new_id(self) -> str:
        """Return an id for a call."""
        ...


def new_call_id() -> str:
    """Return an id like OpenAI's."""
    return f"call_{uuid4().hex[:24]}"
