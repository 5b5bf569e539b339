"""Who runs in the next step, and who waits: continuous batching with chunked prefill over a paged memory.

A step's budget of tokens goes to decodes first, then to prefills under way, then to new sequences, each in the order of
arrival. Memory is never promised twice and never runs out: when a decode finds no page, the youngest sequence gives its
pages back and is computed anew later (recompute, as in vLLM, arXiv 2309.06180, section 4.5). The oldest can always go
on, since all others can be made to give way and a request that could not run alone is refused at `submit`: no deadlock.
"""

from collections import deque
from collections.abc import Iterator

from cluster.errors import InvalidRequestError, OverloadedError
from serving.adapters import AdapterCache
from serving.pages import PageArena
from serving.sequence import Chunk, Sequence


class Scheduler:
    """The owner of all sequences and of the pages of their KV. Both queues are in the order of arrival."""

    def __init__(
        self,
        arena: PageArena,
        adapters: AdapterCache,
        *,
        page_tokens: int,
        max_batch_tokens: int,
        max_sequences: int,
        max_queue: int,
    ):
        self._arena = arena
        self._adapters = adapters
        self._page_tokens = page_tokens
        self._max_batch_tokens = max_batch_tokens
        # Each running sequence is sure of one token a step.
        self._max_running = min(max_sequences, max_batch_tokens)
        self._max_queue = max_queue
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self.num_preemptions = 0

    @property
    def num_running(self) -> int:
        """Sequences that hold pages."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for their first step, or for their next one after a preemption."""
        return len(self._waiting)

    @property
    def num_kv_pages(self) -> int:
        """Pages that hold KV."""
        return sum(len(sequence.pages) for sequence in self._running)

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises InvalidRequestError if it could never run, OverloadedError if the queue is full."""
        if len(self._waiting) >= self._max_queue:
            raise OverloadedError(f"the queue is full: {len(self._waiting)} requests are waiting")
        key = sequence.adapter_key
        if key is not None:
            self._adapters.hold(key)
        try:
            self._check_fits(sequence)
        except InvalidRequestError:
            self._drop_adapter(sequence)
            raise
        self._waiting.append(sequence)

    def schedule(self) -> list[Chunk]:
        """The next step's chunks, sequences of one adapter side by side and those without one last."""
        chunks = list(self._decodes())
        budget = self._max_batch_tokens - len(chunks)
        prefills = self._prefills()
        while budget and (sequence := next(prefills, None)):
            num_tokens = min(budget, sequence.num_pending)
            chunks.append(_chunk(sequence, num_tokens))
            budget -= num_tokens
        return sorted(chunks, key=_batch_order)

    def commit(self, chunk: Chunk, token: int | None) -> None:
        """Book a chunk whose KV is stored, with the token that was sampled from it, if any."""
        sequence = chunk.sequence
        assert chunk.does_sample == (token is not None), "a chunk samples if and only if it is a sequence's last"
        sequence.num_stored = chunk.end
        if token is not None:
            sequence.tokens.append(token)

    def finish(self, sequence: Sequence) -> None:
        """Let a sequence go, wherever it is: the one place where all that it holds is given back."""
        if sequence in self._running:
            self._running.remove(sequence)
            self._vacate(sequence)
        else:
            self._waiting.remove(sequence)
        self._drop_adapter(sequence)

    def check_integrity(self) -> None:
        """Assert that every page has one owner, and that pins and holds are those of the sequences here."""
        self._arena.check_integrity([*self._adapters.owned_pages(), *(s.pages for s in self._running)])
        self._adapters.check_integrity()
        for sequence in self._waiting:
            assert not sequence.pages, "a waiting sequence holds pages"
            assert sequence.resident is None, "a waiting sequence holds a pin"
        assert self._adapters.num_pins == sum(s.resident is not None for s in self._running), "pins drifted"
        everyone = [*self._running, *self._waiting]
        assert self._adapters.num_holds == sum(s.adapter_key is not None for s in everyone), "holds drifted"

    def _decodes(self) -> Iterator[Chunk]:
        for sequence in list(self._running):
            # One that was preempted by an older one in this very loop has everything pending again.
            if sequence.num_stored and sequence.num_pending == 1 and self._secure_next_page(sequence):
                yield _chunk(sequence, 1)

    def _prefills(self) -> Iterator[Sequence]:
        yield from [sequence for sequence in self._running if sequence.num_pending > 1 or not sequence.num_stored]
        while self._waiting and len(self._running) < self._max_running and self._admit(self._waiting[0]):
            yield self._running[-1]

    def _secure_next_page(self, sequence: Sequence) -> bool:
        """A page for the next token, the youngest's if need be; False if that is this one: it sits the step out."""
        if len(sequence.pages) >= self._num_pages(len(sequence.tokens)):
            return True
        while not self._adapters.make_room(1):
            victim = self._running[-1]
            if victim is sequence:
                return False
            self._preempt(victim)
        sequence.pages += self._arena.allocate(1)
        return True

    def _admit(self, sequence: Sequence) -> bool:
        """Give the first in the queue its adapter and pages for all tokens that it has so far, or leave it there."""
        key = sequence.adapter_key
        num_kv_pages = self._num_pages(len(sequence.tokens))
        num_adapter_pages = self._adapters.num_pages_missing(key) if key is not None else 0
        if not self._adapters.make_room(num_kv_pages + num_adapter_pages, keep=key):
            return False
        if key is not None:
            sequence.resident = self._adapters.acquire(key)
        sequence.pages = self._arena.allocate(num_kv_pages)
        self._running.append(self._waiting.popleft())
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Send the youngest back to the head of the queue; whoever waits there already came later."""
        assert self._running.pop() is sequence, "only the youngest is preempted"
        self._vacate(sequence)
        self._waiting.appendleft(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1

    def _vacate(self, sequence: Sequence) -> None:
        self._arena.free(sequence.pages)
        sequence.pages = []
        sequence.num_stored = 0
        if sequence.resident is not None:
            self._adapters.release(sequence.resident.key)
            sequence.resident = None

    def _drop_adapter(self, sequence: Sequence) -> None:
        if sequence.adapter_key is not None:
            self._adapters.drop(sequence.adapter_key)

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_tokens)

    def _check_fits(self, sequence: Sequence) -> None:
        # The last token is never fed back, so no KV is stored for it.
        num_kv_pages = self._num_pages(max(sequence.limit_tokens - 1, len(sequence.tokens)))
        num_adapter_pages = self._adapters.num_pages(sequence.adapter_key) if sequence.adapter_key is not None else 0
        if num_kv_pages + num_adapter_pages > self._arena.num_pages:
            raise InvalidRequestError(
                f"the request needs up to {num_kv_pages} pages of memory for {sequence.limit_tokens} tokens and "
                f"{num_adapter_pages} for its adapter, the engine has {self._arena.num_pages}: ask for fewer tokens, "
                "or raise serving.memory_bytes"
            )


def _chunk(sequence: Sequence, num_tokens: int) -> Chunk:
    end = sequence.num_stored + num_tokens
    return Chunk(sequence, sequence.num_stored, end, does_sample=end == len(sequence.tokens))


def _batch_order(chunk: Chunk) -> tuple[bool, str]:
    key = chunk.sequence.adapter_key
    return key is None, key or ""
