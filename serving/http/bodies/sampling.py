"""The fields that say how tokens are chosen and where an answer ends."""

from typing import Annotated, Any

from pydantic import BaseModel, Field, field_validator

from serving.engine.request import SamplingParams

MAX_STOPS = 16
MAX_STOP_TOKENS = 128

Token = Annotated[int, Field(ge=0)]


class SamplingFields(BaseModel):
    """Fields of OpenAI, and extra parameters of vLLM with their names and meaning there (see docs/api-fields.md)."""

    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = 0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default=[], max_length=MAX_STOPS)
    stop_token_ids: list[Token] = Field(default=[], max_length=MAX_STOP_TOKENS)
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    @field_validator("stop", mode="before")
    @classmethod
    def _wrap_single_stop(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    def _sampling(self, max_tokens: int | None, num_logprobs: int | None) -> SamplingParams:
        limit = {} if max_tokens is None else {"max_tokens": max_tokens}
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            seed=self.seed,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            num_logprobs=num_logprobs,
            **limit,
        )
