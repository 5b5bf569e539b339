"""The fields that say how tokens are chosen and where an answer ends."""

from typing import Annotated, Any

from pydantic import Field, field_validator

from serving.engine.request import SamplingParams
from serving.http.bodies.constraints import ConstraintFields

MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_TOKENS = 128
MAX_BIASES = 1024
MAX_BAD_WORDS = 1024

Token = Annotated[int, Field(ge=0)]


class SamplingFields(ConstraintFields):
    """Fields of OpenAI, and extra parameters of vLLM with their names and meaning there (see docs/api-fields.md)."""

    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] = Field(default={}, max_length=MAX_BIASES)
    bad_words: list[Annotated[str, Field(min_length=1)]] = Field(default=[], max_length=MAX_BAD_WORDS)
    allowed_token_ids: list[Token] = Field(default=[], max_length=MAX_BIASES)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] = 0
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default=[], max_length=MAX_STOPS)
    stop_token_ids: list[Token] = Field(default=[], max_length=MAX_STOP_TOKENS)
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    return_token_ids: bool = False

    @field_validator("stop", mode="before")
    @classmethod
    def _wrap_single_stop(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _read_token_ids(cls, value: Any) -> Any:
        """JSON's keys are strings, and strict validation takes no string for a number."""
        if not isinstance(value, dict):
            return value
        if not all(str(key).isascii() and str(key).isdigit() for key in value):
            raise ValueError("must map token ids to numbers from -100 to 100")
        return {int(key): bias for key, bias in value.items()}

    @field_validator("truncate_prompt_tokens")
    @classmethod
    def _check_truncation(cls, value: int | None) -> int | None:
        if value == 0:
            raise ValueError("must be at least 1, or -1 for the most that leaves room for the answer")
        return value

    def _sampling(self, max_tokens: int | None, num_logprobs: int | None) -> SamplingParams:
        limit: dict[str, Any] = {} if max_tokens is None else {"max_tokens": max_tokens}
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=tuple(self.logit_bias.items()),
            allowed_token_ids=tuple(self.allowed_token_ids),
            seed=self.seed,
            min_tokens=self.min_tokens,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            num_logprobs=num_logprobs,
            grammar=self.grammar(),
            num_prompt_logprobs=self.prompt_logprobs,
            **limit,
        )
