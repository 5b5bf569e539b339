"""What clients may send: the request bodies of the HTTP interface, each of which knows the call that it asks for.

A field that OpenAI's interface has and this server has not is refused by name, never dropped: an answer that ignores
what was asked is worse than none. The exceptions are fields that do not change the answer, and values that ask for
nothing (`frequency_penalty=0`). `null` means the default, as with OpenAI.
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

# Bookkeeping of OpenAI's own service: accepted, because clients send it, and without effect on the answer.
IGNORED = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
)
# Fields that this server does not implement, with the values that ask for nothing.
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
    """`include_usage` asks for a last chunk with the token counts; `include_obfuscation` (padding) is ignored."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationBody(BaseModel):
    """What completions and chat completions have in common.

    Beside OpenAI's fields: vLLM's `top_k`, `ignore_eos`, `priority` (lower is more urgent) and `cache_salt`; `cache`
    False neither uses KV of earlier requests nor leaves any; `first_token_deadline_s` asks for a refusal rather than a
    first token later than that.
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
    def _drop_what_asks_for_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None and not _asks_for_nothing(key, value)}

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_is_a_list_of_one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _best_of_is_n(self) -> Self:
        if self.best_of not in (None, self.n):
            raise ValueError("best_of: this server returns all n choices and ranks none; leave best_of out")
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
    """POST /v1/completions."""

    prompt: list[Any]
    max_tokens: Annotated[int, Field(ge=1)] = 16
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _list_of_prompts(cls, value: Any) -> list[Prompt]:
        is_one = isinstance(value, str) or (isinstance(value, list) and value and all(map(_is_token, value)))
        prompts = [value] if is_one else value
        if not isinstance(prompts, list) or not prompts or not all(map(_is_prompt, prompts)):
            raise ValueError("must be a text, a list of texts, a list of token ids, or a list of lists of token ids")
        return [prompt if isinstance(prompt, str) else tuple(prompt) for prompt in prompts]

    @model_validator(mode="after")
    def _few_enough_choices(self) -> Self:
        if self.n * len(self.prompt) > MAX_CHOICES:
            raise ValueError(f"prompt: {len(self.prompt)} prompts times n={self.n} is over the limit of {MAX_CHOICES}")
        return self

    def call(self, id: str, tenant: str) -> Call:
        """The call that this body of a tenant asks for."""
        return Call(
            id=id,
            model=self.model,
            prompts=tuple(self.prompt),
            sampling=self._sampling(self.max_tokens, self.logprobs),
            num_choices=self.n,
            terms=self._terms(tenant),
        )


class TextPart(BaseModel):
    """A part of a message's content; text is all that the models read."""

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
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] = 0

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs=true")
        return self

    def call(self, id: str, tenant: str) -> Call:
        """The call that this body of a tenant asks for; without a limit the answer may fill the model's context."""
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
    """POST /v1/load_lora_adapter: `lora_path` is a folder in PEFT's format that the server can read."""

    model_config = ConfigDict(extra="forbid", strict=True)
    lora_name: str
    lora_path: Annotated[str, Field(min_length=1)]
    base_model_name: str | None = None


class UnloadAdapterBody(BaseModel):
    """POST /v1/unload_lora_adapter."""

    model_config = ConfigDict(extra="forbid", strict=True)
    lora_name: str


def _asks_for_nothing(key: str, value: Any) -> bool:
    return key in IGNORED or value in NEUTRAL.get(key, ())


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and all(map(_is_token, value)))
