"""The bodies of the two routes that turn text into tokens and back. Both are vLLM's."""

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serving.chat.conversation import Chat
from serving.http.bodies.messages import Message, Tool
from serving.http.bodies.sampling import Token


class TokensBody(BaseModel):
    """What both routes share. Without `model` the only served base is meant."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_null_fields(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class TokenizeBody(TokensBody):
    """The body of POST /tokenize: either `prompt`, as completions take it, or `messages`, as chat completions do.

    Special tokens are added to a prompt by default. Messages get them from the chat template.
    """

    prompt: str | None = None
    messages: list[Message] = Field(default=[])
    add_special_tokens: bool | None = None
    return_token_strs: bool = False
    tools: list[Tool] = Field(default=[])
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = Field(default={})
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    @model_validator(mode="after")
    def _check_form(self) -> Self:
        if (self.prompt is None) == (not self.messages):
            raise ValueError("prompt: send either prompt or messages")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message: requires add_generation_prompt=false")
        return self

    def content(self) -> str | Chat:
        """Return the prompt or the conversation."""
        if self.prompt is not None:
            return self.prompt
        return Chat(
            messages=tuple(message.for_template() for message in self.messages),
            tools=tuple(tool.for_template() for tool in self.tools),
            template=self.chat_template,
            variables=self.chat_template_kwargs,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
        )


class DetokenizeBody(TokensBody):
    """The body of POST /detokenize."""

    tokens: list[Token]
