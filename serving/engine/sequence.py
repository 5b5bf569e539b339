"""The engine's state of one request: its tokens, what it holds while it runs, and how its tokens become text."""

import secrets
import time
from collections.abc import Sequence, Set
from dataclasses import dataclass, field

from torch import Tensor

from cluster.config.settings import ServingConfig
from serving.adapters.cache import ResidentAdapter
from serving.engine.adjust import Adjuster, adjust, new_adjuster
from serving.engine.detokenizer import Detokenizer, Vocabulary
from serving.engine.matcher import Matcher
from serving.engine.request import FinishReason, Request, SamplingParams, TokenEvent, TokenLogprob
from serving.engine.sampler import SampleRow
from serving.memory.prefixes import PrefixKeys
from serving.memory.swap import Swapped

_NUM_SEEDS = 1 << 63


@dataclass(eq=False, slots=True)
class SequenceState:
    """One object per request. The engine creates it, and owns text, log-probabilities, matcher and adjuster.

    The Scheduler alone changes the rest.

    A sequence that waits for its first step has no `precedence` and no `row`. A running one has both. A preempted one
    has a `precedence` only.
    """

    request: Request
    limit_tokens: int  # it ends at this length at the latest: by `max_tokens` or by the context length
    text: Detokenizer
    seed: int  # the request's, or drawn when the request came
    end_ids: Set[int]  # the tokens that end it
    adjuster: Adjuster | None = None  # None: its logits stay as they are
    matcher: Matcher | None = None  # its place in its grammar; None: it may say anything
    prefix_keys: PrefixKeys | None = None  # None: it neither reads the prefix cache nor adds to it
    deadline_at: float | None = None  # when its first token is due, by the monotonic clock

    id: str = field(init=False)
    adapter_key: str | None = field(init=False)  # the adapter's content hash; None for the bare base model
    tokens: list[int] = field(init=False)  # prompt, then output; resumed tokens count as output

    row: int | None = None  # its row of the RunningTable, which has its pages
    resident: ResidentAdapter | None = None  # its adapter in the arena
    precedence: tuple[int, int] | None = None  # priority, then order of admission; the largest is preempted first
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # of the prompt's tokens from the second on
    num_scored: int = 0  # how many log-probabilities of the prompt are computed
    num_given: int = 0  # its length when it was admitted
    swapped: Swapped | None = None  # its KV on the host while it is preempted

    def __post_init__(self) -> None:
        request = self.request
        self.id = request.id
        self.adapter_key = request.adapter.key if request.adapter else None
        self.tokens = [*request.prompt_tokens, *request.resumed_tokens]

    @property
    def num_to_score(self) -> int:
        """How many of the prompt's tokens get log-probabilities: all but the first, or none."""
        request = self.request
        is_asked = request.sampling.num_prompt_logprobs is not None and not request.resumed_tokens
        return len(request.prompt_tokens) - 1 if is_asked else 0

    def event(self, token: int, logprobs: tuple[TokenLogprob, ...]) -> TokenEvent:
        """Return the event of a token that was just appended, and read it. A resumed sequence has no first event."""
        num_tokens = len(self.tokens)
        if num_tokens > self.limit_tokens:  # nothing was to be generated
            return TokenEvent(self.id, finish_reason=FinishReason.LENGTH, prompt_logprobs=tuple(self.prompt_logprobs))
        text, reason = self.read(token, num_tokens)
        if reason is None and not self.prompt_logprobs:  # most tokens
            return TokenEvent(self.id, (token,), text, logprobs)
        event = TokenEvent(self.id, (token,), text, logprobs, reason)
        if self.prompt_logprobs:
            event = event._replace(prompt_logprobs=tuple(self.prompt_logprobs))
            self.prompt_logprobs = []
        return event if reason is not FinishReason.STOP else self._stopped(event, token)

    def _stopped(self, event: TokenEvent, token: int) -> TokenEvent:
        """Return the event of the sequence's last token with the reason why it stopped."""
        sampling, stopped_by = self.request.sampling, self.text.stopped_by
        if token not in self.end_ids:
            return event._replace(stop_reason=stopped_by)
        stop_reason = token if token in sampling.stop_token_ids else None
        return event._replace(stop_reason=stop_reason, has_end_token=not sampling.include_stop_str_in_output)

    def read(self, token: int, num_tokens: int) -> tuple[str, FinishReason | None]:
        """Return the text to show for the `num_tokens`-th token, and the finish reason if the sequence ends with it."""
        if token in self.end_ids:
            shown = self.text.push(token) if self.request.sampling.include_stop_str_in_output else ""
            return shown + self.text.finish(), FinishReason.STOP
        text = self.text.push(token)
        if self.matcher is not None:
            self.matcher.take(token)
        if self.text.stopped_by is not None:
            return text, FinishReason.STOP
        if self.matcher is not None and self.matcher.is_complete:
            return text + self.text.finish(), FinishReason.STOP
        if num_tokens >= self.limit_tokens:
            return text + self.text.finish(), FinishReason.LENGTH
        return text, None

    def replay(self) -> FinishReason | None:
        """Read the resumed tokens; return the finish reason if they end the sequence.

        The client already has their text, so it is dropped. Text that was held back is shown later. Raises
        InvalidRequestError if they do not match the grammar.
        """
        for num_tokens, token in enumerate(self.request.resumed_tokens, start=len(self.request.prompt_tokens) + 1):
            _, reason = self.read(token, num_tokens)
            if self.matcher is not None and self.matcher.error is not None:
                raise self.matcher.error
            if reason is not None:
                return reason
        return None

    def sample_row(self) -> SampleRow:
        """Return how to choose its next token."""
        sampling = self.request.sampling
        return SampleRow(
            sampling.temperature,
            sampling.top_p,
            sampling.top_k,
            self.seed,
            len(self.tokens),
            sampling.num_logprobs,
            sampling.min_p,
            is_adjusted=self.adjuster is not None,
            is_constrained=self.matcher is not None,
        )


