"""Check a request before the engine takes it, and say why a sequence has no next token."""

from collections.abc import Iterable

from cluster.errors import (
    ContextLengthError,
    InvalidAdapterError,
    InvalidCheckpointError,
    InvalidRequestError,
    ReloraError,
)
from serving.engine.request import AdapterRef, Request, SamplingParams


def check_request(request: Request, vocab_size: int, max_model_tokens: int) -> None:
    """Raise InvalidRequestError if the request can never be served: ContextLengthError if its prompt is too long."""
    num_prompt, limit = len(request.prompt_tokens), max_model_tokens - 1
    if num_prompt == 0:
        raise InvalidRequestError("the prompt is empty: send at least one token")
    if num_prompt > limit:
        raise ContextLengthError(f"the prompt has {num_prompt} tokens, the model takes at most {limit}")
    if request.sampling.max_tokens < 0:
        raise InvalidRequestError(f"max_tokens is {request.sampling.max_tokens}: it must be at least 0")
    if request.sampling.min_tokens > request.sampling.max_tokens:
        low, high = request.sampling.min_tokens, request.sampling.max_tokens
        raise InvalidRequestError(f"min_tokens is {low}, above max_tokens, which is {high}")
    tokens = (*request.prompt_tokens, *request.resumed_tokens)
    if not 0 <= min(tokens) <= max(tokens) < vocab_size:
        raise InvalidRequestError(f"the prompt has token ids outside the vocabulary of {vocab_size}")
    for name, ids in _named_tokens(request.sampling):
        for token in ids:
            if not 0 <= token < vocab_size:
                raise InvalidRequestError(f"{name} has {token}: the model's ids are 0 to {vocab_size - 1}")


def no_token_error(adapter: AdapterRef | None, *, is_blocked: bool) -> ReloraError:
    """Return the error of a sequence whose logits are invalid or, if `is_blocked`, allow no token."""
    if is_blocked:
        return InvalidRequestError(
            "no token may come next: allowed_token_ids, bad_words, min_tokens and structured output exclude all of them"
        )
    if adapter is None:
        return InvalidCheckpointError("the base model's logits for this prompt are NaN or infinite")
    return InvalidAdapterError(f"adapter {adapter.label} makes the logits NaN or infinite")


def _named_tokens(sampling: SamplingParams) -> Iterable[tuple[str, Iterable[int]]]:
    yield "stop_token_ids", sampling.stop_token_ids
    yield "logit_bias", [token for token, _ in sampling.logit_bias]
    yield "allowed_token_ids", sampling.allowed_token_ids
