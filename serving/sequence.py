"""One request on its way through the engine: its tokens, and the pages and pin that it holds while it runs."""

from dataclasses import dataclass, field

from serving.adapters import ResidentAdapter
from serving.request import Request


@dataclass(eq=False)
class Sequence:
    """Mutable; owned and changed by the Scheduler alone.

    `tokens` are the prompt, then the output: resumed tokens count as output. KV is stored for the first `num_stored` of
    them, in `pages`. `limit_tokens` is where it ends at the latest, by `max_tokens` or by the context length.
    """

    request: Request
    limit_tokens: int
    tokens: list[int] = field(init=False)
    num_stored: int = 0
    pages: list[int] = field(default_factory=list)
    resident: ResidentAdapter | None = None
    num_preemptions: int = 0

    def __post_init__(self) -> None:
        self.tokens = [*self.request.prompt_tokens, *self.request.resumed_tokens]

    @property
    def adapter_key(self) -> str | None:
        """The adapter's content hash, None for the bare base model."""
        return self.request.adapter.key if self.request.adapter else None

    @property
    def num_output_tokens(self) -> int:
        """Tokens after the prompt."""
        return len(self.tokens) - len(self.request.prompt_tokens)

    @property
    def num_pending(self) -> int:
        """Tokens whose KV is not stored yet; 1 while it decodes."""
        return len(self.tokens) - self.num_stored

    @property
    def is_full(self) -> bool:
        """Whether it may not grow any more."""
        return len(self.tokens) >= self.limit_tokens


@dataclass(frozen=True)
class Chunk:
    """A sequence's share of one step: its tokens [start, end). It samples when nothing is pending after it."""

    sequence: Sequence
    start: int
    end: int
    does_sample: bool
