"""The fields that completions and chat completions share, and the fields that are accepted although they do nothing."""

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from serving.engine.request import SamplingParams, Terms

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


def _is_neutral(key: str, value: Any) -> bool:
    return key in IGNORED or value in NEUTRAL.get(key, ())
