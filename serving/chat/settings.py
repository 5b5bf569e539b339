"""How the answers of each model of a fleet are read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


class ParserSpec(Protocol):
    """A base or an adapter of a fleet file."""

    @property
    def tool_parser(self) -> str:
        """A name in FORMATS, "none", "auto" (as the chat template shows), or "base" (as the adapter's base)."""
        ...

    @property
    def reasoning_parser(self) -> str:
        """A name in THINKING, "none", "auto" or "base"."""
        ...


@dataclass(frozen=True)
class ChatSettings:
    """How the answers of one model are read, and whether its clients may bring a chat template."""

    tool_parser: str = "auto"
    reasoning_parser: str = "auto"
    trusts_request_templates: bool = False


DEFAULT_CHAT_SETTINGS = ChatSettings()


@dataclass(frozen=True)
class FleetChatSettings:
    """The settings of all models; `specs` by name."""

    specs: Mapping[str, ParserSpec]
    trusts_request_templates: bool

    def of(self, names: Sequence[str]) -> ChatSettings:
        """Return the settings of an adapter and its base, in this order, or of a bare base."""
        specs = [self.specs[name] for name in names if name in self.specs]
        tool_parsers = [spec.tool_parser for spec in specs]
        reasoning_parsers = [spec.reasoning_parser for spec in specs]
        return ChatSettings(
            tool_parser=next((name for name in tool_parsers if name != "base"), "auto"),
            reasoning_parser=next((name for name in reasoning_parsers if name != "base"), "auto"),
            trusts_request_templates=self.trusts_request_templates,
        )
