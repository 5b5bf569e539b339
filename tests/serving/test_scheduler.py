"""The scheduler: who runs, who waits, who gives way; and that everything is given back."""

import random

import pytest

from cluster.errors import InvalidRequestError, NotFoundError, OverloadedError, TenantLimitError
from serving.engine.sequence import SequenceState
from serving.engine.waiting import CLUSTERING_TOKENS
from tests.worlds.scheduler import Chunk, TinyScheduler, chunks_of, is_full, packed_adapter


def num_output(sequence: SequenceState) -> int:
    return len(sequence.tokens) - len(sequence.request.prompt_tokens)


def spans(chunks: list[Chunk]) -> list[tuple[str, int, int]]:
    return [(chunk.sequence.request.id, chunk.start, chunk.end) for chunk in chunks]


def test_prefill_then_decode() -> None:
    world = TinyScheduler()
    world.submit(5, 3)
    assert [spans(world.step()) for _ in range(4)] == [[("0", 0, 5)], [("0", 5, 6)], [("0", 6, 7)], []]


def test_newcomers_join_a_running_batch() -> None:
    world = TinyScheduler()
    world.submit(5, 9)
    world.step()
    world.submit(3, 9)
    assert spans(world.step()) == [("0", 5, 6), ("1", 0, 3)]
    assert spans(world.step()) == [("0", 6, 7), ("1", 3, 4)]


def test_prefill_is_cut_by_the_budget_and_decodes_go_first() -> None:
    world = TinyScheduler(max_batch_tokens=4)
    world.submit(2, 9)
    world.step()
    long = world.submit(8, 2)
    assert [spans(world.step()) for _ in range(2)] == [[("0", 2, 3), ("1", 0, 3)], [("0", 3, 4), ("1", 3, 6)]]
    assert not num_output(long)
    assert spans(world.step()) == [("0", 4, 5), ("1", 6, 8)]
    assert num_output(long) == 1


def test_one_step_admits_as_many_as_the_budget_holds() -> None:
    world = TinyScheduler(max_batch_tokens=10)
    for _ in range(3):
        world.submit(4, 5)
    assert spans(world.step()) == [("0", 0, 4), ("1", 0, 4), ("2", 0, 2)]


def test_no_more_sequences_than_allowed() -> None:
    world = TinyScheduler(max_sequences=2)
    for _ in range(3):
        world.submit(1, 3)
    assert len(world.step()) == 2
    assert (world.scheduler.num_running, world.scheduler.num_waiting) == (2, 1)


def test_nobody_is_admitted_without_budget_for_a_first_chunk() -> None:
    world = TinyScheduler(max_batch_tokens=4, max_sequences=8)
    world.submit(3, 3)
    world.submit(8, 3)
    world.submit(8, 3)
    world.step()
    assert (world.scheduler.num_running, world.scheduler.num_waiting) == (2, 1)
    world.step()
    assert world.scheduler.num_running == 2


def test_every_running_sequence_is_sure_of_a_token() -> None:
    world = TinyScheduler(max_batch_tokens=3)
    for _ in range(6):
        world.submit(1, 4)
    while world.scheduler.num_waiting:
        assert len(world.step()) == 3


def test_same_adapters_are_adjacent_and_the_base_comes_last() -> None:
    world = TinyScheduler()
    for key in "ab":
        world.adapters.add(key, packed_adapter(1))
    for key in ("b", None, "a", "b", None, "a"):
        world.submit(2, 3, key)
    for _ in range(2):
        assert [chunk.sequence.adapter_key for chunk in world.step()] == ["b", "b", "a", "a", None, None]


@pytest.mark.parametrize("num_prompt", [3, 200])
def test_contexts_of_many_pages(num_prompt: int) -> None:
    world = TinyScheduler(max_batch_tokens=1000)
    sequence, short = world.submit(num_prompt, 390 - num_prompt), world.submit(2, 4)
    world.drain()
    assert (len(sequence.tokens), len(short.tokens)) == (390, 6)


def test_a_plan_without_some_of_its_sequences() -> None:
    world = TinyScheduler()
    world.adapters.add("a", packed_adapter(1))
    base, other, mine = world.submit(3, 3), world.submit(2, 3), world.submit(4, 3, "a")
    plan = world.scheduler.schedule()
    world.scheduler.finish(other)
    rest = plan.without({other})
    assert spans(chunks_of(rest)) == [("2", 0, 4), ("0", 0, 3)]
    assert rest.sampling == [mine, base]
    world.scheduler.commit(rest, [7, 8])
    world.scheduler.check_integrity()
    assert (mine.tokens[-1], base.tokens[-1]) == (7, 8)