def end_ids_of(sampling: SamplingParams, vocabulary: Vocabulary, eos_ids: frozenset[int]) -> frozenset[int]:
    """Return the tokens that end a sequence. `eos_ids` are those of its dialect."""
    end_ids = (frozenset() if sampling.ignore_eos else eos_ids) | frozenset(sampling.stop_token_ids)
    return end_ids | vocabulary.special_ids(sampling.stop)  # by id, because the text may leave them out


def new_sequence(
    request: Request,
    vocabulary: Vocabulary,
    eos_ids: frozenset[int],
    max_model_tokens: int,
    config: ServingConfig,
    matcher: Matcher | None = None,
) -> SequenceState:
    """Return the state of a request that has just come. Call `replay` next to read its resumed tokens."""
    sampling = request.sampling
    end_ids = end_ids_of(sampling, vocabulary, eos_ids)
    return SequenceState(
        request=request,
        limit_tokens=min(len(request.prompt_tokens) + sampling.max_tokens, max_model_tokens),
        text=Detokenizer(
            vocabulary if sampling.skip_special_tokens else vocabulary.with_special,
            sampling.stop,
            includes_stop=sampling.include_stop_str_in_output,
            min_tokens=sampling.min_tokens,
        ),
        seed=secrets.randbelow(_NUM_SEEDS) if sampling.seed is None else sampling.seed,
        end_ids=end_ids,
        adjuster=new_adjuster(sampling, request.prompt_tokens, end_ids),
        matcher=matcher,
        prefix_keys=_prefix_keys(request, config),
        deadline_at=_deadline_at(request),
    )


def adjust_rows(sequences: Sequence[SequenceState], logits_RV: Tensor, indices: Sequence[int]) -> None:
    """Adjust the logits of R of the sequences, given by index, in place. See `serving.engine.adjust`."""
    chosen = [sequences[index] for index in indices]
    adjusters = [sequence.adjuster for sequence in chosen if sequence.adjuster is not None]
    adjust(logits_RV, adjusters, [sequence.tokens for sequence in chosen])


def _prefix_keys(request: Request, config: ServingConfig) -> PrefixKeys | None:
    if config.prefix_cache == "off" or not request.terms.can_cache:
        return None
    tenant = request.terms.tenant if config.prefix_cache == "tenant" else ""
    owner = request.adapter.key if request.adapter else None
    return PrefixKeys(owner, (tenant, request.terms.cache_salt), config.page_tokens)


def _deadline_at(request: Request) -> float | None:
    """Resumed requests ignore the deadline: their first token came from another replica."""
    deadline_s = request.terms.first_token_deadline_s
    return None if deadline_s is None or request.resumed_tokens else time.monotonic() + deadline_s
