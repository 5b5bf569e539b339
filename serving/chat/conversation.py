"""A conversation in the form that chat templates read, and what may follow it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Chat:
    """A conversation that a chat template turns into a prompt.

    `messages` have OpenAI's keys, without those that are null, with text as `content` and with the `arguments` of tool
    calls as objects. `tools` are OpenAI's function tools. The model must call a tool if `must_call`, and the one named
    `forced_tool` if that is set. `template` replaces the model's own template, whose further variables are `variables`.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    must_call: bool = False
    forced_tool: str | None = None
    max_calls: int | None = None
    documents: tuple[Mapping[str, Any], ...] = ()
    template: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    reasoning_effort: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    @property
    def is_forced(self) -> bool:
        """Whether the answer must be a tool call."""
        return self.must_call or self.forced_tool is not None

    def tool_schemas(self) -> dict[str, Mapping[str, Any]]:
        """Return the JSON schema of each tool's parameters, by the tool's name."""
        return {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in self.tools}