def test_full_queue_refuses_and_disturbs_nobody() -> None:
    world = TinyScheduler(max_queue=2)
    world.adapters.add("a", packed_adapter(1))
    world.submit(1, 1, "a")
    world.submit(1)
    with pytest.raises(OverloadedError) as refusal:
        world.submit(1, 1, "a")
    assert refusal.value.retry_after_s > 0
    world.drain()


@pytest.mark.parametrize(
    ("num_prompt", "num_new", "fits"), [(20, 1, True), (21, 1, False), (1, 20, True), (1, 21, False)]
)
def test_what_can_never_fit_is_refused_with_the_numbers(num_prompt: int, num_new: int, fits: bool) -> None:
    world = TinyScheduler(num_pages=8)
    world.adapters.add("a", packed_adapter(3))
    if fits:
        world.submit(num_prompt, num_new, "a")
        world.drain()
    else:
        with pytest.raises(InvalidRequestError, match=r"6 pages .* 3 for its adapter, the engine has 8"):
            world.submit(num_prompt, num_new, "a")
    assert world.adapters.num_holds == 0


def test_unknown_adapter_is_refused() -> None:
    with pytest.raises(NotFoundError):
        TinyScheduler().submit(1, 1, "a")


def test_youngest_gives_way_and_comes_back() -> None:
    world = TinyScheduler(num_pages=4)
    old, young = world.submit(7, 8), world.submit(7, 8)
    world.step()
    world.step()
    assert spans(world.step()) == [("0", 8, 9)]
    assert (world.num_preemptions(young), young.row) == (1, None)
    assert len(young.tokens) == 9
    world.drain()
    assert old.tokens == young.tokens == [*range(15)]
    assert (world.num_preemptions(old), world.scheduler.num_preemptions) == (0, world.num_preemptions(young))


def test_preempted_are_served_before_later_arrivals() -> None:
    world = TinyScheduler(num_pages=4)
    old, young = world.submit(7, 8), world.submit(7, 8)
    world.step()
    late = world.submit(1, 1)
    while not world.num_preemptions(young):
        world.step()
    assert not num_output(late)
    while not is_full(old):
        world.step()
    assert [chunk.sequence for chunk in world.step()] == [young, late]


def test_preemption_lets_go_of_the_adapter() -> None:
    world = TinyScheduler(num_pages=6)
    for key in "ab":
        world.adapters.add(key, packed_adapter(1))
    old, young = world.submit(7, 14, "a"), world.submit(7, 8, "b")
    while not world.num_preemptions(young):
        world.step()
    assert young.resident is None
    assert old.resident is not None
    while not young.resident:
        world.step()
    world.drain()


def test_idle_adapter_gives_way_to_kv() -> None:
    world = TinyScheduler(num_pages=5)
    world.adapters.add("a", packed_adapter(2))
    world.submit(1, 1, "a")
    world.drain()
    assert world.adapters.num_resident == 1
    world.submit(1, 19)
    world.drain()
    assert (world.adapters.num_resident, world.adapters.num_evictions, world.scheduler.num_preemptions) == (0, 1, 0)


def test_own_idle_adapter_is_not_evicted_for_own_kv() -> None:
    world = TinyScheduler(num_pages=5)
    world.adapters.add("a", packed_adapter(2))
    world.submit(1, 1, "a")
    world.drain()
    world.submit(12, 1, "a")
    world.drain()
    assert world.adapters.num_evictions == 0


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_abort_gives_everything_back(num_steps: int) -> None:
    world = TinyScheduler(max_batch_tokens=4)
    world.adapters.add("a", packed_adapter(2))
    sequence = world.submit(6, 9, "a")
    for _ in range(num_steps):
        world.step()
    world.scheduler.finish(sequence)
    world.scheduler.check_integrity()
    world.adapters.remove("a")
    assert world.allocator.num_free == world.allocator.num_pages


