"""One request on its way through the engine: its tokens, and what it holds while it runs."""

from dataclasses import dataclass, field

from serving.adapters.cache import ResidentAdapter
from serving.engine.request import Request
from serving.memory.prefixes import PrefixKeys
from serving.memory.swap import Swapped


@dataclass(eq=False, slots=True)
class Sequence:
    """Mutable; owned and changed by the Scheduler alone.

    `tokens` are the prompt, then the output: resumed tokens count as output. While it runs, `row` is its row of the
    RunningTable, which has its pages, and `resident` its adapter in the arena. `limit_tokens` is where it ends at the
    latest, by `max_tokens` or by the context length. `rank` orders those that run: priority, then admission; the last
    gives way first. It had `num_given` tokens when it first ran. `prefix_keys` None means that it neither uses cached
    KV nor leaves any. `swapped` is its KV on the host while it is preempted.
    """

    request: Request
    limit_tokens: int
    id: str = field(init=False)  # its request's
    prefix_keys: PrefixKeys | None = None
    deadline_at: float | None = None
    tokens: list[int] = field(init=False)
    adapter_key: str | None = field(init=False)  # its adapter's content hash, None for the bare base model
    row: int | None = None
    resident: ResidentAdapter | None = None
    rank: tuple[int, int] | None = None
    num_given: int = 0
    num_preemptions: int = 0
    swapped: Swapped | None = None

    def __post_init__(self) -> None:
        self.id = self.request.id
        self.tokens = [*self.request.prompt_tokens, *self.request.resumed_tokens]
        self.adapter_key = self.request.adapter.key if self.request.adapter else None
