"""Swapping: preempted sequences always get exactly their own KV back, and every copy on the host is freed."""

import random
from zlib import crc32

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engine.sequence import SequenceState
from serving.memory.swap import Swapped, SwapSpace
from tests.worlds.scheduler import PAGE_ELEMENTS, PAGE_TOKENS, Chunk, TinyScheduler, chunks_of, is_full, packed_adapter
from tests.worlds.serving import make_sequence

PAGE_BYTES = PAGE_ELEMENTS * 4


def kv_of(sequence: SequenceState, position: int) -> float:
    """Return a number for a token's KV: it depends on the weights and on all tokens up to it."""
    return float(crc32(repr((sequence.adapter_key, sequence.tokens[: position + 1])).encode()) % (1 << 24))


class KvScheduler(TinyScheduler):
    """A scheduler that writes one number per token as its KV, and checks all KV in each step.

    With a `spread`, sequences generate different tokens.
    """

    spread = 0

    def step(self) -> list[Chunk]:
        output = self.scheduler.schedule()
        self.scheduler.check_integrity()
        chunks = chunks_of(output)
        for chunk, table in zip(chunks, output.block_tables_BW.tolist(), strict=True):
            for position in range(chunk.end):
                page, offset = table[position // PAGE_TOKENS], position % PAGE_TOKENS
                if position >= chunk.start:
                    self.arena_PE[page, offset] = kv_of(chunk.sequence, position)
                assert self.arena_PE[page, offset] == kv_of(chunk.sequence, position), "KV of another sequence"
        sampling = [chunk.sequence for chunk in chunks if chunk.does_sample]
        self.scheduler.commit(output, [len(s.tokens) + self.spread * int(s.request.id) for s in sampling])
        for chunk in chunks:
            if is_full(chunk.sequence):
                self.scheduler.finish(chunk.sequence)
        self.scheduler.check_integrity()
        return chunks


@pytest.mark.parametrize("is_cached", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_random_traffic_reads_only_its_own_kv(seed: int, is_cached: bool) -> None:
    draw = random.Random(seed)
    tiny = KvScheduler(
        num_pages=draw.randint(8, 20),
        swap_pages=draw.choice([2, 6, 100]),
        is_cached=is_cached,
        max_batch_tokens=draw.choice([2, 5, 16]),
        max_sequences=draw.choice([2, 8]),
    )
    for key, num_pages in zip("abcd", (1, 2, 3, 4), strict=True):
        tiny.adapters.add(key, packed_adapter(num_pages))
    alive: list[SequenceState] = []
    for _ in range(150):
        if draw.random() < 0.4:
            adapter, priority = draw.choice(["a", "b", "c", "d", None]), draw.choice([0, 0, 1])
            prompt, new = draw.randint(1, 8), draw.randint(1, 8)
            alive.append(tiny.submit(prompt, new, adapter, priority=priority, salt=draw.choice("xyz")))
        if draw.random() < 0.1 and alive and not is_full(victim := draw.choice(alive)):
            tiny.scheduler.finish(victim)
            alive.remove(victim)
        tiny.step()
    tiny.drain()
    assert all(sequence.tokens == [*range(sequence.limit_tokens)] for sequence in alive)
    assert tiny.swaps.num_pages_used == 0
    assert tiny.swaps.num_pages_in <= tiny.swaps.num_pages_out
    assert tiny.swaps.num_pages_out > 0 or not tiny.scheduler.num_preemptions


def preempted(swap_pages: int = 10, **options: object) -> tuple[KvScheduler, SequenceState, SequenceState]:
    """Return two sequences that fill 4 pages; the younger one has just been preempted."""
    tiny = KvScheduler(num_pages=4, swap_pages=swap_pages, **options)
    old, young = tiny.submit(7, 8, salt="old"), tiny.submit(7, 8, salt="young")
    while not tiny.num_preemptions(young):
        tiny.step()
    return tiny, old, young


@pytest.mark.parametrize("is_cached", [False, True])
def test_swapped_kv_is_not_recomputed(is_cached: bool) -> None:
    tiny, old, young = preempted(is_cached=is_cached)
    assert (young.swapped, tiny.swaps.num_pages_used) == (Swapped(0, 8, (0, 1)), 2)
    while not is_full(old):
        tiny.step()
    chunks = [chunk for _ in range(2) for chunk in tiny.step() if chunk.sequence is young]
    assert [(chunk.start, chunk.end) for chunk in chunks] == [(8, 9), (9, 10)]
    assert (young.swapped, tiny.swaps.num_pages_used, tiny.swaps.num_pages_in) == (None, 0, 2)
    tiny.drain()


@pytest.mark.parametrize("swap_pages", [0, 1])
def test_kv_is_recomputed_if_the_host_has_no_room(swap_pages: int) -> None:
    tiny, old, young = preempted(swap_pages)
    assert young.swapped is None
    while not is_full(old):
        tiny.step()
    assert tiny.step()[0][1:3] == (0, 9)
    tiny.drain()


def test_abort_while_swapped_frees_the_copies() -> None:
    tiny, _, young = preempted()
    tiny.scheduler.finish(young)
    tiny.scheduler.check_integrity()
    assert tiny.swaps.num_pages_used == 0
    tiny.drain()


def test_shared_pages_are_not_copied() -> None:
    """Two sequences share their first page. It stays with the running one, and the other takes it again from there."""
    tiny = KvScheduler(num_pages=5, swap_pages=10, is_cached=True)
    tiny.spread = 1000
    tiny.submit(5, 1)
    tiny.drain()
    old, young = tiny.submit(7, 10), tiny.submit(6, 10)
    for _ in range(8):
        tiny.step()
    assert young.row is None
    assert young.swapped is not None
    assert young.swapped.first_page >= 1
    tiny.drain()
    assert (is_full(old), is_full(young), tiny.num_preemptions(young)) == (True, True, 1)


def test_copies_without_the_pages_before_them_are_dropped() -> None:
    """The first page was shared and is gone when the sequence comes back, so all is recomputed."""
    tiny = TinyScheduler(num_pages=8, swap_pages=4)
    sequence = make_sequence(tiny.submit(9, 3).request, 12)
    sequence.swapped = tiny.swaps.save([0, 1, 2], first_page=1, num_stored=9)
    assert tiny.scheduler._swap_in(sequence, [3, 4, 5], num_known=0) == 0
    assert (sequence.swapped, tiny.swaps.num_pages_used) == (None, 0)
    assert tiny.swaps.num_pages_in == 0


def test_kv_is_not_swapped_if_recomputing_costs_less() -> None:
    swaps = SwapSpace(torch.zeros(4, PAGE_ELEMENTS), 8 * PAGE_BYTES, PAGE_TOKENS)
    first = swaps.save([0, 1], 0, 8)
    assert first is not None, "no cost is known yet"
    swaps.drop(first)
    for _ in range(100):
        swaps.record_prefill(1000, 1e-9)
    assert swaps.save([0, 1], 0, 8) is None
    for _ in range(100):
        swaps.record_prefill(1, 10.0)
    assert swaps.save([0, 1], 0, 8) is not None


def test_one_slow_copy_does_not_end_swapping_for_good() -> None:
    swaps = SwapSpace(torch.zeros(4, PAGE_ELEMENTS), 8 * PAGE_BYTES, PAGE_TOKENS)
    swaps.record_prefill(1000, 1.0)
    swaps._page_s = 60.0  # as if the machine had stalled
    results = [swaps.save([0, 1], 0, 8) for _ in range(200)]
    assert results[0] is None
    assert results[-1] is not None or swaps._allocator.num_free < 2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["save", "load", "drop"]), st.integers(0, 9)), max_size=60))
