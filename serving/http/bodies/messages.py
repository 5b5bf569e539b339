"""The messages and tools of a chat, as clients send them and as chat templates read them."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

# Keys that clients send back with the answers they received. They say nothing that a template could use.
IGNORED_KEYS = frozenset(("annotations", "parsed", "provider_specific_fields", "thinking_blocks"))


class FunctionCall(BaseModel):
    """The function of a tool call. OpenAI's clients send `arguments` as a JSON text; templates read the object."""

    model_config = ConfigDict(strict=True)
    name: Annotated[str, Field(min_length=1)]
    arguments: dict[str, Any]

    @field_validator("arguments", mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value or "{}")
        except ValueError as error:
            raise ValueError(f"is not a JSON object: {error}") from error


class ToolCall(BaseModel):
    """A call that the assistant made in an earlier turn."""

    model_config = ConfigDict(strict=True)
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(BaseModel):
    """One turn of a chat. The models read text only."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] = []
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_empty_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if data.get("role") == "function" or data.get("function_call"):
            raise ValueError("function_call and the role function are the old form. Use tool_calls and the role tool")
        return {key: value for key, value in data.items() if value not in (None, [], {}) and key not in IGNORED_KEYS}

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, value: Any) -> Any:
        return "".join(map(_part_text, value)) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check_role(self) -> Self:
        if self.role != "assistant" and self.content is None:
            raise ValueError(f"content: a message of the role {self.role} needs text")
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("tool_call_id: a message of the role tool needs the id of the call that it answers")
        return self

    def for_template(self) -> dict[str, Any]:
        """Return the message as templates read it: keys without a value are left out, and content is always text."""
        message: dict[str, Any] = {"role": self.role, "content": self.content or self.refusal or ""}
        rest = {
            "name": self.name,
            "reasoning_content": self.reasoning_content or self.reasoning,
            "tool_calls": [call.model_dump() for call in self.tool_calls],
            "tool_call_id": self.tool_call_id,
        }
        return message | {key: value for key, value in rest.items() if value}


class Function(BaseModel):
    """The function that a tool offers. Further keys reach the template as they are."""

    model_config = ConfigDict(extra="allow", strict=True)
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """A tool that the model may call."""

    model_config = ConfigDict(extra="allow", strict=True)
    type: Literal["function"]
    function: Function
    _sent: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _keep_as_sent(cls, data: Any, validate: Any) -> Self:
        tool = validate(data)
        tool._sent = data
        return tool

    def for_template(self) -> dict[str, Any]:
        """Return the tool as it was sent, because templates print it. Only null and missing parameters change."""
        function = {key: value for key, value in self._sent["function"].items() if value is not None}
        function.setdefault("parameters", {"type": "object", "properties": {}})
        return {**self._sent, "function": function}


def _part_text(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "refusal"):
        raise ValueError(f"this server takes text parts only, not parts of type {kind!r}")
    text = part.get(kind)
    if not isinstance(text, str):
        raise ValueError(f"a part of type {kind!r} needs the text as {kind!r}")
    return text
