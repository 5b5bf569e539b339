"""One request in the engine: its sequence, and how its tokens become text and come to an end."""

import secrets
from collections.abc import Set
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from serving.request import FinishReason, Request
from serving.sampler import SampleRow
from serving.sequence import Sequence
from serving.text import Detokenizer

_NUM_SEEDS = 1 << 63


@dataclass(eq=False)
class Job:
    """Owned by the engine. `seed` is the request's own, or was drawn when it came; `eos_ids` end the sequence."""

    sequence: Sequence
    text: Detokenizer
    seed: int
    eos_ids: Set[int]

    @property
    def request(self) -> Request:
        """What the client asked for."""
        return self.sequence.request

    def read(self, token: int, num_tokens: int) -> tuple[str, FinishReason | None]:
        """The text to show for a token that makes the sequence `num_tokens` long, and if it is the last, why."""
        if token in self.eos_ids:
            return self.text.finish(), FinishReason.STOP
        text = self.text.push(token)
        if self.text.is_stopped:
            return text, FinishReason.STOP
        if num_tokens >= self.sequence.limit_tokens:
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
        sampling = self.request.sampling
        return SampleRow(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=self.seed,
            position=len(self.sequence.tokens),
            num_logprobs=sampling.num_logprobs,
        )


def make_job(request: Request, tokenizer: PreTrainedTokenizerBase, eos_ids: Set[int], max_model_tokens: int) -> Job:
    """A job that has not read its resumed tokens yet; it ends at `max_tokens` or with the context."""
    sampling = request.sampling
    return Job(
        sequence=Sequence(request, min(len(request.prompt_tokens) + sampling.max_tokens, max_model_tokens)),
        text=Detokenizer(tokenizer, sampling.stop),
        seed=secrets.randbelow(_NUM_SEEDS) if sampling.seed is None else sampling.seed,
        eos_ids=frozenset() if sampling.ignore_eos else eos_ids,
    )
