"""What a client asked for, and what it gets back. All frozen: whoever holds one may keep it."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 switch those filters off. With a `seed` the same request gives
    the same tokens in whatever batch, after preemption and on whatever replica: the random number of a token depends
    on the seed and on the token's position only. `num_logprobs` is None for no logprobs, or how many alternatives to
    return (0: the chosen token's alone).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int = 16
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    num_logprobs: int | None = None


@dataclass(frozen=True)
class Terms:
    """On what terms a request is served, beside others.

    `priority`: lower is more urgent. `tenant` is whose share of the queue it takes. With `first_token_deadline_s` it is
    refused once its first token cannot come in that time. KV of its prefix is shared with requests of the same
    `cache_salt`, and with none where `can_cache` is False.
    """

    priority: int = 0
    tenant: str = ""
    first_token_deadline_s: float | None = None
    cache_salt: str = ""
    can_cache: bool = True


@dataclass(frozen=True)
class AdapterRef:
    """One version of one adapter: enough for any replica to fetch, load and account for it.

    `key` is the content hash and is what caches go by, so that a reload, a rename or an alias can never meet stale
    weights. `blob_key` is where the files are in the blob store. `name` is for people.
    """

    key: str
    name: str
    version: int
    blob_key: str

    @property
    def label(self) -> str:
        """The name that pins this version: `name@version`."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class Request:
    """One sequence to continue. `prompt_tokens` is never empty; `adapter` None is the bare base model.

    `resumed_tokens` are tokens that another replica generated before it died: they count as output, not as prompt.
    """

    id: str
    prompt_tokens: tuple[int, ...]
    sampling: SamplingParams
    adapter: AdapterRef | None = None
    resumed_tokens: tuple[int, ...] = ()
    terms: Terms = Terms()


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"  # end-of-sequence token or a stop string
    LENGTH = "length"  # max_tokens or the model's context length
    ABORT = "abort"  # cancelled: client gone, deadline, shutdown


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of the chosen token and of the `num_logprobs` likeliest ones, as (token id, logprob) pairs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class TokenEvent(NamedTuple):
    """What is new of one request: tokens and text of one step or more, and on the last event the reason for the end.

    `text` is what may be shown: text that could still become a stop string or an unfinished UTF-8 character is held
    back until it is decided. `error` is set (and `finish_reason` is ABORT) when the request failed on its own account.
    """

    request_id: str
    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: Exception | None = None


# The events of one request up to the one with a finish reason. Closing it aborts the request.
TokenStream = AsyncGenerator[TokenEvent, None]
