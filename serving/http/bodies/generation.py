"""The fields that completions and chat completions share, and the fields that are accepted although they do nothing."""

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serving.engine.request import Terms
from serving.http.bodies.sampling import SamplingFields

MAX_CHOICES = 128
MAX_PRIORITY = 100

# Fields for OpenAI's own bookkeeping. Clients send them, and they do not change the answer.
IGNORED = frozenset(
    (
        *("user", "metadata", "store", "service_tier", "safety_identifier"),
        *("prompt_cache_key", "prompt_cache_retention"),
        "guided_decoding_backend",  # of older vLLM: the library that enforces a grammar
    )
)
# Fields that this server does not support, with the values that ask for nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "spaces_between_special_tokens": (True,),
    "return_tokens_as_token_ids": (False,),
    "logits_processors": ([],),
}


class StreamOptions(BaseModel):
    """The options of a stream.

    `include_usage` adds a chunk with token counts, `continuous_usage_stats` the counts so far to every other chunk.
    `include_obfuscation` is ignored.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class GenerationBody(SamplingFields):
    """The fields that completions and chat completions share.

    Beside OpenAI's fields it has vLLM's `priority` (lower is more urgent) and `cache_salt`. With `cache` False a
    request neither uses the KV of earlier requests nor leaves any. With `first_token_deadline_s` it is refused if its
    first token cannot come in time.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: Annotated[str, Field(min_length=1)]
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
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

    @model_validator(mode="after")
    def _check_best_of(self) -> Self:
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of: must be at least n, which is {self.n}")
        if self.stream and self._num_candidates is not None:
            raise ValueError("best_of: the best choices are known at the end, so they cannot be streamed")
        return self

    @model_validator(mode="after")
    def _check_prompt_logprobs(self) -> Self:
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs: not available with stream=true")
        return self

    @property
    def _num_candidates(self) -> int | None:
        """The continuations to generate of each prompt, if the best are to be chosen from them."""
        return self.best_of if self.best_of not in (None, self.n) else None

    def _details(self) -> dict[str, Any]:
        """Return the fields of a call that all bodies have."""
        return {
            "num_choices": self.n,
            "best_of": self._num_candidates,
            "bad_words": tuple(self.bad_words),
            "truncate_prompt_tokens": self.truncate_prompt_tokens,
            "prompt_logprobs": self.prompt_logprobs,
            "return_token_ids": self.return_token_ids,
        }

    def _terms(self, tenant: str) -> Terms:
        return Terms(self.priority, tenant, self.first_token_deadline_s, self.cache_salt or "", self.cache)


def _is_neutral(key: str, value: Any) -> bool:
    return key in IGNORED or value in NEUTRAL.get(key, ())
