"""A small scheduler for tests, with memory and adapters but no model."""

from collections import Counter
from typing import Any, NamedTuple

import torch

from cluster.adapters.files import Adapter, LoraFactors
from cluster.config.settings import ServingConfig
from serving.adapters.cache import AdapterCache
from serving.adapters.packing import PackedAdapter, pack_adapter
from serving.engine.request import AdapterRef, Request, SamplingParams, Terms
from serving.engine.running import SchedulerOutput
from serving.engine.scheduler import Scheduler
from serving.engine.sequence import SequenceState
from serving.memory.eviction import EvictionQueue
from serving.memory.pages import PageAllocator
from serving.memory.prefixes import PrefixCache, PrefixKeys
from serving.memory.swap import SwapSpace
from tests.worlds.serving import make_sequence

PAGE_TOKENS, PAGE_ELEMENTS = 4, 64


def packed_adapter(num_pages: int) -> PackedAdapter:
    """Return an adapter that takes exactly `num_pages` pages: its rows take half a page each."""
    factors = LoraFactors(torch.ones(num_pages, 32), torch.ones(32, num_pages), 1.0)
    return pack_adapter(Adapter({"m": factors}), ("m",), PAGE_ELEMENTS, torch.float32)


class Chunk(NamedTuple):
    """A sequence's share of a step."""

    sequence: SequenceState
    start: int
    end: int
    does_sample: bool


def chunks_of(output: SchedulerOutput) -> list[Chunk]:
    """Return a step's chunks in the order of its batch."""
    columns = output.starts_B.tolist(), output.ends_B.tolist(), output.does_sample_B.tolist()
    return [Chunk(*chunk) for chunk in zip(output.sequences, *columns, strict=True)]


class CountingScheduler(Scheduler):
    """A scheduler that counts the preemptions of each sequence."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.preemptions: Counter[SequenceState] = Counter()

    def _preempt_last(self) -> None:
        self.preemptions[self._running[-1]] += 1
        super()._preempt_last()


class TinyScheduler:
    """A scheduler with a small arena and everything it needs. Each sequence's next token is its length."""

    def __init__(self, num_pages: int = 100, is_cached: bool = False, swap_pages: int = 0, **limits: int):
        settings = {"max_batch_tokens": 64, "max_sequences": 16, "max_queue": 100, **limits}
        config = ServingConfig(page_tokens=PAGE_TOKENS, **settings)
        self.max_batch_tokens = config.max_batch_tokens
        self.allocator = PageAllocator(num_pages)
        evictions = EvictionQueue(self.allocator)
        self.arena_PE = arena_PE = torch.zeros(num_pages, PAGE_ELEMENTS)
        self.adapters = AdapterCache(self.allocator, evictions, arena_PE, 1 << 30)
        self.prefixes = PrefixCache(self.allocator, evictions, PAGE_TOKENS)
        self.swaps = SwapSpace(arena_PE, swap_pages * PAGE_ELEMENTS * 4, PAGE_TOKENS)
        self.scheduler = CountingScheduler(config, self.allocator, self.adapters, self.prefixes, evictions, self.swaps)
        self.is_cached = is_cached
        self.num_submitted = 0

    def num_preemptions(self, sequence: SequenceState) -> int:
        """Return how often a sequence was preempted."""
        return self.scheduler.preemptions[sequence]

    @property
    def num_free(self) -> int:
        """The number of pages that are free or can be evicted."""
        return self.allocator.num_free + self.prefixes.num_idle

    def submit(
        self,
        num_prompt: int,
        num_new: int = 1,
        adapter: str | None = None,
        *,
        salt: str = "",
        deadline_at: float | None = None,
        **terms: object,
    ) -> SequenceState:
        """Submit a request with a prompt of `num_prompt` tokens that generates `num_new`."""
        ref = AdapterRef(adapter, adapter, 1, adapter) if adapter else None
        prompt = tuple(range(num_prompt))
        request = Request(
            str(self.num_submitted), prompt, SamplingParams(max_tokens=num_new), ref, terms=Terms(**terms)
        )
        keys = PrefixKeys(adapter, (salt,), PAGE_TOKENS) if self.is_cached else None
        sequence = make_sequence(request, limit_tokens=num_prompt + num_new, prefix_keys=keys, deadline_at=deadline_at)
        self.scheduler.submit(sequence)
        self.num_submitted += 1
        return sequence

    def step(self) -> list[Chunk]:
        """Run one step and return its chunks. Full sequences are finished."""
        output = self.scheduler.schedule()
        chunks = chunks_of(output)
        self.scheduler.check_integrity()
        assert sum(chunk.end - chunk.start for chunk in chunks) <= self.max_batch_tokens
        self.scheduler.commit(output, [len(chunk.sequence.tokens) for chunk in chunks if chunk.does_sample])
        for chunk in chunks:
            if is_full(chunk.sequence):
                self.scheduler.finish(chunk.sequence)
        self.scheduler.check_integrity()
        return chunks

    def drain(self, max_steps: int = 2000) -> None:
        """Step until no sequence is left."""
        for _ in range(max_steps):
            if not self.scheduler.num_running + self.scheduler.num_waiting:
                return
            assert self.step(), "a step did nothing while sequences are left"
        raise AssertionError("the scheduler did not finish")


def is_full(sequence: SequenceState) -> bool:
    """Whether a sequence has all its tokens."""
    return len(sequence.tokens) >= sequence.limit_tokens
