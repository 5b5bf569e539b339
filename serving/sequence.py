"""One request on its way through the engine: its tokens, and the pages and pin that it holds while it runs."""

from array import array
from dataclasses import dataclass, field
from typing import NamedTuple

from serving.adapters import ResidentAdapter
from serving.prefixes import PrefixKeys
from serving.request import Request
from serving.swap import Swapped


@dataclass(eq=False, slots=True)
class Sequence:
    """Mutable; owned and changed by the Scheduler alone.

    `tokens` are the prompt, then the output: resumed tokens count as output. KV is stored for the first `num_stored` of
    them, in `pages`, the first `num_cached_pages` of which are known to the prefix cache. `limit_tokens` is where it
    ends at the latest, by `max_tokens` or by the context length. `rank` orders those that run: priority, then
    admission; the last gives way first. It had `num_given` tokens when it first ran. `prefix_keys` None means that it
    neither uses cached KV nor leaves any. `swapped` is its KV on the host while it is preempted.
    """

    request: Request
    limit_tokens: int
    prefix_keys: PrefixKeys | None = None
    deadline_at: float | None = None
    tokens: list[int] = field(init=False)
    adapter_key: str | None = field(init=False)  # its adapter's content hash, None for the bare base model
    num_stored: int = 0
    num_cached_pages: int = 0
    pages: "array[int]" = field(default_factory=lambda: array("i"))
    resident: ResidentAdapter | None = None
    rank: tuple[int, int] | None = None
    num_given: int = 0
    num_preemptions: int = 0
    swapped: Swapped | None = None

    def __post_init__(self) -> None:
        self.tokens = [*self.request.prompt_tokens, *self.request.resumed_tokens]
        self.adapter_key = self.request.adapter.key if self.request.adapter else None

    @property
    def num_pending(self) -> int:
        """Tokens whose KV is not stored yet; 1 while it decodes."""
        return len(self.tokens) - self.num_stored


class Chunk(NamedTuple):
    """A sequence's share of one step: its tokens [start, end). It samples when nothing is pending after it."""

    sequence: Sequence
    start: int
    end: int
    does_sample: bool
