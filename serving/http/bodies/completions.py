"""The body of completions."""

from dataclasses import replace
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from serving.gateway.calls import Call
from serving.gateway.prompts import Prompt
from serving.http.bodies.generation import MAX_CHOICES, GenerationBody
from serving.http.bodies.sampling import MAX_LOGPROBS


class CompletionBody(GenerationBody):
    """The body of POST /v1/completions."""

    prompt: list[Any]
    max_tokens: Annotated[int, Field(ge=0)] = 16
    echo: bool = False
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
        name, number = ("n", self.n) if self._num_candidates is None else ("best_of", self._num_candidates)
        if number * len(self.prompt) > MAX_CHOICES:
            raise ValueError(f"prompt: {len(self.prompt)} prompts times {name}={number} exceed {MAX_CHOICES} choices")
        return self

    def call(self, id: str, tenant: str) -> Call:
        """Return the call that this body asks for. With `echo` the logprobs are those of the prompt too."""
        sampling = self._sampling(self.max_tokens, self.logprobs)
        if self.echo and self.logprobs is not None:
            sampling = replace(sampling, num_prompt_logprobs=max(self.logprobs, self.prompt_logprobs or 0))
        return Call(
            id=id,
            model=self.model,
            prompts=tuple(self.prompt),
            sampling=sampling,
            terms=self._terms(tenant),
            echo=self.echo,
            **self._details(),
        )


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and all(map(_is_token, value)))
