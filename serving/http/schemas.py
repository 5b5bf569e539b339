"""The request bodies of the HTTP interface, and the calls that they ask for.

The server rejects OpenAI fields that it does not support, by name: an error is better than an answer that ignores part
of the request. It accepts fields that do not change the answer, and values that ask for nothing (such as
`frequency_penalty=0`). `null` means the default, as with OpenAI.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from serving.engine.request import SamplingParams, Terms
from serving.gateway.gateway import Call
from serving.gateway.prompts import Chat, Prompt

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_LOGPROBS = 20
MAX_PRIORITY = 100

# Fields for OpenAI's own bookkeeping. Clients send them, and they do not change the answer.
IGNORED = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
)
# Fields that this server does not support, with the values that ask for nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "echo": (False,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
}


class StreamOptions(BaseModel):
    """The options of a stream. `include_usage` adds a chunk with token counts; `include_obfuscation` is ignored."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationBody(BaseModel):
    """The fields that completions and chat completions share.

    Beside OpenAI's fields it has vLLM's `top_k`, `ignore_eos`, `priority` (lower is more urgent) and `cache_salt`. With
    `cache` False a request neither uses the KV of earlier requests nor leaves any. With `first_token_deadline_s` it is
    refused if its first token cannot come in time.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: Annotated[str, Field(min_length=1)]
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    best_of: int | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = 0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default=[], max_length=MAX_STOPS)
    ignore_eos: bool = False
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = 0
    first_token_deadline_s: Annotated[float, Field(gt=0)] | None = None
    cache: bool = True
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None and not _is_neutral(key, value)}

    @field_validator("stop", mode="before")
    @classmethod
    def _wrap_single_stop(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_best_of(self) -> Self:
        if self.best_of not in (None, self.n):
            raise ValueError("best_of: this server does not rank choices. Leave best_of out or set it to n")
        return self

    def _sampling(self, max_tokens: int | None, num_logprobs: int | None) -> SamplingParams:
        limit = {} if max_tokens is None else {"max_tokens": max_tokens}
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            seed=self.seed,
            stop=tuple(self.stop),
            ignore_eos=self.ignore_eos,
            num_logprobs=num_logprobs,
            **limit,
        )

    def _terms(self, tenant: str) -> Terms:
        return Terms(self.priority, tenant, self.first_token_deadline_s, self.cache_salt or "", self.cache)


class CompletionBody(GenerationBody):
    """The body of POST /v1/completions."""

    prompt: list[Any]
    max_tokens: Annotated[int, Field(ge=1)] = 16
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _wrap_single_prompt(cls, value: Any) -> list[Prompt]:
        prompts = [value] if _is_prompt(value) else value
        if not isinstance(prompts, list) or not prompts or not all(map(_is_prompt, prompts)):
            raise ValueError("must be a string, a list of strings, a list of token ids or a list of such lists")
        return [prompt if isinstance(prompt, str) else tuple(prompt) for prompt in prompts]

    @model_validator(mode="after")
    def _check_num_choices(self) -> Self:
        if self.n * len(self.prompt) > MAX_CHOICES:
            raise ValueError(f"prompt: {len(self.prompt)} prompts times n={self.n} exceed {MAX_CHOICES} choices")
        return self

    def call(self, id: str, tenant: str) -> Call:
        """Return the call that this body asks for."""
        return Call(
            id=id,
            model=self.model,
            prompts=tuple(self.prompt),
            sampling=self._sampling(self.max_tokens, self.logprobs),
            num_choices=self.n,
            terms=self._terms(tenant),
        )


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
        )


class LoadAdapterBody(BaseModel):
    """The body of POST /v1/load_lora_adapter. `lora_path` is a folder on the server in PEFT's format."""

    model_config = ConfigDict(extra="forbid", strict=True)
    lora_name: str
    lora_path: Annotated[str, Field(min_length=1)]
    base_model_name: str | None = None


class UnloadAdapterBody(BaseModel):
    """The body of POST /v1/unload_lora_adapter."""

    model_config = ConfigDict(extra="forbid", strict=True)
    lora_name: str


def _is_neutral(key: str, value: Any) -> bool:
    return key in IGNORED or value in NEUTRAL.get(key, ())


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and all(map(_is_token, value)))
