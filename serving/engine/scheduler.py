"""Choose the sequences of each step: continuous batching with chunked prefill over paged memory.

A step has a budget of `max_batch_tokens` tokens, which it spends in this order:

1. Decodes: one token for each running sequence whose prompt is computed.
2. Prefills under way: the next chunk of each prompt that an earlier budget cut short.
3. Preempted sequences, in the order of their precedence.
4. New sequences, in the order that `serving.engine.waiting` chooses.

A sequence of kind 3 or 4 is admitted while fewer than `max_sequences` run, and if there is room for its adapter and
all its tokens so far. Idle adapters and cached prefixes are evicted to make room. If it still does not fit, the step
admits no more sequences. While the batch is full, the adapters of the next new sequences are prefetched.

Pages are allocated when they are needed. When a decode needs one and none can be freed, the last running sequence is
preempted: the least urgent one, and among equals the one admitted last. It gives up its pages. Later its KV is copied
back from the host or recomputed (`serving.memory.swap`).

There is no deadlock. The first running sequence can always continue, because all others can be preempted for it, and
`submit` refuses a request that could not run alone.
"""

from bisect import insort
from collections.abc import Iterator, Sequence

from cluster.config.settings import ServingConfig
from cluster.errors import InvalidRequestError
from serving.adapters.cache import AdapterCache
from serving.engine.running import RunningTable, SchedulerOutput
from serving.engine.sequence import SequenceState
from serving.engine.waiting import WaitingQueue
from serving.memory.eviction import EvictionQueue
from serving.memory.pages import PageAllocator
from serving.memory.prefixes import PrefixCache
from serving.memory.swap import SwapSpace

# Adapters of this many flows are prefetched, one copy a step. No copy evicts the adapter of another of these flows.
_PREFETCH_FLOWS = 4
# Prompt tokens of a step that get log-probabilities: 0.13 GB of logits for a vocabulary of 128,000 tokens.
_MAX_PROMPT_LOGITS = 256


