"""Check a request before the engine takes it."""

from cluster.errors import ContextLengthError, InvalidRequestError
from serving.engine.request import Request


def check_request(request: Request, vocab_size: int, max_model_tokens: int) -> None:
    """Raise InvalidRequestError if the request can never be served: ContextLengthError if its prompt is too long."""
    num_prompt, limit = len(request.prompt_tokens), max_model_tokens - 1
    if num_prompt == 0:
        raise InvalidRequestError("the prompt is empty: send at least one token")
    if num_prompt > limit:
        raise ContextLengthError(f"the prompt has {num_prompt} tokens, the model takes at most {limit}")
    if request.sampling.max_tokens < 1:
        raise InvalidRequestError(f"max_tokens is {request.sampling.max_tokens}: it must be at least 1")
    tokens = (*request.prompt_tokens, *request.resumed_tokens)
    if not 0 <= min(tokens) <= max(tokens) < vocab_size:
        raise InvalidRequestError(f"the prompt has token ids outside the vocabulary of {vocab_size}")
    for token in request.sampling.stop_token_ids:
        if not 0 <= token < vocab_size:
            raise InvalidRequestError(f"stop_token_ids has {token}: the model's ids are 0 to {vocab_size - 1}")
