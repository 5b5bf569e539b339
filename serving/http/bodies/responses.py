"""The body of responses, OpenAI's newer form of chats, and the chat that it asks for."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

# Fields for OpenAI's own bookkeeping. Clients send them, and they do not change the answer.
IGNORED = frozenset(
    ("user", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "stream_options")
)
# Fields that this server does not support, with the values that ask for nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "background": (False,),
    "include": ([],),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
# Fields of chats that have another name or no meaning here.
NOT_HERE = (
    *("messages", "n", "best_of", "max_tokens", "max_completion_tokens", "response_format", "reasoning_effort"),
    *("logprobs", "prompt_logprobs", "return_token_ids"),
)
TEXT_PARTS = ("input_text", "output_text", "text")


class TextFormat(BaseModel):
    """The form of the text: any text, or JSON."""

    model_config = ConfigDict(extra="allow", strict=True)
    type: Literal["text", "json_object", "json_schema"] = "text"


class TextSettings(BaseModel):
    """The settings of the text. `verbosity` is refused unless it is the default."""

    model_config = ConfigDict(extra="forbid", strict=True)
    format: TextFormat = TextFormat()
    verbosity: Literal["medium"] | None = None


class ReasoningSettings(BaseModel):
    """The settings of the model's reasoning. Summaries are refused: the answer has the reasoning itself."""

    model_config = ConfigDict(extra="forbid", strict=True)
    effort: str | None = None
    summary: None = None
    generate_summary: None = None


class FunctionTool(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["function"]
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseBody(BaseModel):
    """The body of POST /v1/responses. Further fields are those of chat completions, such as `seed` and `top_k`."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    model: Annotated[str, Field(min_length=1)]
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    tools: list[FunctionTool] = Field(default=[])
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    text: TextSettings = TextSettings()
    reasoning: ReasoningSettings = ReasoningSettings()
    metadata: dict[str, str] = Field(default={})
    store: Literal[False] = False
    stream: bool = False

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name in NOT_HERE:
            if data.get(name) is not None:
                raise ValueError(f"{name}: this is a field of chat completions, not of responses")
        return {
            key: value
            for key, value in data.items()
            if value is not None and key not in IGNORED and value not in NEUTRAL.get(key, ())
        }

    @field_validator("store", mode="before")
    @classmethod
    def _refuse_to_store(cls, value: Any) -> Any:
        if value is True:
            raise ValueError("this server keeps no responses. Send store=false and the whole conversation as input")
        return value

    @field_validator("input")
    @classmethod
    def _check_items(cls, value: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
        if isinstance(value, list):
            messages_of(value)
        return value

    def chat_fields(self) -> dict[str, Any]:
        """Return the fields of the chat completion that gives the same answer."""
        items = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        instructions = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        choice = self.tool_choice
        if isinstance(choice, dict) and choice.get("type") == "function":
            choice = {"type": "function", "function": {"name": choice.get("name")}}
        return {
            **(self.model_extra or {}),
            "model": self.model,
            "messages": [*instructions, *messages_of(items)],
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "tools": [_chat_tool(tool) for tool in self.tools],
            "tool_choice": choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "reasoning_effort": self.reasoning.effort,
            "response_format": _response_format(self.text.format),
            "stream": self.stream,
        }


def messages_of(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return input items as the messages of a chat. Raises ValueError that names the first item it cannot read.

    Reasoning, text and calls that follow each other become one message of the assistant.
    """
    messages: list[dict[str, Any]] = []
    for index, item in enumerate(items):
        try:
            part = _message(item)
        except ValueError as error:
            raise ValueError(f"item {index}: {error}") from error
        if messages and messages[-1]["role"] == part["role"] == "assistant":
            _extend(messages, part)
        else:
            messages.append(part)
    return messages


def _extend(messages: list[dict[str, Any]], part: dict[str, Any]) -> None:
    """Add a part to the assistant's last message, unless both have text: then they are two messages."""
    last = messages[-1]
    if part.get("content") and last.get("content"):
        messages.append(part)
        return
    calls = [*last.get("tool_calls", ()), *part.get("tool_calls", ())]
    messages[-1] = last | part | ({"tool_calls": calls} if calls else {})


def _message(item: Mapping[str, Any]) -> dict[str, Any]:
    """Return the message that an item is, or a part of an assistant's message."""
    match item.get("type", "message"):
        case "message":
            return {"role": item.get("role"), "content": _text(item.get("content"))}
        case "reasoning":
            text = _text(item.get("content") or item.get("summary") or [], ("reasoning_text", "summary_text"))
            return {"role": "assistant", "reasoning_content": text}
        case "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            return {"role": "assistant", "tool_calls": [call]}
        case "function_call_output":
            return {"role": "tool", "tool_call_id": item.get("call_id"), "content": _text(item.get("output"))}
        case other:
            raise ValueError(f"this server does not support items of type {other!r}")


def _text(parts: Any, kinds: Iterable[str] = TEXT_PARTS) -> str:
    if isinstance(parts, str):
        return parts
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise ValueError("content must be a string or a list of parts")
    return "".join(_part_text(part, tuple(kinds)) for part in parts)


def _part_text(part: Mapping[str, Any], kinds: tuple[str, ...]) -> str:
    kind = part.get("type")
    text = part.get("refusal") if kind == "refusal" else part.get("text")
    if kind not in (*kinds, "refusal") or not isinstance(text, str):
        raise ValueError(f"this server takes text parts only, not parts of type {kind!r}")
    return text


def _chat_tool(tool: FunctionTool) -> dict[str, Any]:
    function = tool.model_dump(exclude={"type"}, exclude_none=True)
    return {"type": "function", "function": function}


def _response_format(format: TextFormat) -> dict[str, Any] | None:
    if format.type == "text":
        return None
    schema = {key: value for key, value in (format.model_extra or {}).items() if value is not None}
    return {"type": format.type, **({"json_schema": schema} if schema else {})}