class Scheduler:
    """Owns all sequences and the pages of their KV. Running sequences are kept in the order of their precedence."""

    def __init__(
        self,
        config: ServingConfig,
        allocator: PageAllocator,
        adapters: AdapterCache,
        prefixes: PrefixCache,
        evictions: EvictionQueue,
        swaps: SwapSpace,
    ):
        self._allocator = allocator
        self._adapters = adapters
        self._prefixes = prefixes
        self._evictions = evictions
        self._swaps = swaps
        self._page_tokens = config.page_tokens
        self._max_batch_tokens = config.max_batch_tokens
        # The budget must give each running sequence at least one token a step.
        self._max_running = min(config.max_sequences, config.max_batch_tokens)
        self._waiting = WaitingQueue(
            adapters.is_resident,
            max_waiting=config.max_queue,
            max_per_tenant=config.max_queue_per_tenant or None,
            max_overtakes=config.max_overtakes,
        )
        self._preempted: list[SequenceState] = []  # by precedence
        self._running: list[SequenceState] = []  # by precedence
        self._table = RunningTable(self._max_running, config.page_tokens)
        self._num_admitted = 0
        self.num_preemptions = 0

    @property
    def num_running(self) -> int:
        """The number of sequences that hold pages."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """The number of sequences that wait for their first step, or for their next one after a preemption."""
        return len(self._waiting) + len(self._preempted)

    def submit(self, sequence: SequenceState) -> None:
        """Queue a sequence.

        Raises InvalidRequestError if it can never run, OverloadedError or TenantLimitError if the queue has no room,
        and NotFoundError if its adapter is not on the host.
        """
        self._waiting.check_room(sequence.request.terms.tenant)
        key = sequence.adapter_key
        if key is not None:
            self._adapters.hold(key)
        try:
            self._check_fits(sequence)
        except InvalidRequestError:
            self._drop_adapter(sequence)
            raise
        self._waiting.add(sequence)

    def overdue(self, now: float) -> list[SequenceState]:
        """Return each waiting sequence once when its first token is overdue. The caller has to `finish` it."""
        return list(self._waiting.overdue(now))

    def schedule(self) -> SchedulerOutput:
        """Pick the sequences of the next step, and acquire their pages and adapters."""
        self._secure_pages()
        decodes = self._table.decodes()
        prefills: list[tuple[SequenceState, int]] = []
        budget = self._max_batch_tokens - len(decodes)
        logit_budget = _MAX_PROMPT_LOGITS
        candidates = self._prefills()
        while budget and (sequence := next(candidates, None)):
            num_tokens = min(budget, self._table.num_pending(sequence))
            if sequence.num_scored < sequence.num_to_score:
                num_tokens = min(num_tokens, logit_budget)
                logit_budget -= num_tokens
            if num_tokens:
                prefills.append((sequence, num_tokens))
                budget -= num_tokens
        if len(self._running) == self._max_running:
            self._prefetch()
        return self._table.output(decodes, prefills)

    def commit(self, scheduled: SchedulerOutput, tokens: Sequence[int]) -> None:
        """Record a step whose KV is stored. `tokens` has one sampled token for each sequence that samples."""
        self._table.commit(scheduled, tokens)
        for sequence, first, last in self._table.uncached():
            self._cache_pages(sequence, first, last)

    def finish(self, sequence: SequenceState) -> None:
        """Drop a sequence in any state. This is the one place where everything that it holds is freed."""
        if sequence.precedence is None:
            self._waiting.remove(sequence)
        elif sequence.row is not None:
            self._running.remove(sequence)
            self._vacate(sequence)
        else:
            self._preempted.remove(sequence)
            self._drop_swapped(sequence)
        if sequence.precedence is not None:
            self._waiting.charge(sequence, len(sequence.tokens) - sequence.num_given)
        self._drop_adapter(sequence)

    def check_integrity(self) -> None:
        """Assert that every page has the right owners, and that pins and holds match the sequences."""
        owned = [*self._adapters.owned_pages(), *map(self._table.pages, self._running), self._prefixes.owned_pages()]
        self._allocator.check_integrity(owned)
        self._table.check_integrity(self._running)
        self._adapters.check_integrity()
        self._prefixes.check_integrity()
        self._evictions.check_integrity()
        self._waiting.check_integrity()
        self._swaps.check_integrity(s.swapped for s in self._preempted if s.swapped is not None)
        for sequence in (*self._waiting, *self._preempted):
            assert sequence.row is None, "a waiting sequence has a row"
            assert sequence.resident is None, "a waiting sequence pins its adapter"
        num_pins = sum(s.resident is not None for s in self._running)
        assert self._adapters.num_pins == num_pins, "pins of adapters differ from running sequences"
        assert all(s.swapped is None for s in (*self._running, *self._waiting)), "only preempted KV is swapped"
        everyone = [*self._running, *self._preempted, *self._waiting]
        num_holds = sum(s.adapter_key is not None for s in everyone)
        assert self._adapters.num_holds == num_holds, "holds of adapters differ from sequences"

    def _secure_pages(self) -> None:
        """Give each decode that needs a new page one, and preempt others if necessary.

        If the last running sequence itself needs a page, it skips this step before it is preempted.
        """
        short = self._table.short_of_pages()
        while not self._evictions.make_room(len(short)):
            last = self._running[-1]
            if last in short:
                short.remove(last)
            else:
                self._preempt_last()
        if short:
            self._table.append_pages(short, self._allocator.allocate(len(short)))

    def _prefills(self) -> Iterator[SequenceState]:
        yield from sorted(self._table.prefills(), key=_precedence)
        while len(self._running) < self._max_running:
            sequence = self._preempted[0] if self._preempted else self._waiting.choose()
            if sequence is None or not self._admit(sequence):
                return
            yield sequence

    def _admit(self, sequence: SequenceState) -> bool:
        """Acquire a sequence's adapter, and pages for its tokens so far, and let it run. False if there is no room."""
        key, num_tokens = sequence.adapter_key, len(sequence.tokens)
        known = self._known_pages(sequence)
        num_missing = self._num_pages(num_tokens) - len(known)
        num_adapter_pages = self._adapters.num_pages_missing(key) if key is not None else 0
        if not self._evictions.make_room(num_missing + num_adapter_pages, keep=(key,)):
            self._prefixes.release(known)
            return False
        if key is not None:
            sequence.resident = self._adapters.acquire(key)
        if sequence.prefix_keys is not None:
            self._prefixes.count(known, num_tokens)
        pages = known + self._allocator.allocate(num_missing)
        self._table.add(sequence, pages, self._swap_in(sequence, pages, len(known)), len(known))
        self._move_to_running(sequence)
        return True

    def _prefetch(self) -> None:
        """Copy one adapter of the next new sequences into the arena, so that they need not wait for it later."""
        upcoming = self._waiting.upcoming(_PREFETCH_FLOWS)
        for key in upcoming:
            num_pages = self._adapters.num_pages_missing(key)
            if num_pages and self._evictions.make_room(num_pages, keep=upcoming):
                self._adapters.prefetch(key)
                return

    def _known_pages(self, sequence: SequenceState) -> list[int]:
        """Take the cached pages of a sequence's longest known prefix, without its last token: its logits are wanted.

        A sequence whose prompt still needs log-probabilities takes none.
        """
        if sequence.prefix_keys is None or sequence.num_scored < sequence.num_to_score:
            return []
        num_pages = (len(sequence.tokens) - 1) // self._page_tokens
        return self._prefixes.take(sequence.prefix_keys.up_to(sequence.tokens, num_pages))

    def _move_to_running(self, sequence: SequenceState) -> None:
        if sequence.precedence is None:
            self._num_admitted += 1
            sequence.precedence = (sequence.request.terms.priority, self._num_admitted)
            sequence.num_given = len(sequence.tokens)
            self._waiting.admit(sequence, self._table.num_pending(sequence))
        else:
            self._preempted.remove(sequence)
        insort(self._running, sequence, key=_precedence)

    def _cache_pages(self, sequence: SequenceState, first: int, last: int) -> None:
        keys = sequence.prefix_keys
        assert keys is not None, "the sequence does not use the prefix cache"
        names = keys.up_to(sequence.tokens, last)[first:]
        pages = self._table.pages(sequence)[first:last]
        put = [self._prefixes.put(name, page, keys.owner) for name, page in zip(names, pages, strict=True)]
        self._table.cache_pages(sequence, first, put)

    def _preempt_last(self) -> None:
        """Take the pages of the last running sequence. `SwapSpace.save` decides whether its KV is kept on the host."""
        sequence = self._running.pop()
        # Other sequences share some of its first pages. The rest belong to it and the prefix cache alone.
        pages = self._table.pages(sequence)
        num_cached = self._table.num_cached(sequence)
        num_shared = sum(self._allocator.num_owners(page) > 2 for page in pages[:num_cached])
        sequence.swapped = self._swaps.save(pages, num_shared, self._table.num_stored(sequence))
        self._vacate(sequence)
        insort(self._preempted, sequence, key=_precedence)
        self.num_preemptions += 1

    def _swap_in(self, sequence: SequenceState, pages: Sequence[int], num_known: int) -> int:
        """Copy swapped KV to the pages after the known ones. Return how many tokens have their KV stored now.

        The swapped KV is useless, and is dropped, if pages before it are missing.
        """
        swapped = sequence.swapped
        num_stored = num_known * self._page_tokens
        if swapped is not None and swapped.first_page <= num_known and num_stored < swapped.num_stored:
            self._swaps.load(swapped, num_known, pages[num_known:])
            num_stored = swapped.num_stored
        self._drop_swapped(sequence)
        return num_stored

    def _drop_swapped(self, sequence: SequenceState) -> None:
        if sequence.swapped is not None:
            self._swaps.drop(sequence.swapped)
            sequence.swapped = None

    def _vacate(self, sequence: SequenceState) -> None:
        self._prefixes.release(self._table.pages(sequence))
        self._table.remove(sequence)
        if sequence.resident is not None:
            self._adapters.release(sequence.resident.key)
            sequence.resident = None

    def _drop_adapter(self, sequence: SequenceState) -> None:
        key = sequence.adapter_key
        if key is not None and not self._adapters.drop(key):
            self._prefixes.forget(key)

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_tokens)

    def _check_fits(self, sequence: SequenceState) -> None:
        # The last token is never fed back, so no KV is stored for it.
        num_kv_pages = self._num_pages(max(sequence.limit_tokens - 1, len(sequence.tokens)))
        num_adapter_pages = self._adapters.num_pages(sequence.adapter_key) if sequence.adapter_key is not None else 0
        if num_kv_pages + num_adapter_pages > self._allocator.num_pages:
            raise InvalidRequestError(
                f"the request needs {num_kv_pages} pages of memory for up to {sequence.limit_tokens} tokens and "
                f"{num_adapter_pages} for its adapter, the engine has {self._allocator.num_pages}: "
                "ask for fewer tokens, or raise serving.memory_bytes"
            )


def _precedence(sequence: SequenceState) -> tuple[int, int]:
    assert sequence.precedence is not None, "the sequence has never run"
    return sequence.precedence
