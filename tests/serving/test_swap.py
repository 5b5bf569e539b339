"""Swapping: preempted sequences get exactly their own KV back, whatever happens meanwhile; every copy goes again."""

import random
from zlib import crc32

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engine.sequence import SequenceState
from serving.memory.swap import Swapped, SwapSpace
from tests.serving.test_scheduler import PAGE_ELEMENTS, PAGE_TOKENS, Chunk, World, chunks_of, is_full, packed
from tests.worlds.serving import make_sequence

PAGE_BYTES = PAGE_ELEMENTS * 4


def kv_of(sequence: SequenceState, position: int) -> float:
    """What the KV of a token depends on: the weights and all tokens up to it."""
    return float(crc32(repr((sequence.adapter_key, sequence.tokens[: position + 1])).encode()) % (1 << 24))


class KvWorld(World):
    """A scheduler whose sequences' KV is written for real, a number a token, and looked at before each step.

    With a `spread` all go on in ways of their own.
    """

    spread = 0

    def step(self) -> list[Chunk]:
        plan = self.scheduler.schedule()
        self.scheduler.check_integrity()
        chunks = chunks_of(plan)
        for chunk, table in zip(chunks, plan.tables_NB.tolist(), strict=True):
            for position in range(chunk.end):
                page, offset = table[position // PAGE_TOKENS], position % PAGE_TOKENS
                if position >= chunk.start:
                    self.arena_PE[page, offset] = kv_of(chunk.sequence, position)
                assert self.arena_PE[page, offset] == kv_of(chunk.sequence, position), "KV that is not its own"
        sampling = [chunk.sequence for chunk in chunks if chunk.does_sample]
        self.scheduler.commit(plan, [len(s.tokens) + self.spread * int(s.request.id) for s in sampling])
        for chunk in chunks:
            if is_full(chunk.sequence):
                self.scheduler.finish(chunk.sequence)
        self.scheduler.check_integrity()
        return chunks


@pytest.mark.parametrize("is_cached", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_random_traffic_meets_its_own_kv_only(seed: int, is_cached: bool) -> None:
    draw = random.Random(seed)
    world = KvWorld(
        num_pages=draw.randint(8, 20),
        swap_pages=draw.choice([2, 6, 100]),
        is_cached=is_cached,
        max_batch_tokens=draw.choice([2, 5, 16]),
        max_sequences=draw.choice([2, 8]),
    )
    for key, num_pages in zip("abcd", (1, 2, 3, 4), strict=True):
        world.adapters.add(key, packed(num_pages))
    alive: list[SequenceState] = []
    for _ in range(150):
        if draw.random() < 0.4:
            adapter, priority = draw.choice(["a", "b", "c", "d", None]), draw.choice([0, 0, 1])
            prompt, new = draw.randint(1, 8), draw.randint(1, 8)
            alive.append(world.submit(prompt, new, adapter, priority=priority, salt=draw.choice("xyz")))
        if draw.random() < 0.1 and alive and not is_full(victim := draw.choice(alive)):
            world.scheduler.finish(victim)
            alive.remove(victim)
        world.step()
    world.drain()
    assert all(sequence.tokens == [*range(sequence.limit_tokens)] for sequence in alive)
    assert world.swaps.num_pages_used == 0
    assert world.swaps.num_pages_in <= world.swaps.num_pages_out
    assert world.swaps.num_pages_out > 0 or not world.scheduler.num_preemptions


def preempted(swap_pages: int = 10, **wishes: object) -> tuple[KvWorld, SequenceState, SequenceState]:
    """Two sequences that fill 4 pages, the younger of which has just given way."""
    world = KvWorld(num_pages=4, swap_pages=swap_pages, **wishes)
    old, young = world.submit(7, 8, salt="old"), world.submit(7, 8, salt="young")
    while not world.num_preemptions(young):
        world.step()
    return world, old, young


@pytest.mark.parametrize("is_cached", [False, True])
def test_what_was_swapped_is_not_computed_again(is_cached: bool) -> None:
    world, old, young = preempted(is_cached=is_cached)
    assert (young.swapped, world.swaps.num_pages_used) == (Swapped(0, 8, (0, 1)), 2)
    while not is_full(old):
        world.step()
    chunks = [chunk for _ in range(2) for chunk in world.step() if chunk.sequence is young]
    assert [(chunk.start, chunk.end) for chunk in chunks] == [(8, 9), (9, 10)]
    assert (young.swapped, world.swaps.num_pages_used, world.swaps.num_pages_in) == (None, 0, 2)
    world.drain()


@pytest.mark.parametrize("swap_pages", [0, 1])
def test_without_room_on_the_host_it_is_computed_anew(swap_pages: int) -> None:
    world, old, young = preempted(swap_pages)
    assert young.swapped is None
    while not is_full(old):
        world.step()
    assert world.step()[0][1:3] == (0, 9)
    world.drain()


def test_abort_while_swapped_frees_the_copies() -> None:
    world, _, young = preempted()
    world.scheduler.finish(young)
    world.scheduler.check_integrity()
    assert world.swaps.num_pages_used == 0
    world.drain()


def test_pages_that_others_hold_are_not_copied() -> None:
    """Two who share their first page: it stays with the one that runs, and is taken again from there."""
    world = KvWorld(num_pages=5, swap_pages=10, is_cached=True)
    world.spread = 1000
    world.submit(5, 1)
    world.drain()
    old, young = world.submit(7, 10), world.submit(6, 10)
    for _ in range(8):
        world.step()
    assert young.row is None
    assert young.swapped is not None
    assert young.swapped.first_page >= 1
    world.drain()
    assert (is_full(old), is_full(young), world.num_preemptions(young)) == (True, True, 1)


def test_copies_without_what_comes_before_them_are_dropped() -> None:
    """Its first page was shared, and has gone by the time it comes back: all is computed anew."""
    space = World(num_pages=8, swap_pages=4)
    sequence = make_sequence(space.submit(9, 3).request, 12)
    sequence.swapped = space.swaps.save([0, 1, 2], first_page=1, num_stored=9)
    assert space.scheduler._swap_in(sequence, [3, 4, 5], num_known=0) == 0
    assert (sequence.swapped, space.swaps.num_pages_used) == (None, 0)
    assert space.swaps.num_pages_in == 0


def test_what_costs_more_than_computing_anew_is_not_swapped() -> None:
    space = SwapSpace(torch.zeros(4, PAGE_ELEMENTS), 8 * PAGE_BYTES, PAGE_TOKENS)
    first = space.save([0, 1], 0, 8)
    assert first is not None, "nothing is known yet"
    space.drop(first)
    for _ in range(100):
        space.record_prefill(1000, 1e-9)
    assert space.save([0, 1], 0, 8) is None
    for _ in range(100):
        space.record_prefill(1, 10.0)
    assert space.save([0, 1], 0, 8) is not None


def test_one_slow_copy_does_not_end_swapping_for_good() -> None:
    space = SwapSpace(torch.zeros(4, PAGE_ELEMENTS), 8 * PAGE_BYTES, PAGE_TOKENS)
    space.record_prefill(1000, 1.0)
    space._page_s = 60.0  # the machine stood still meanwhile
    results = [space.save([0, 1], 0, 8) for _ in range(200)]
    assert results[0] is None
    assert results[-1] is not None or space._allocator.num_free < 2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["save", "load", "drop"]), st.integers(0, 9)), max_size=60))
def test_random_operations_keep_exact_copies(operations: list[tuple[str, int]]) -> None:
    arena_PE = torch.zeros(12, PAGE_ELEMENTS)
    space = SwapSpace(arena_PE, 7 * PAGE_BYTES + 5, PAGE_TOKENS)
    held: list[tuple[Swapped, float]] = []
    for mark, (operation, i) in enumerate(operations, start=1):
        if operation == "save":
            pages = list(range(i, min(i + 3, 12)))
            arena_PE[pages] = float(mark)
            saved = space.save(pages, i % 3, PAGE_TOKENS * len(pages))
            if saved is not None:
                held.append((saved, float(mark)))
            arena_PE[pages] = -1.0
        elif held:
            saved, value = held[i % len(held)] if operation == "load" else held.pop(i % len(held))
            if operation == "load":
                first = saved.first_page + i % (len(saved.slots) + 1)
                target = list(range(12))[::-1]
                space.load(saved, first, target)
                num_pages = len(saved.slots) - (first - saved.first_page)
                assert (arena_PE[target[:num_pages]] == value).all()
            else:
                space.drop(saved)
        space.check_integrity([saved for saved, _ in held])
    assert space.num_pages_used == sum(len(saved.slots) for saved, _ in held)
