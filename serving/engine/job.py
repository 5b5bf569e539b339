"""One request in the engine: a sequence, and how its tokens become text and come to an end."""

import secrets
import time
from collections.abc import Set
from dataclasses import dataclass, field

from cluster.config import ServingConfig
from serving.engine.detokenizer import Detokenizer, Vocabulary
from serving.engine.request import FinishReason, Request
from serving.engine.sampler import SampleRow
from serving.engine.sequence import Sequence
from serving.memory.prefixes import PrefixKeys

_NUM_SEEDS = 1 << 63


@dataclass(eq=False, slots=True, kw_only=True)
class Job(Sequence):
    """What a Sequence does not say is the engine's own.

    `seed` is the request's, or was drawn when it came; `eos_ids` end the sequence.
    """

    text: Detokenizer
    seed: int
    eos_ids: Set[int]
    is_plain: bool = field(init=False)  # whether the likeliest token is all that is asked for

    def __post_init__(self) -> None:
        Sequence.__post_init__(self)  # super() does not find a class that slots have made anew
        sampling = self.request.sampling
        self.is_plain = sampling.temperature == 0 and sampling.num_logprobs is None

    def read(self, token: int, num_tokens: int) -> tuple[str, FinishReason | None]:
        """The text to show for a token that makes the sequence `num_tokens` long, and if it is the last, why."""
        if token in self.eos_ids:
            return self.text.finish(), FinishReason.STOP
        text = self.text.push(token)
        if self.text.is_stopped:
            return text, FinishReason.STOP
        if num_tokens >= self.limit_tokens:
            return text + self.text.finish(), FinishReason.LENGTH
        return text, None

    def replay(self) -> FinishReason | None:
        """Read the resumed tokens, and why they end the sequence if they do.

        The client has the text of these tokens, so none is shown again; what was held back still is.
        """
        for num_tokens, token in enumerate(self.request.resumed_tokens, start=len(self.request.prompt_tokens) + 1):
            _, reason = self.read(token, num_tokens)
            if reason is not None:
                return reason
        return None

    def sample_row(self) -> SampleRow:
        """How its next token is chosen."""
        how = self.request.sampling
        return SampleRow(how.temperature, how.top_p, how.top_k, self.seed, len(self.tokens), how.num_logprobs)


def make_job(
    request: Request, vocabulary: Vocabulary, eos_ids: Set[int], max_model_tokens: int, config: ServingConfig
) -> Job:
    """A job that has not read its resumed tokens yet; it ends at `max_tokens` or with the context."""
    sampling = request.sampling
    return Job(
        request=request,
        limit_tokens=min(len(request.prompt_tokens) + sampling.max_tokens, max_model_tokens),
        prefix_keys=_prefix_keys(request, config),
        deadline_at=_deadline_at(request),
        text=Detokenizer(vocabulary, sampling.stop),
        seed=secrets.randbelow(_NUM_SEEDS) if sampling.seed is None else sampling.seed,
        eos_ids=frozenset() if sampling.ignore_eos else eos_ids,
    )


def _prefix_keys(request: Request, config: ServingConfig) -> PrefixKeys | None:
    if config.prefix_cache == "off" or not request.terms.can_cache:
        return None
    tenant = request.terms.tenant if config.prefix_cache == "tenant" else ""
    owner = request.adapter.key if request.adapter else None
    return PrefixKeys(owner, (tenant, request.terms.cache_salt), config.page_tokens)


def _deadline_at(request: Request) -> float | None:
    """When the first token is due, by the monotonic clock; one that another replica has begun is not refused."""
    deadline_s = request.terms.first_token_deadline_s
    return None if deadline_s is None or request.resumed_tokens else time.monotonic() + deadline_s
