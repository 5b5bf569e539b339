"""The body of chat completions."""

from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, field_validator, model_validator

from serving.chat.conversation import Chat
from serving.gateway.calls import Call
from serving.http.bodies.generation import GenerationBody
from serving.http.bodies.messages import Message, Tool
from serving.http.bodies.sampling import MAX_LOGPROBS


class ForcedTool(NamedTuple):
    """A tool choice that names the tool to call."""

    name: str


class ChatBody(GenerationBody):
    """The body of POST /v1/chat/completions.

    Beside OpenAI's fields it has those with which vLLM controls the chat template. With `include_reasoning` False the
    answer leaves the model's reasoning out.
    """

    messages: list[Message] = Field(min_length=1)
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] = 0
    tools: list[Tool] = Field(default=[])
    tool_choice: Literal["none", "auto", "required"] | ForcedTool = "auto"
    parallel_tool_calls: bool = True
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = Field(default={})
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    documents: list[dict[str, Any]] = Field(default=[])
    reasoning_effort: str | None = None
    include_reasoning: bool = True

    @field_validator("tool_choice", mode="wrap")
    @classmethod
    def _read_tool_choice(cls, value: Any, validate: Any) -> Any:
        match value:
            case "none" | "auto" | "required" | ForcedTool():
                return value
            case {"type": "function", "function": {"name": str(name)}}:
                return ForcedTool(name)
        named = '{"type": "function", "function": {"name": ...}}'
        raise ValueError(f'this server takes "none", "auto", "required" and {named}')

    @model_validator(mode="after")
    def _check_top_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: requires logprobs=true")
        return self

    @model_validator(mode="after")
    def _check_tool_choice(self) -> Self:
        names = [tool.function.name for tool in self.tools]
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice: there are no tools to call")
        if isinstance(self.tool_choice, ForcedTool) and self.tool_choice.name not in names:
            raise ValueError(f"tool_choice: {self.tool_choice.name!r} is not among the tools")
        return self

    @model_validator(mode="after")
    def _check_final_message(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message: requires add_generation_prompt=false")
        return self

    def call(self, id: str, tenant: str) -> Call:
        """Return the call that this body asks for. Without a token limit the answer may fill the model's context."""
        max_tokens = self.max_completion_tokens or self.max_tokens
        return Call(
            id=id,
            model=self.model,
            prompts=(self.chat(),),
            sampling=self._sampling(max_tokens, self.top_logprobs if self.logprobs else None),
            is_unlimited=max_tokens is None,
            terms=self._terms(tenant),
            **self._details(),
        )

    def chat(self) -> Chat:
        """Return the conversation. With `tool_choice` "none" the model does not see the tools."""
        tools = self.tools if self.tool_choice != "none" else []
        return Chat(
            messages=tuple(message.for_template() for message in self.messages),
            tools=tuple(tool.for_template() for tool in tools),
            must_call=self.tool_choice == "required",
            forced_tool=self.tool_choice.name if isinstance(self.tool_choice, ForcedTool) else None,
            max_calls=None if self.parallel_tool_calls else 1,
            documents=tuple(self.documents),
            template=self.chat_template,
            variables=self.chat_template_kwargs,
            reasoning_effort=self.reasoning_effort,
            add_generation_prompt=self.add_generation_prompt is not False and not self.continue_final_message,
            continue_final_message=self.continue_final_message,
        )
