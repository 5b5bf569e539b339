"""The body of chat completions."""

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serving.gateway.gateway import Call
from serving.gateway.prompts import Chat
from serving.http.bodies.generation import MAX_LOGPROBS, GenerationBody


class TextPart(BaseModel):
    """A part of a message's content. The models read only text."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Annotated[str, Field(pattern="^text$")]
    text: str


class Message(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Annotated[str, Field(pattern="^(system|developer|user|assistant)$")]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        """Return the content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatBody(GenerationBody):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] = 0

    @model_validator(mode="after")
    def _check_top_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: requires logprobs=true")
        return self

    def call(self, id: str, tenant: str) -> Call:
        """Return the call that this body asks for. Without a token limit the answer may fill the model's context."""
        max_tokens = self.max_completion_tokens or self.max_tokens
        return Call(
            id=id,
            model=self.model,
            prompts=(Chat(tuple((message.role, message.text) for message in self.messages)),),
            sampling=self._sampling(max_tokens, self.top_logprobs if self.logprobs else None),
            num_choices=self.n,
            is_unlimited=max_tokens is None,
            terms=self._terms(tenant),
            bad_words=tuple(self.bad_words),
        )