@pytest.mark.parametrize("is_cached", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_random_traffic_ends_with_all_memory_back(seed: int, is_cached: bool) -> None:
    draw = random.Random(seed)
    world = TinyScheduler(
        num_pages=draw.randint(8, 20),
        is_cached=is_cached,
        max_batch_tokens=draw.choice([2, 5, 16]),
        max_sequences=draw.choice([2, 8]),
    )
    for key, num_pages in zip("abcd", (1, 2, 3, 4), strict=True):
        world.adapters.add(key, packed_adapter(num_pages))
    alive: list[SequenceState] = []
    for _ in range(150):
        if draw.random() < 0.4:
            adapter, priority = draw.choice(["a", "b", "c", "d", None]), draw.choice([0, 0, 1])
            alive.append(world.submit(draw.randint(1, 8), draw.randint(1, 8), adapter, priority=priority))
        if draw.random() < 0.05 and alive and not is_full(victim := draw.choice(alive)):
            world.scheduler.finish(victim)
            alive.remove(victim)
        world.step()
    world.drain()
    for sequence in alive:
        assert sequence.tokens == [*range(sequence.limit_tokens)]
    for key in "abcd":
        world.adapters.remove(key)
    assert world.num_free == world.allocator.num_pages
    assert (world.prefixes.num_hit_tokens > 0) == is_cached


# Who is next.


def test_urgent_ones_go_first_and_give_way_last() -> None:
    world = TinyScheduler(num_pages=4, max_sequences=2)
    late, soon = world.submit(7, 8, priority=1), world.submit(7, 8, priority=0)
    assert [chunk.sequence for chunk in world.step()] == [soon, late]
    while not world.num_preemptions(late):
        world.step()
    world.drain()
    assert world.num_preemptions(soon) == 0


def test_resident_adapters_go_first_unless_they_had_much_more() -> None:
    world = TinyScheduler(num_pages=2, max_sequences=1)  # room for one adapter and one sequence
    for key in "ab":
        world.adapters.add(key, packed_adapter(1))
    world.submit(1, 1, "a")
    world.drain()
    order = [world.submit(2, 1, key) for key in "baa"]
    served = [chunk.sequence for _ in order for chunk in world.step()]
    assert served == [order[1], order[2], order[0]]
    world.submit(1, 1, "a")
    world.drain()
    world.scheduler._waiting.charge(order[1], CLUSTERING_TOKENS + 1)
    order = [world.submit(2, 1, key) for key in "ab"]
    assert [chunk.sequence for _ in order for chunk in world.step()] == order[::-1], "though a is resident"


def test_adapters_of_those_who_are_next_come_in_while_the_batch_is_full() -> None:
    world = TinyScheduler(num_pages=12, max_sequences=1)
    for key in "abc":
        world.adapters.add(key, packed_adapter(3))
    world.submit(4, 6)
    for key in "abc":
        world.submit(4, 2, key)
    for num_resident in (1, 2, 3, 3):
        world.step()
        assert world.adapters.num_resident == num_resident
    assert world.adapters.num_evictions == 0
    world.drain()


def test_prefetching_does_not_undo_itself() -> None:
    world = TinyScheduler(num_pages=10, max_sequences=1)
    for key in "abc":
        world.adapters.add(key, packed_adapter(3))
    world.submit(4, 20)
    for key in "abc":
        world.submit(4, 2, key)
    for _ in range(10):
        world.step()
    assert (world.adapters.num_resident, world.adapters.num_evictions) == (2, 0)
    world.drain()


def test_a_newcomer_does_not_wait_behind_anothers_backlog() -> None:
    world = TinyScheduler(max_sequences=1, max_overtakes=100)
    world.adapters.add("a", packed_adapter(1))
    for _ in range(60):
        world.submit(50, 1)
    world.step()
    mine = world.submit(50, 1, "a")
    assert mine in [world.step()[0].sequence for _ in range(3)]


def test_a_tenant_may_not_fill_the_queue() -> None:
    world = TinyScheduler(max_queue=4, max_queue_per_tenant=2)
    for _ in range(2):
        world.submit(1, 1, tenant="a")
    with pytest.raises(TenantLimitError):
        world.submit(1, 1, tenant="a")
    world.submit(1, 1, tenant="b")
    world.drain()
    world.submit(1, 1, tenant="a")
    world.drain()


def test_only_those_who_wait_are_overdue() -> None:
    world = TinyScheduler(max_sequences=1)
    running, waiting, patient = (world.submit(2, 5, deadline_at=at) for at in (10.0, 11.0, 20.0))
    world.step()
    assert world.scheduler.overdue(9.0) == []
    assert world.scheduler.overdue(12.0) == [waiting]
    world.scheduler.finish(waiting)
    assert world.scheduler.overdue(13.0) == []
    world.drain()
    assert world.scheduler.overdue(30.0) == []
    assert (is_full(running), is_full(patient)) == (True, True)