def test_random_operations_keep_exact_copies(operations: list[tuple[str, int]]) -> None:
    arena_PE = torch.zeros(12, PAGE_ELEMENTS)
    swaps = SwapSpace(arena_PE, 7 * PAGE_BYTES + 5, PAGE_TOKENS)
    held: list[tuple[Swapped, float]] = []
    for mark, (operation, i) in enumerate(operations, start=1):
        if operation == "save":
            pages = list(range(i, min(i + 3, 12)))
            arena_PE[pages] = float(mark)
            saved = swaps.save(pages, i % 3, PAGE_TOKENS * len(pages))
            if saved is not None:
                held.append((saved, float(mark)))
            arena_PE[pages] = -1.0
        elif held:
            saved, value = held[i % len(held)] if operation == "load" else held.pop(i % len(held))
            if operation == "load":
                first = saved.first_page + i % (len(saved.slots) + 1)
                target = list(range(12))[::-1]
                swaps.load(saved, first, target)
                num_pages = len(saved.slots) - (first - saved.first_page)
                assert (arena_PE[target[:num_pages]] == value).all()
            else:
                swaps.drop(saved)
        swaps.check_integrity([saved for saved, _ in held])
    assert swaps.num_pages_used == sum(len(saved.slots) for saved, _ in held)
